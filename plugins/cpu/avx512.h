// The registers of AVX-512 with VNNI, for avx512.cpp and amx.cpp.

struct Isa {
    using Int = __m512i;
    using Float = __m512;
    static constexpr int kLanes = 16, kRows = 4, kColumns = 4, kManyRows = 6, kManyColumns = 2;
    static constexpr bool kTwoCodes = true;

    static CM_INLINE Int all(int32_t v) { return _mm512_set1_epi32(v); }
    static CM_INLINE Float all(float v) { return _mm512_set1_ps(v); }
    static CM_INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
    static CM_INLINE void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
    // The first n numbers at p, 0 < n < kLanes; 0 behind them.
    static CM_INLINE Float some(const float* p, int n) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p); }
    // kLanes numbers of one byte, and the bfloat16 at p in every lane.
    static CM_INLINE Float bytes(const int8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    static CM_INLINE Float scale(const uint8_t* p) {
        int16_t bits;
        std::memcpy(&bits, p, sizeof bits);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_set1_epi16(bits), 16));
    }
    // The lanes of each of four registers, added up in one order.
    static CM_INLINE void add_up(const Float* four, float* out) {
        const auto halves = [](Float a, Float b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
        const __m512d ab = _mm512_castps_pd(halves(four[0], four[1])), cd = _mm512_castps_pd(halves(four[2], four[3]));
        const Float quarters = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
        const __m256 both = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
    }
    static CM_INLINE Float larger(Float a, Float b) { return _mm512_max_ps(a, b); }
    static CM_INLINE Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static CM_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    static CM_INLINE Float number(Int v) { return _mm512_cvtepi32_ps(v); }
    static CM_INLINE Float half(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static CM_INLINE void halve(Float v, uint16_t* p) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static CM_INLINE Float more(Float a, Float b) { return _mm512_add_ps(a, b); }
    static CM_INLINE Int more(Int a, Int b) { return _mm512_add_epi32(a, b); }
    static CM_INLINE Int times_high(Int v) { return _mm512_slli_epi32(v, 7); }
    static CM_INLINE Int less(Int a, Int b) { return _mm512_sub_epi32(a, b); }
    static CM_INLINE Int sixteenth(Int v) { return _mm512_srai_epi32(v, 4); }
    static CM_INLINE Int quad(const int8_t* x) {
        int32_t four;
        std::memcpy(&four, x, sizeof four);
        return _mm512_set1_epi32(four);
    }
    template <int bits>
    static CM_INLINE Int zeros(const uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    // A product of 16 bits with 16 takes one step, one of 32 with 32 three; the upper halves of `zeros` are 0.
    static CM_INLINE Int more_times(Int sums, Int zeros, int32_t n) {
        asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(zeros), "v"(_mm512_set1_epi32(n & 0xffff)));  // see dot
        return sums;
    }

    template <int bits>
    static CM_INLINE Int dot(Int sums, Int w, Int x) {
        // GCC 12 copies the sums of the intrinsic around its loops, at half the speed.
        asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(w), "v"(x));
        return sums;
    }
    static CM_INLINE void interleave(Int a, Int b, Int c, Int d, Int* out) {
        const Int ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
        const Int cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
        out[0] = _mm512_unpacklo_epi16(ab_low, cd_low), out[1] = _mm512_unpackhi_epi16(ab_low, cd_low);
        out[2] = _mm512_unpacklo_epi16(ab_high, cd_high), out[3] = _mm512_unpackhi_epi16(ab_high, cd_high);
    }
    // 64 bytes of each of four rows, interleaved: with 4 bits each still holds two codes.
    static CM_INLINE void pairs(const uint8_t* p0, const uint8_t* p1, const uint8_t* p2, const uint8_t* p3, Int* out) {
        interleave(_mm512_loadu_si512(p0), _mm512_loadu_si512(p1), _mm512_loadu_si512(p2), _mm512_loadu_si512(p3), out);
    }
    static CM_INLINE Int upper(Int both) { return _mm512_and_si512(both, _mm512_set1_epi8(static_cast<char>(0xf0))); }
    template <int bits>
    static CM_INLINE void unpack(const uint8_t* p0, const uint8_t* p1, const uint8_t* p2, const uint8_t* p3, Int* out) {
        pairs(p0, p1, p2, p3, out);
        if constexpr (bits == 8) return pairs(p0 + 64, p1 + 64, p2 + 64, p3 + 64, out + 4);
        const Int low = _mm512_set1_epi8(15);
        for (int i = 0; i < 4; ++i) {
            const Int both = out[i];
            out[i] = _mm512_and_si512(both, low);
            out[4 + i] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        }
    }
};
