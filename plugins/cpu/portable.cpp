// Plain C++, for processors without a file of their own: right, and not fast.
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels.h"
#include "target.h"

namespace cm::cpu::portable {

struct Isa {
    static constexpr int kLanes = 4, kRows = 2, kColumns = 4, kManyRows = 2, kManyColumns = 2;
    static constexpr bool kTwoCodes = false;
    struct Int {
        int32_t lane[kLanes];
    };
    struct Float {
        float lane[kLanes];
    };

    template <class Vector, class Function>
    static CM_INLINE Vector each(Function of) {
        Vector v;
        for (int i = 0; i < kLanes; ++i) v.lane[i] = of(i);
        return v;
    }
    static CM_INLINE Int all(int32_t v) { return {{v, v, v, v}}; }
    static CM_INLINE Float all(float v) { return {{v, v, v, v}}; }
    static CM_INLINE Float load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
    static CM_INLINE void store(float* p, Float v) { std::memcpy(p, v.lane, sizeof v.lane); }
    // The first n numbers at p, 0 < n < kLanes; 0 behind them.
    static CM_INLINE Float some(const float* p, int n) {
        return each<Float>([&](int i) { return i < n ? p[i] : 0.0f; });
    }
    // kLanes numbers of one byte, and the bfloat16 at p in every lane.
    static CM_INLINE Float bytes(const int8_t* p) {
        return each<Float>([&](int i) { return static_cast<float>(p[i]); });
    }
    static CM_INLINE Float scale(const uint8_t* p) {
        uint16_t upper;
        std::memcpy(&upper, p, sizeof upper);
        const uint32_t bits = static_cast<uint32_t>(upper) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return all(value);
    }
    // The lanes of each of four registers, added up in one order.
    static CM_INLINE void add_up(const Float* four, float* out) {
        for (int i = 0; i < 4; ++i) out[i] = (four[i].lane[0] + four[i].lane[1]) + (four[i].lane[2] + four[i].lane[3]);
    }
    static CM_INLINE Float larger(Float a, Float b) {
        return each<Float>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    static CM_INLINE Float mul(Float a, Float b) {
        return each<Float>([&](int i) { return a.lane[i] * b.lane[i]; });
    }
    static CM_INLINE Float fma(Float a, Float b, Float c) {
        return each<Float>([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
    }
    static CM_INLINE Float number(Int v) {
        return each<Float>([&](int i) { return static_cast<float>(v.lane[i]); });
    }
    static CM_INLINE float half_of(uint16_t half) {
        const uint32_t exponent = half >> 10 & 31, fraction = half & 1023, sign = half >> 15;
        float value = exponent == 31 ? (fraction ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity())
                      : exponent     ? std::ldexp(static_cast<float>(1024 + fraction), static_cast<int>(exponent) - 25)
                                     : std::ldexp(static_cast<float>(fraction), -24);
        return sign ? -value : value;
    }
    static CM_INLINE Float half(const uint16_t* p) {
        return each<Float>([&](int i) { return half_of(p[i]); });
    }
    // To the nearest, or the even one of two; beyond 65519 infinite.
    static CM_INLINE uint16_t half_from(float value) {
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
        if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
        if (size >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
        // below 2^-14 a multiple of 2^-24: a float of 1.5 * 2^23 has no bits behind the point
        const float steps = std::fabs(value) * 16777216.0f + 12582912.0f;
        if (size < 0x38800000) return static_cast<uint16_t>(sign | static_cast<uint32_t>(steps - 12582912.0f));
        return static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
    }
    static CM_INLINE void halve(Float v, uint16_t* p) {
        for (int i = 0; i < kLanes; ++i) p[i] = half_from(v.lane[i]);
    }
    static CM_INLINE Float more(Float a, Float b) {
        return each<Float>([&](int i) { return a.lane[i] + b.lane[i]; });
    }
    static CM_INLINE Int more(Int a, Int b) {
        return each<Int>([&](int i) { return a.lane[i] + b.lane[i]; });
    }
    static CM_INLINE Int times_high(Int v) {
        return each<Int>([&](int i) { return v.lane[i] * kHigh; });
    }
    static CM_INLINE Int quad(const int8_t* x) {
        int32_t four;
        std::memcpy(&four, x, sizeof four);
        return all(four);
    }
    template <int bits>
    static CM_INLINE Int zeros(const uint8_t* p) {
        return each<Int>([&](int i) { return p[i]; });
    }
    static CM_INLINE Int more_times(Int sums, Int zeros, int32_t n) {
        return each<Int>([&](int i) { return sums.lane[i] + zeros.lane[i] * n; });
    }
    template <int bits>
    static CM_INLINE Int dot(Int sums, Int w, Int x) {
        uint8_t codes[4 * kLanes];
        int8_t factors[4 * kLanes];
        std::memcpy(codes, w.lane, sizeof codes);
        std::memcpy(factors, x.lane, sizeof factors);
        for (int i = 0; i < 4 * kLanes; ++i) sums.lane[i / 4] += codes[i] * factors[i];
        return sums;
    }
    // Output o of a panel lies in half o / 64 (4 bits: of a byte, 8 bits: of the row), there at place o / 4 % 4 * 16 + o / 16 % 4 * 4 + o % 4.
    template <int bits>
    static CM_INLINE void unpack(const uint8_t* p0, const uint8_t* p1, const uint8_t* p2, const uint8_t* p3, Int* out) {
        for (int output = 0; output < kPanel; ++output) {
            const int half = output / 64, place = output / 4 % 4 * 16 + output / 16 % 4 * 4 + output % 4;
            const auto code = [&](const uint8_t* p) -> uint8_t {
                return bits == 8 ? p[half * 64 + place] : (half ? p[place] >> 4 : p[place] & 15);
            };
            const uint8_t four[4] = {code(p0), code(p1), code(p2), code(p3)};
            std::memcpy(&out[output / kLanes].lane[output % kLanes], four, sizeof four);
        }
    }
};

#include "quantise.h"
#include "activate.h"
#include "product.h"
#include "attention.h"
#include "rows.h"

}  // namespace cm::cpu::portable

namespace cm::cpu {
static bool usable() { return true; }
const Kernels kPortable = {"portable", usable, portable::keep, portable::quantise, portable::multiply, portable::gate,
                           portable::add_parts, portable::normalise, portable::remainder, portable::turn, portable::attend, portable::round,
                           portable::widen_row};
}  // namespace cm::cpu
