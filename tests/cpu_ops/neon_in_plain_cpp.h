// The intrinsics of NEON that plugins/cpu uses, in plain C++, so that its file for ARM runs on the machine of the tests.
// Each is written from ARM's description of the instruction.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

template <class T, int n>
struct Lanes {
    T at[n];
};
using int8x8_t = Lanes<int8_t, 8>;
using int8x16_t = Lanes<int8_t, 16>;
using uint8x16_t = Lanes<uint8_t, 16>;
using int16x8_t = Lanes<int16_t, 8>;
using uint16x8_t = Lanes<uint16_t, 8>;
using int16x4_t = Lanes<int16_t, 4>;
using uint16x4_t = Lanes<uint16_t, 4>;
using float16x4_t = Lanes<uint16_t, 4>;
using int32x4_t = Lanes<int32_t, 4>;
using uint32x4_t = Lanes<uint32_t, 4>;
using float32x4_t = Lanes<float, 4>;

template <class V, class F>
static inline V lanes(F of) {
    V v;
    for (int i = 0; i < static_cast<int>(sizeof(v.at) / sizeof(v.at[0])); ++i) v.at[i] = of(i);
    return v;
}
template <class V, class W>
static inline V same_bits(W w) {
    V v;
    std::memcpy(&v, &w, sizeof v);
    return v;
}
template <class V, class T>
static inline V from(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

static inline int32x4_t vdupq_n_s32(int32_t x) { return {{x, x, x, x}}; }
static inline uint32x4_t vdupq_n_u32(uint32_t x) { return {{x, x, x, x}}; }
static inline float32x4_t vreinterpretq_f32_u32(uint32x4_t v) { return same_bits<float32x4_t>(v); }
static inline float32x4_t vdupq_n_f32(float x) { return {{x, x, x, x}}; }
static inline uint8x16_t vdupq_n_u8(uint8_t x) {
    return lanes<uint8x16_t>([&](int) { return x; });
}
static inline float32x4_t vld1q_f32(const float* p) { return from<float32x4_t>(p); }
static inline int32x4_t vld1q_s32(const int32_t* p) { return from<int32x4_t>(p); }
static inline uint8x16_t vld1q_u8(const uint8_t* p) { return from<uint8x16_t>(p); }
static inline uint16x4_t vld1_u16(const uint16_t* p) { return from<uint16x4_t>(p); }
static inline void vst1_u16(uint16_t* p, uint16x4_t v) { std::memcpy(p, v.at, sizeof v.at); }
static inline void vst1q_f32(float* p, float32x4_t v) { std::memcpy(p, v.at, sizeof v.at); }
static inline float32x4_t vaddq_f32(float32x4_t a, float32x4_t b) {
    return lanes<float32x4_t>([&](int i) { return a.at[i] + b.at[i]; });
}
static inline uint32x4_t vcgtq_f32(float32x4_t a, float32x4_t b) {
    return lanes<uint32x4_t>([&](int i) { return a.at[i] > b.at[i] ? ~0u : 0u; });
}
static inline float32x4_t vbslq_f32(uint32x4_t choose, float32x4_t a, float32x4_t b) {
    return lanes<float32x4_t>([&](int i) { return choose.at[i] ? a.at[i] : b.at[i]; });
}
static inline float32x4_t vmulq_f32(float32x4_t a, float32x4_t b) {
    return lanes<float32x4_t>([&](int i) { return a.at[i] * b.at[i]; });
}
static inline float32x4_t vfmaq_f32(float32x4_t sum, float32x4_t a, float32x4_t b) {  // the sum comes first
    return lanes<float32x4_t>([&](int i) { return std::fma(a.at[i], b.at[i], sum.at[i]); });
}
static inline float32x4_t vpaddq_f32(float32x4_t a, float32x4_t b) {
    return {{a.at[0] + a.at[1], a.at[2] + a.at[3], b.at[0] + b.at[1], b.at[2] + b.at[3]}};
}
static inline float32x4_t vcvtq_f32_s32(int32x4_t v) {
    return lanes<float32x4_t>([&](int i) { return static_cast<float>(v.at[i]); });
}
static inline float16x4_t vreinterpret_f16_u16(uint16x4_t v) { return v; }
static inline float32x4_t vcvt_f32_f16(float16x4_t v) {
    return lanes<float32x4_t>([&](int i) {
        const int exponent = v.at[i] >> 10 & 31, fraction = v.at[i] & 1023;
        const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                           : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                          : std::ldexp(1.0f * fraction, -24);
        return v.at[i] >> 15 ? -size : size;
    });
}
static inline uint16x4_t vreinterpret_u16_f16(float16x4_t v) { return v; }
static inline float16x4_t vcvt_f16_f32(float32x4_t v) {  // to the nearest, or the even one of two
    return lanes<float16x4_t>([&](int i) {
        const float size = std::fabs(v.at[i]);
        const int sign = std::signbit(v.at[i]) ? 0x8000 : 0;
        if (!(size < INFINITY)) return static_cast<uint16_t>(sign | (std::isnan(size) ? 0x7e00 : 0x7c00));
        const int unit = std::max(size > 0 ? std::ilogb(size) - 10 : -24, -24);  // 2^unit: the last bit
        const int bits = static_cast<int>(std::nearbyint(std::ldexp(size, -unit))) + (unit + 24) * 1024;
        return static_cast<uint16_t>(sign | std::min(bits, 0x7c00));
    });
}
static inline int32x4_t vmlaq_n_s32(int32x4_t sums, int32x4_t v, int32_t x) {
    return lanes<int32x4_t>([&](int i) { return sums.at[i] + v.at[i] * x; });
}
static inline int32x4_t vshlq_n_s32(int32x4_t v, int n) {
    return lanes<int32x4_t>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(v.at[i]) << n); });
}
static inline int32x4_t vaddq_s32(int32x4_t a, int32x4_t b) {
    return lanes<int32x4_t>([&](int i) { return a.at[i] + b.at[i]; });
}
static inline int8x16_t vreinterpretq_s8_s32(int32x4_t v) { return same_bits<int8x16_t>(v); }
static inline uint8x16_t vreinterpretq_u8_s32(int32x4_t v) { return same_bits<uint8x16_t>(v); }
static inline int32x4_t vreinterpretq_s32_u8(uint8x16_t v) { return same_bits<int32x4_t>(v); }
static inline uint16x8_t vreinterpretq_u16_u8(uint8x16_t v) { return same_bits<uint16x8_t>(v); }
static inline int32x4_t vreinterpretq_s32_u16(uint16x8_t v) { return same_bits<int32x4_t>(v); }
static inline int8x8_t vget_low_s8(int8x16_t v) { return from<int8x8_t>(v.at); }
static inline int16x4_t vget_low_s16(int16x8_t v) { return from<int16x4_t>(v.at); }
static inline int16x8_t vmovl_s8(int8x8_t v) {
    return lanes<int16x8_t>([&](int i) { return v.at[i]; });
}
static inline int32x4_t vmovl_s16(int16x4_t v) {
    return lanes<int32x4_t>([&](int i) { return v.at[i]; });
}
static inline int16x8_t vmull_s8(int8x8_t a, int8x8_t b) {
    return lanes<int16x8_t>([&](int i) { return static_cast<int16_t>(a.at[i] * b.at[i]); });
}
static inline int16x8_t vmull_high_s8(int8x16_t a, int8x16_t b) { return vmull_s8(from<int8x8_t>(a.at + 8), from<int8x8_t>(b.at + 8)); }
static inline int32x4_t vpaddlq_s16(int16x8_t v) {
    return lanes<int32x4_t>([&](int i) { return v.at[2 * i] + v.at[2 * i + 1]; });
}
static inline int32x4_t vpaddq_s32(int32x4_t a, int32x4_t b) {
    return {{a.at[0] + a.at[1], a.at[2] + a.at[3], b.at[0] + b.at[1], b.at[2] + b.at[3]}};
}
static inline int32x4_t vdotq_s32(int32x4_t sums, int8x16_t a, int8x16_t b) {
    for (int i = 0; i < 16; ++i) sums.at[i / 4] += a.at[i] * b.at[i];
    return sums;
}
template <class V>
static inline V zip(V a, V b, int from) {
    return lanes<V>([&](int i) { return (i % 2 ? b : a).at[from + i / 2]; });
}
static inline uint8x16_t vzip1q_u8(uint8x16_t a, uint8x16_t b) { return zip(a, b, 0); }
static inline uint8x16_t vzip2q_u8(uint8x16_t a, uint8x16_t b) { return zip(a, b, 8); }
static inline uint16x8_t vzip1q_u16(uint16x8_t a, uint16x8_t b) { return zip(a, b, 0); }
static inline uint16x8_t vzip2q_u16(uint16x8_t a, uint16x8_t b) { return zip(a, b, 4); }
static inline uint8x16_t vandq_u8(uint8x16_t a, uint8x16_t b) {
    return lanes<uint8x16_t>([&](int i) { return static_cast<uint8_t>(a.at[i] & b.at[i]); });
}
static inline uint8x16_t veorq_u8(uint8x16_t a, uint8x16_t b) {
    return lanes<uint8x16_t>([&](int i) { return static_cast<uint8_t>(a.at[i] ^ b.at[i]); });
}
static inline uint8x16_t vshrq_n_u8(uint8x16_t v, int n) {
    return lanes<uint8x16_t>([&](int i) { return static_cast<uint8_t>(v.at[i] >> n); });
}
