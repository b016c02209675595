// A weight matrix [F,D] as the kernels read it: kColumns numbers of one row at a time.
//
//   fetch(row, chunk)     starts the load of columns chunk*kColumns .. of a row; several can be under way
//   numbers(raw, out)     kColumns floats of what was fetched, in registers; times factor(raw) they are the weights
//   kScaled               whether that factor is not always 1: a product takes it once, not each number
//
// Aligned readers load 16 bytes (8 for int4: 16 numbers, so that rows of 1536 still fill whole warps). Others take one
// number at a time and give zeros past the end of the row: any D and any group work, slowly.
#pragma once

#include <type_traits>

#include "../native/numbers.h"

namespace cm {

template <class T>
struct Matrix {
    const void* data;
    const T* scales;  // [F, D/group], for packed weights
    int32_t columns;  // D
    int32_t group;
    int32_t groups;  // D/group
    uint32_t group_inverse;  // see group_of

    Matrix(const void* data, const T* scales, int32_t columns, int32_t group, int chunk)
        : data(data), scales(scales), columns(columns), group(group), groups(group > 0 ? columns / group : 0) {
        const int64_t chunks = group >= chunk ? group / chunk : 1;
        group_inverse = static_cast<uint32_t>(((int64_t{1} << 31) + chunks - 1) / chunks);
    }
    // chunk / (chunks per group) as a product: a division would cost more than unpacking the numbers.
    __device__ int32_t group_of(int chunk) const {
        return static_cast<int32_t>((static_cast<uint64_t>(chunk) * group_inverse) >> 31);
    }
};

template <class T, int kBits, bool kAligned>
struct Rows;

template <int kColumns>
struct Unpacked {
    float number[kColumns];
};

// Weights in the type of x.
template <class T>
struct Rows<T, 0, true> {
    using Number = T;
    using Raw = uint4;
    static constexpr int kColumns = sizeof(uint4) / sizeof(T);
    static constexpr bool kVector = true, kScaled = false;
    Matrix<T> m;

    __device__ Raw fetch(int64_t row, int chunk) const {
        return stream_load(reinterpret_cast<const uint4*>(static_cast<const T*>(m.data) + row * m.columns) + chunk);
    }
    __device__ static void numbers(const Raw& raw, float* out) { spread<T>(raw, out); }
};

template <class T>
struct Rows<T, 0, false> {
    using Number = T;
    static constexpr int kColumns = sizeof(uint4) / sizeof(T);
    static constexpr bool kVector = false, kScaled = false;
    using Raw = Unpacked<kColumns>;
    Matrix<T> m;

    __device__ Raw fetch(int64_t row, int chunk) const {
        Raw raw;
        const T* start = static_cast<const T*>(m.data) + row * m.columns;
        load_numbers<T, kColumns, false>(start, chunk * kColumns, m.columns, raw.number);
        return raw;
    }
    __device__ static void numbers(const Raw& raw, float* out) {
        CM_UNROLL
        for (int i = 0; i < kColumns; ++i) out[i] = raw.number[i];
    }
};

// An integer becomes a number in half precision by one "or" and one fused multiplication: 1024 + u has the bits of u as
// its lowest for u < 1024. `low` is the power of two of u's lowest bit there. What comes out is u - `zero`, divided by
// 2 * zero (16 for int4, 256 for int8), exactly: so sums of a few products with x stay in the range of half precision.
template <int kLow, int kZero>
__device__ inline __half2 half_pair(uint32_t bits) {
    __half2 pair;
    memcpy(static_cast<void*>(&pair), &bits, sizeof(bits));
    constexpr float kUnit = 1.0f / (kLow * 2 * kZero);
    return __hfma2(pair, __float2half2_rn(kUnit), __float2half2_rn(-1024.0f * kUnit - 0.5f));
}

constexpr uint32_t kHalf1024 = 0x64006400u;

// The eight int4 of a word: pair i has numbers i and i + 4. Flipping the sign bits turns -8..7 into 0..15, 8 too high.
__device__ inline void int4_pairs(uint32_t word, __half2* out) {
    CM_UNROLL
    for (int i = 0; i < 4; i += 2) {
        out[i] = half_pair<1, 8>((word & 0x000f000fu) ^ (kHalf1024 | 0x00080008u));
        out[i + 1] = half_pair<16, 8>((word & 0x00f000f0u) ^ (kHalf1024 | 0x00800080u));
        word >>= 8;
    }
}

// The four int8 of a word, likewise: pair i has numbers i and i + 2.
__device__ inline void int8_pairs(uint32_t word, __half2* out) {
    CM_UNROLL
    for (int i = 0; i < 2; ++i) out[i] = half_pair<1, 128>(((word >> (8 * i)) & 0x00ff00ffu) ^ (kHalf1024 | 0x00800080u));
}

template <class Words, class T>
struct Packed {
    Words words;
    T scale;
};

// Low-bit weights: words and a scale per group of columns; a chunk never crosses a group.
template <class T, int kBits>
struct Rows<T, kBits, true> {
    using Number = T;
    static constexpr int kColumns = 16;
    static constexpr bool kVector = true, kScaled = true;
    static constexpr int kWords = kColumns * kBits / 32, kPerWord = 32 / kBits, kApart = kPerWord / 2;
    using Words = std::conditional_t<kBits == 4, uint2, uint4>;
    using Raw = Packed<Words, T>;
    Matrix<T> m;

    __device__ Raw fetch(int64_t row, int chunk) const {
        const int64_t chunks = m.columns / kColumns;
        return Raw{stream_load(static_cast<const Words*>(m.data) + row * chunks + chunk),
                   m.scales[row * m.groups + m.group_of(chunk)]};
    }
    __device__ static float factor(const Raw& raw) { return to_float(raw.scale) * (kBits == 4 ? 16.0f : 256.0f); }

    __device__ static void numbers(const Raw& raw, float* out) {
        __half2 pair[kColumns / 2];
        halves(raw, pair);
        CM_UNROLL
        for (int i = 0; i < kColumns / 2; ++i) {
            const float2 both = __half22float2(pair[i]);
            const int first = i / kApart * kPerWord + i % kApart;
            out[first] = both.x;
            out[first + kApart] = both.y;
        }
    }

private:
    __device__ static void halves(const Raw& raw, __half2* out) {
        uint32_t words[kWords];
        memcpy(words, &raw.words, sizeof(words));
        CM_UNROLL
        for (int i = 0; i < kWords; ++i) {
            if constexpr (kBits == 4) {
                int4_pairs(words[i], out + i * kApart);
            } else {
                int8_pairs(words[i], out + i * kApart);
            }
        }
    }
};

template <class T, int kBits>
struct Rows<T, kBits, false> {
    using Number = T;
    static constexpr int kColumns = 16;
    static constexpr bool kVector = false, kScaled = false;
    using Raw = Unpacked<kColumns>;
    Matrix<T> m;

    __device__ Raw fetch(int64_t row, int chunk) const {
        constexpr int kPerWord = 32 / kBits;
        const int32_t* words = static_cast<const int32_t*>(m.data) + row * (m.columns / kPerWord);
        const T* scales = m.scales + row * (m.columns / m.group);
        Raw raw;
        for (int i = 0; i < kColumns; ++i) {
            const int column = chunk * kColumns + i;
            raw.number[i] = 0.0f;
            if (column < m.columns) {
                const uint32_t word = static_cast<uint32_t>(words[column / kPerWord]);
                const uint32_t top = word << (32 - kBits - column % kPerWord * kBits);
                const int code = static_cast<int32_t>(top) >> (32 - kBits);
                raw.number[i] = static_cast<float>(code) * to_float(scales[column / m.group]);
            }
        }
        return raw;
    }
    __device__ static void numbers(const Raw& raw, float* out) {
        for (int i = 0; i < kColumns; ++i) out[i] = raw.number[i];
    }
};

// Whether the aligned reader may be used: whole chunks, whole chunks to a group, 16-byte addresses.
inline bool fits_vectors(const void* weights, int32_t columns, int bits, int32_t group, int bytes) {
    const int chunk = bits ? 16 : 16 / bytes;
    return columns % chunk == 0 && aligned(weights, 16) && (bits == 0 || group % chunk == 0);
}

}  // namespace cm
