// CUDA's execution model on one CPU thread, enough to run the kernels of this folder as they stand.
//
//   block = one fiber per thread; a fiber runs until it waits at __syncthreads() or in a shuffle, a warp as far as it
//   gets without the others
//   shared memory = one allocation of exactly the bytes asked for, filled with NaN before each block
//
// What CUDA leaves undefined is an error here: a barrier that a thread has left, a shuffle that a lane has left, and
// threads that wait for each other forever. `reverse` turns the order of blocks and threads around: results that
// change with it come from a missing barrier.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <functional>

namespace cm::emulator {

struct Index {
    unsigned x;
};

extern Index thread_index, block_index, block_size, grid_size;

// Runs all blocks; an error if one of them failed.
cudaError_t run(int64_t grid, int block, size_t shared_bytes, const std::function<void()>& thread);

// Ends the kernel from within: the text goes to stderr, run() returns an error.
[[noreturn]] void fail(const char* what);

unsigned char* shared_memory();
void wait_for_block();

// Every lane gives 4 bytes and gets those of lane `source`.
uint32_t exchange(uint32_t mine, int source);

int lane();

}  // namespace cm::emulator

#define threadIdx ::cm::emulator::thread_index
#define blockIdx ::cm::emulator::block_index
#define blockDim ::cm::emulator::block_size
#define gridDim ::cm::emulator::grid_size

inline void __syncthreads() { cm::emulator::wait_for_block(); }

template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int apart) {
    static_assert(sizeof(T) == sizeof(uint32_t), "shuffles move 4 bytes");
    if (lanes != 0xffffffffu) cm::emulator::fail("a shuffle of some lanes only");
    uint32_t bytes;
    memcpy(&bytes, &value, sizeof(bytes));
    bytes = cm::emulator::exchange(bytes, cm::emulator::lane() ^ apart);
    memcpy(&value, &bytes, sizeof(bytes));
    return value;
}
