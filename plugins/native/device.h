// The names that kernels use, with one meaning under nvcc and in the emulator (emulator/emulator.h).
//
//   launch(kernel, grid, block, shared_bytes, stream, arguments)   one kernel, its error as the result
//   launch_early(..)     the same; it may start while the kernel before it still runs, so it calls wait_for_previous()
//   let_next_start()     from here on the next kernel may start, if it was launched early: a hint
//   wait_for_previous()  the kernel before has ended and what it wrote can be read
//   finish()             after the last launch of a call; the emulator runs its kernels here
//   shared_memory()      dynamic shared memory, the only kind that the kernels use: the emulator then knows its size
//   load(p)              one load of 16 bytes that no kernel writes while they are read
//   stream_load(p)       one load of 8 or 16 bytes that are read once: past the first-level cache
//   lanes_where(mine)    a bit for every lane of the warp that says so, first_lane(bits) the lowest of them
//   require(ok, text)    an invariant of the arguments: stops the kernel in debug builds and in the emulator
//
// Kernels use threadIdx.x, blockIdx.x, __syncthreads(), __shfl_sync() and __shfl_xor_sync() as CUDA defines them, all
// lanes of a warp taking part in each shuffle.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef CM_EMULATE
#include "../emulator/emulator.h"
#define CM_UNROLL
#define CM_THREADS(n)
#else
#include <cstdio>
#define CM_UNROLL _Pragma("unroll")
#define CM_THREADS(n) __launch_bounds__(n)
#endif

namespace cm {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef CM_EMULATE

template <class Kernel, class... Arguments>
cudaError_t launch(Kernel kernel, int64_t grid, int block, size_t shared_bytes, cudaStream_t, Arguments... arguments) {
    emulator::launch(grid, block, shared_bytes, [=] { kernel(arguments...); }, false);
    return cudaSuccess;
}

template <class Kernel, class... Arguments>
cudaError_t launch_early(Kernel kernel, int64_t grid, int block, size_t shared_bytes, cudaStream_t,
                         Arguments... arguments) {
    emulator::launch(grid, block, shared_bytes, [=] { kernel(arguments...); }, true);
    return cudaSuccess;
}

inline void let_next_start() {}
inline void wait_for_previous() { emulator::wait_for_previous(); }
inline cudaError_t finish() { return emulator::finish(); }

inline unsigned char* shared_memory() { return emulator::shared_memory(); }

inline void require(bool ok, const char* what) {
    if (!ok) emulator::fail(what);
}

template <class Vector>
Vector stream_load(const Vector* p) {
    require(reinterpret_cast<uintptr_t>(p) % sizeof(Vector) == 0, "a load from an address that is not aligned for it");
    return *p;
}

inline uint4 load(const uint4* p) { return stream_load(p); }

inline uint32_t lanes_where(bool mine) {
    uint32_t bits = static_cast<uint32_t>(mine) << (threadIdx.x % kWarp);
    for (int apart = kWarp / 2; apart > 0; apart /= 2) bits |= __shfl_xor_sync(kAllLanes, bits, apart);
    return bits;
}
inline int first_lane(uint32_t bits) { return __builtin_ctz(bits); }

inline int multiprocessors() { return 16; }

inline const char* error_text(cudaError_t) { return "the emulated kernel failed (see stderr)"; }

#else

template <class Kernel, class... Arguments>
cudaError_t launch(Kernel kernel, int64_t grid, int block, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
    kernel<<<static_cast<unsigned>(grid), block, shared_bytes, stream>>>(arguments...);
    return cudaGetLastError();
}

inline cudaError_t finish() { return cudaSuccess; }

// Programmatic dependent launch, from compute capability 9.0 on; before it, an ordinary launch.
inline bool launches_early() {
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

template <class Kernel, class... Arguments>
cudaError_t launch_early(Kernel kernel, int64_t grid, int block, size_t shared_bytes, cudaStream_t stream,
                         Arguments... arguments) {
    if (!launches_early()) return launch(kernel, grid, block, shared_bytes, stream, arguments...);
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = dim3(static_cast<unsigned>(block));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = 1;
    void* addresses[] = {static_cast<void*>(&arguments)...};
    return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), addresses);
}

__device__ inline void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ inline void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char cm_shared_memory[];
    return cm_shared_memory;
}

__device__ inline uint4 load(const uint4* p) { return __ldg(p); }

__device__ inline uint4 stream_load(const uint4* p) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(p));
    return v;
}

__device__ inline uint2 stream_load(const uint2* p) {
    uint2 v;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

__device__ inline uint32_t lanes_where(bool mine) { return __ballot_sync(kAllLanes, mine); }
__device__ inline int first_lane(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }

__device__ inline void require(bool ok, const char* what) {
#ifndef NDEBUG
    if (!ok) {
        printf("cm_export: block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
        __trap();
    }
#endif
}

// Of the current device; 0 without one.
inline int multiprocessors() {
    int device = 0, count = 0;
    const bool found = cudaGetDevice(&device) == cudaSuccess &&
                       cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
    if (!found) cudaGetLastError();  // or the first launch would report it
    return found ? count : 0;
}

inline const char* error_text(cudaError_t error) { return cudaGetErrorString(error); }

#endif

// The nearest of 0 .. count - 1. A builder that times a plugin feeds it whatever lies in memory, ids too: that must not
// read outside the weights or the cache.
__device__ inline int32_t within(int64_t id, int32_t count) {
    return static_cast<int32_t>(id < 0 ? 0 : id < count ? id : count - 1);
}

// The sum over a warp, in every lane; the order of the additions is fixed.
__device__ inline float warp_sum(float value) {
    CM_UNROLL
    for (int apart = kWarp / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(kAllLanes, value, apart);
    return value;
}

// The largest over a warp, in every lane. Unlike fmaxf it does not drop what is not a number.
__device__ inline float larger(float a, float b) { return a <= b ? b : a; }
__device__ inline float warp_largest(float value) {
    CM_UNROLL
    for (int apart = kWarp / 2; apart > 0; apart /= 2) {
        value = larger(value, __shfl_xor_sync(kAllLanes, value, apart));
    }
    return value;
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cm
