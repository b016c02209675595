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

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <functional>

namespace cm::emulator {

struct Index {
    unsigned x;
};

extern Index thread_index, block_index, block_size, grid_size;

// Kernels run at finish(), or in the middle of the next one: `early` starts before the kernel launched last has run, and
// has it run at its first wait_for_previous(). So what is read too early is not there yet.
void launch(int64_t grid, int block, size_t shared_bytes, std::function<void()> thread, bool early);
void wait_for_previous();

// Runs what was launched; an error if a block of it failed.
cudaError_t finish();

// Ends the kernel from within: the text goes to stderr, finish() returns an error.
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
T __shfl_sync(unsigned lanes, T value, int source) {
    static_assert(sizeof(T) == sizeof(uint32_t), "shuffles move 4 bytes");
    if (lanes != 0xffffffffu) cm::emulator::fail("a shuffle of some lanes only");
    uint32_t bytes;
    memcpy(&bytes, &value, sizeof(bytes));
    bytes = cm::emulator::exchange(bytes, source);
    memcpy(&value, &bytes, sizeof(bytes));
    return value;
}

template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int apart) {
    return __shfl_sync(lanes, value, cm::emulator::lane() ^ apart);
}

// CUDA has it for devices only. Exact but for its one rounding: products of halves fit a double with room for the sum.
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    const auto fma = [](__half x, __half y, __half z) {
        return __double2half(static_cast<double>(__half2float(x)) * __half2float(y) + __half2float(z));
    };
    return __halves2half2(fma(a.x, b.x, c.x), fma(a.y, b.y, c.y));
}
