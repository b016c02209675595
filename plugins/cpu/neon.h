// The registers of NEON, for neon.cpp, which includes this twice: without and with the dot product instruction.
//
// That instruction multiplies signed bytes, so 8-bit codes and their zero points are 128 less here.

struct Isa {
    using Int = int32x4_t;
    using Float = float32x4_t;
    static constexpr int kLanes = 4, kRows = 4, kColumns = 4, kManyRows = 4, kManyColumns = 2, kOffset = 128;
    static constexpr bool kTwoCodes = false;

    static CM_INLINE Int all(int32_t v) { return vdupq_n_s32(v); }
    static CM_INLINE Float all(float v) { return vdupq_n_f32(v); }
    static CM_INLINE Float load(const float* p) { return vld1q_f32(p); }
    static CM_INLINE void store(float* p, Float v) { vst1q_f32(p, v); }
    // The first n numbers at p, 0 < n < kLanes; 0 behind them.
    static CM_INLINE Float some(const float* p, int n) {
        float four[kLanes] = {};
        for (int i = 0; i < n; ++i) four[i] = p[i];
        return vld1q_f32(four);
    }
    // kLanes numbers of one byte, and the bfloat16 at p in every lane.
    static CM_INLINE Float bytes(const int8_t* p) {
        const int8x16_t four = vreinterpretq_s8_s32(quad(p));
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vget_low_s8(four)))));
    }
    static CM_INLINE Float scale(const uint8_t* p) {
        uint16_t bits;
        std::memcpy(&bits, p, sizeof bits);
        return vreinterpretq_f32_u32(vdupq_n_u32(static_cast<uint32_t>(bits) << 16));
    }
    // The lanes of each of four registers, added up in one order.
    static CM_INLINE void add_up(const Float* four, float* out) {
        vst1q_f32(out, vpaddq_f32(vpaddq_f32(four[0], four[1]), vpaddq_f32(four[2], four[3])));
    }
    static CM_INLINE Float larger(Float a, Float b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
    static CM_INLINE Float mul(Float a, Float b) { return vmulq_f32(a, b); }
    static CM_INLINE Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
    static CM_INLINE Float number(Int v) { return vcvtq_f32_s32(v); }
    static CM_INLINE Float half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
    static CM_INLINE void halve(Float v, uint16_t* p) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
    static CM_INLINE Float more(Float a, Float b) { return vaddq_f32(a, b); }
    static CM_INLINE Int more(Int a, Int b) { return vaddq_s32(a, b); }
    static CM_INLINE Int times_high(Int v) { return vshlq_n_s32(v, 7); }
    static CM_INLINE Int quad(const int8_t* x) {
        int32_t four;
        std::memcpy(&four, x, sizeof four);
        return vdupq_n_s32(four);
    }
    template <int bits>
    static CM_INLINE Int zeros(const uint8_t* p) {
        const int32_t offset = bits == 8 ? kOffset : 0;
        const int32_t four[] = {p[0] - offset, p[1] - offset, p[2] - offset, p[3] - offset};
        return vld1q_s32(four);
    }
    static CM_INLINE Int more_times(Int sums, Int zeros, int32_t n) { return vmlaq_n_s32(sums, zeros, n); }

    template <int bits>
    static CM_INLINE Int dot(Int sums, Int w, Int x) {
        return dot_of_bytes(sums, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
    }
    // 16 bytes of four rows -> outputs 16 q + 4 l .. + 3 in register 4 q of this lane l.
    static CM_INLINE void interleave(uint8x16_t a, uint8x16_t b, uint8x16_t c, uint8x16_t d, Int* out) {
        const uint16x8_t ab_low = vreinterpretq_u16_u8(vzip1q_u8(a, b)), ab_high = vreinterpretq_u16_u8(vzip2q_u8(a, b));
        const uint16x8_t cd_low = vreinterpretq_u16_u8(vzip1q_u8(c, d)), cd_high = vreinterpretq_u16_u8(vzip2q_u8(c, d));
        out[0] = vreinterpretq_s32_u16(vzip1q_u16(ab_low, cd_low)), out[4] = vreinterpretq_s32_u16(vzip2q_u16(ab_low, cd_low));
        out[8] = vreinterpretq_s32_u16(vzip1q_u16(ab_high, cd_high));
        out[12] = vreinterpretq_s32_u16(vzip2q_u16(ab_high, cd_high));
    }
    template <int bits>
    static CM_INLINE void unpack(const uint8_t* p0, const uint8_t* p1, const uint8_t* p2, const uint8_t* p3, Int* out) {
        const uint8x16_t low = vdupq_n_u8(15), sign = vdupq_n_u8(0x80);
        for (int lane = 0; lane < 4; ++lane) {
            const uint8_t *q0 = p0 + 16 * lane, *q1 = p1 + 16 * lane, *q2 = p2 + 16 * lane, *q3 = p3 + 16 * lane;
            const uint8x16_t a = vld1q_u8(q0), b = vld1q_u8(q1), c = vld1q_u8(q2), d = vld1q_u8(q3);
            if constexpr (bits == 8) {
                interleave(veorq_u8(a, sign), veorq_u8(b, sign), veorq_u8(c, sign), veorq_u8(d, sign), out + lane);
                interleave(veorq_u8(vld1q_u8(q0 + 64), sign), veorq_u8(vld1q_u8(q1 + 64), sign),
                           veorq_u8(vld1q_u8(q2 + 64), sign), veorq_u8(vld1q_u8(q3 + 64), sign), out + 16 + lane);
            } else {
                // bytes are interleaved while they still hold two codes each
                Int both[16];
                interleave(a, b, c, d, both);
                for (int i = 0; i < 16; i += 4) {
                    const uint8x16_t codes = vreinterpretq_u8_s32(both[i]);
                    out[lane + i] = vreinterpretq_s32_u8(vandq_u8(codes, low));
                    out[16 + lane + i] = vreinterpretq_s32_u8(vshrq_n_u8(codes, 4));
                }
            }
        }
    }
};
