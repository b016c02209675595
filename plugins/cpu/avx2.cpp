// AVX2, and AVX-VNNI where it is there: every x86 of the last ten years, and those of Intel that have no AVX-512.
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels.h"
#include "target.h"

CM_TARGET_BEGIN("avx2,fma,f16c")
namespace cm::cpu::avx2 {

// Four int8 of x for each lane, and the two pairs of int16 that products with 8-bit codes take.
struct Vector {
    using Int = __m256i;
    using Float = __m256;
    static constexpr int kLanes = 8, kRows = 4, kColumns = 2, kManyRows = 2, kManyColumns = 2;
    static constexpr bool kTwoCodes = false;

    static CM_INLINE Int all(int32_t v) { return _mm256_set1_epi32(v); }
    static CM_INLINE Float all(float v) { return _mm256_set1_ps(v); }
    static CM_INLINE Float load(const float* p) { return _mm256_loadu_ps(p); }
    static CM_INLINE void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
    // The first n numbers at p, 0 < n < kLanes; 0 behind them.
    static CM_INLINE Float some(const float* p, int n) {
        const Int lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes));
    }
    // kLanes numbers of one byte, and the bfloat16 at p in every lane.
    static CM_INLINE Float bytes(const int8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
    static CM_INLINE Float scale(const uint8_t* p) {
        int16_t bits;
        std::memcpy(&bits, p, sizeof bits);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_set1_epi16(bits), 16));
    }
    // The lanes of each of four registers, added up in one order.
    static CM_INLINE void add_up(const Float* four, float* out) {
        const Float both = _mm256_hadd_ps(_mm256_hadd_ps(four[0], four[1]), _mm256_hadd_ps(four[2], four[3]));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
    }
    static CM_INLINE Float larger(Float a, Float b) { return _mm256_max_ps(a, b); }
    static CM_INLINE Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
    static CM_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
    static CM_INLINE Float number(Int v) { return _mm256_cvtepi32_ps(v); }
    static CM_INLINE Float half(const uint16_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static CM_INLINE void halve(Float v, uint16_t* p) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static CM_INLINE Float more(Float a, Float b) { return _mm256_add_ps(a, b); }
    static CM_INLINE Int more(Int a, Int b) { return _mm256_add_epi32(a, b); }
    static CM_INLINE Int times_high(Int v) { return _mm256_slli_epi32(v, 7); }
    static CM_INLINE Int quad(const int8_t* x) {
        int32_t four;
        std::memcpy(&four, x, sizeof four);
        return _mm256_set1_epi32(four);
    }
    template <int bits>
    static CM_INLINE Int zeros(const uint8_t* p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
    // A product of 16 bits with 16 takes one step, one of 32 with 32 several; the upper halves of `zeros` are 0.
    static CM_INLINE Int more_times(Int sums, Int zeros, int32_t n) {
        return more(sums, _mm256_madd_epi16(zeros, _mm256_set1_epi32(n & 0xffff)));
    }

    template <int bits>
    static CM_INLINE Int dot(Int sums, Int w, Int x) {
        if constexpr (bits == 4) {  // 2 * 15 * 127 fits into the 16 bits of the first step
            return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
        } else {  // 2 * 255 * 127 does not: even and odd bytes are widened first
            const Int even = _mm256_and_si256(w, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w, 8);
            const Int x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
            return _mm256_add_epi32(sums, _mm256_add_epi32(_mm256_madd_epi16(even, x_even), _mm256_madd_epi16(odd, x_odd)));
        }
    }
    // 32 bytes of four rows -> outputs 16 q + 4 l + w: registers 2 q of this half, l = 0, 1 (first) or 2, 3 (second half).
    static CM_INLINE void interleave(Int a, Int b, Int c, Int d, Int* out) {
        const Int ab_low = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
        const Int cd_low = _mm256_unpacklo_epi8(c, d), cd_high = _mm256_unpackhi_epi8(c, d);
        out[0] = _mm256_unpacklo_epi16(ab_low, cd_low), out[2] = _mm256_unpackhi_epi16(ab_low, cd_low);
        out[4] = _mm256_unpacklo_epi16(ab_high, cd_high), out[6] = _mm256_unpackhi_epi16(ab_high, cd_high);
    }
    template <int bits>
    static CM_INLINE void unpack(const uint8_t* p0, const uint8_t* p1, const uint8_t* p2, const uint8_t* p3, Int* out) {
        const auto at = [](const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
        const Int low = _mm256_set1_epi8(15);
        for (int part = 0; part < 2; ++part) {
            const Int a = at(p0 + 32 * part), b = at(p1 + 32 * part), c = at(p2 + 32 * part), d = at(p3 + 32 * part);
            if constexpr (bits == 8) {
                interleave(a, b, c, d, out + part);
                interleave(at(p0 + 64 + 32 * part), at(p1 + 64 + 32 * part), at(p2 + 64 + 32 * part), at(p3 + 64 + 32 * part),
                           out + 8 + part);
            } else {
                // bytes are interleaved while they still hold two codes each
                Int both[8];
                interleave(a, b, c, d, both);
                for (int i = 0; i < 8; i += 2) {
                    out[part + i] = _mm256_and_si256(both[i], low);
                    out[8 + part + i] = _mm256_and_si256(_mm256_srli_epi16(both[i], 4), low);
                }
            }
        }
    }
};

#include "quantise.h"
#include "activate.h"

struct Isa : Vector {};
#include "product.h"
#include "attention.h"
#include "rows.h"

}  // namespace cm::cpu::avx2
CM_TARGET_END

CM_TARGET_BEGIN("avx2,fma,f16c,avxvnni")
namespace cm::cpu::avx_vnni {

struct Isa : avx2::Vector {
    template <int bits>
    static CM_INLINE Int dot(Int sums, Int w, Int x) {
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(w), "x"(x));  // see avx512.cpp
        return sums;
    }
};

#include "product.h"

}  // namespace cm::cpu::avx_vnni
CM_TARGET_END

namespace cm::cpu {
static bool usable() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
static bool usable_with_vnni() {
    uint32_t a, b, c, d;
    __cpuid_count(7, 1, a, b, c, d);
    return usable() && (a >> 4 & 1);  // __builtin_cpu_supports of 2022 does not know its name
}
extern const Kernels kAvx2, kAvxVnni;
const Kernels kAvx2 = {"avx2", usable, avx2::keep, avx2::quantise, avx2::multiply, avx2::gate, avx2::add_parts,
                       avx2::normalise, avx2::remainder, avx2::turn, avx2::attend, avx2::round, avx2::widen_row};
const Kernels kAvxVnni = {"avx-vnni", usable_with_vnni, avx2::keep, avx2::quantise, avx_vnni::multiply, avx2::gate, avx2::add_parts,
                          avx2::normalise, avx2::remainder, avx2::turn, avx2::attend, avx2::round, avx2::widen_row};
}  // namespace cm::cpu
#endif
