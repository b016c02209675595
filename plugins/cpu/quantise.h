// x -> which k a row keeps, and codes with one scale per group:  code = round(x / scale), scale = max |kept x| / 127 in one
// byte, / (127 * 128) in two: code = 128 high + low.
//
// Included by the file of every instruction set, in its namespace; plain loops that compilers turn into its vectors.

// A group whose largest number is below this counts as zeros: what it is divided by would overflow.
constexpr float kSmallest = 1e-36f;

template <class Count>
static CM_INLINE uint64_t kept_of(const float* x, const float* norm, float threshold, Count count) {
    uint8_t flags[64] = {};
    for (int i = 0; i < count; ++i) flags[i] = !(std::fabs(x[i]) * norm[i] < threshold);
    uint64_t word = 0;
    for (int byte = 0; byte < 8; ++byte) {
        uint64_t eight;  // bytes of 0 and 1 -> 8 bits: the product moves bit 0 of byte i to bit 56 + i (little-endian)
        std::memcpy(&eight, flags + 8 * byte, sizeof eight);
        word |= ((eight * 0x0102040810204080u) >> 56) << (8 * byte);
    }
    return word;
}

static void keep(const float* x, const float* norm, float threshold, int64_t inputs, uint64_t* bits) {
    for (int64_t begin = 0; begin < inputs; begin += 64, ++bits) {
        const int count = static_cast<int>(inputs - begin < 64 ? inputs - begin : 64);
        if (norm == nullptr) {
            *bits = count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
        } else if (count == 64) {  // a number of turns that compilers know
            *bits = kept_of(x + begin, norm + begin, threshold, std::integral_constant<int, 64>());
        } else {
            *bits = kept_of(x + begin, norm + begin, threshold, count);
        }
    }
}

// x where the bit is set, 0 elsewhere.
template <class Count>
static CM_INLINE void select(const float* x, uint32_t bits, Count count, float* out) {
    for (int i = 0; i < count; ++i) out[i] = bits >> i & 1 ? x[i] : 0.0f;
}

static CM_INLINE int32_t bits_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static CM_INLINE float float_of(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// The codes of the listed k of a group; a quad is filled up with 0.
static CM_INLINE void pick(const int8_t* codes, const int32_t* ids, int64_t begin, int numbers, int group, int8_t* out) {
    if (numbers == group && ids[numbers - 1] != ids[numbers - kQuad]) {  // all are listed, nothing is filled up
        std::memcpy(out, codes, numbers);
        return;
    }
    for (int i = 0; i < numbers; ++i) out[i] = codes[ids[i] - begin];
    for (int i = numbers - 1; i > numbers - kQuad && ids[i] == ids[numbers - kQuad]; --i) out[i] = 0;
}

static void quantise(const float* x, const Matrix& m, Rows& rows, int row) {
    const size_t listed = rows.ids.size();
    const uint64_t* keep = rows.keep.data() + row * rows.words;
    for (int64_t g = 0; g < rows.groups; ++g) {
        const int64_t first = rows.first[g], quads = rows.first[g + 1] - first;
        float* scale = rows.scale.data() + row * rows.groups + g;
        int32_t* sum = rows.sum.data() + row * rows.bytes * rows.groups + g;
        int8_t* out = rows.codes.data() + row * rows.bytes * listed + first * kQuad;
        *scale = 0.0f;
        for (int byte = 0; byte < rows.bytes; ++byte) sum[byte * rows.groups] = 0;
        if (quads == 0) continue;
        const int64_t begin = g * m.group;
        const int count = static_cast<int>(m.inputs - begin < m.group ? m.inputs - begin : m.group);
        float kept[kMaxGroup] = {};
        for (int part = 0; part < count; part += 32) {
            const int64_t at = begin + part;
            const uint32_t bits = static_cast<uint32_t>(keep[at >> 6] >> (at & 63));
            if (count - part >= 32) {
                select(x + at, bits, std::integral_constant<int, 32>(), kept + part);
            } else {
                select(x + at, bits, count - part, kept + part);
            }
        }
        const int32_t* ids = rows.ids.data() + first * kQuad;
        const int numbers = static_cast<int>(quads) * kQuad;
        if (m.bits == 32) {
            float* out = rows.values.data() + row * listed + first * kQuad;
            for (int i = 0; i < numbers; ++i) out[i] = kept[ids[i] - begin];
            for (int i = numbers - 1; i > numbers - kQuad && ids[i] == ids[numbers - kQuad]; --i) out[i] = 0.0f;
            continue;
        }
        // As integers, magnitudes of floats are in the order of the floats, with Inf and NaN on top.
        int32_t top = 0;
        for (int part = 0; part < m.group; part += 32)
            for (int i = part; i < part + 32; ++i) {
                const int32_t magnitude = bits_of(kept[i]) & 0x7fffffff;
                top = magnitude > top ? magnitude : top;
            }
        const float largest = float_of(top);
        if (top >= 0x7f800000) *scale = std::numeric_limits<float>::quiet_NaN();  // so every output is NaN: nothing is hidden
        if (top >= 0x7f800000 || largest < kSmallest) {
            for (int byte = 0; byte < rows.bytes; ++byte) std::memset(out + byte * listed, 0, numbers);
            continue;
        }
        const float top_code = rows.bytes == 1 ? 127.0f : 127.0f * kHigh, inverse = top_code / largest;
        int8_t codes[kMaxGroup], low[kMaxGroup];
        int32_t total = 0, total_low = 0;
        for (int part = 0; part < m.group; part += 32)
            for (int i = part; i < part + 32; ++i) {
                // 1.5 * 2^23 leaves no bits for a fraction: adding it rounds to the nearest whole number
                const int32_t code = bits_of(kept[i] * inverse + 12582912.0f) - bits_of(12582912.0f);
                const int32_t high = rows.bytes == 1 ? code : (code + kHigh / 2) >> 7, rest = code - high * kHigh;
                codes[i] = static_cast<int8_t>(high), low[i] = static_cast<int8_t>(rest);
                total += high, total_low += rest;
            }
        *scale = largest / top_code, *sum = total;
        pick(codes, ids, begin, numbers, m.group, out);
        if (rows.bytes == 1) continue;
        sum[rows.groups] = total_low;
        pick(low, ids, begin, numbers, m.group, out + listed);
    }
}
