// float, half and bfloat16 in memory, float in registers.
#pragma once

#include "device.h"

namespace cm {

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) { return v; }
template <>
__device__ inline __half from_float<__half>(float v) { return __float2half_rn(v); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

// The numbers in 16 bytes, which are in registers: taken apart by words, or the compiler would load each number alone.
template <class T>
__device__ inline void spread(uint4 bytes, float* out) {
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
    CM_UNROLL
    for (int i = 0; i < 4; ++i) {
        constexpr int kCount = sizeof(uint32_t) / sizeof(T);
        T parts[kCount];
        memcpy(static_cast<void*>(parts), &words[i], sizeof(uint32_t));
        CM_UNROLL
        for (int j = 0; j < kCount; ++j) out[i * kCount + j] = to_float(parts[j]);
    }
}

// kCount numbers of a row from column `first` on. Aligned: all there, in whole 16 bytes. Otherwise those before
// `columns`, one at a time, and zeros.
template <class T, int kCount, bool kAligned>
__device__ inline void load_numbers(const T* row, int first, int columns, float* out) {
    if constexpr (kAligned) {
        constexpr int kPer = sizeof(uint4) / sizeof(T);
        static_assert(kCount % kPer == 0, "whole 16 bytes");
        CM_UNROLL
        for (int i = 0; i < kCount; i += kPer) {
            spread<T>(load(reinterpret_cast<const uint4*>(row + first + i)), out + i);
        }
    } else {
        CM_UNROLL
        for (int i = 0; i < kCount; ++i) out[i] = first + i < columns ? to_float(row[first + i]) : 0.0f;
    }
}

inline bool aligned(const void* p, size_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; }

}  // namespace cm
