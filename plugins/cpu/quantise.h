// x -> which k a row keeps, and codes with one scale per group:  code = round(x / scale), scale = max |kept x| / 127 in one
// byte, / (127 * 128) in two: code = 128 high + low.
//
// Included by the file of every instruction set, in its namespace; plain loops that compilers turn into its vectors.

#include "exponential.h"

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

// The codes of the listed k of a group; a quad is filled up with 0.
static CM_INLINE void pick(const int8_t* codes, const int32_t* ids, int64_t begin, int numbers, int group, int8_t* out) {
    if (numbers == group && ids[numbers - 1] != ids[numbers - kQuad]) {  // all are listed, nothing is filled up
        std::memcpy(out, codes, numbers);
        return;
    }
    for (int i = 0; i < numbers; ++i) out[i] = codes[ids[i] - begin];
    for (int i = numbers - 1; i > numbers - kQuad && ids[i] == ids[numbers - kQuad]; --i) out[i] = 0;
}

// x of a group of `size`, 0 where k is not kept or behind the end; x itself where all are kept, else in `space`.
static CM_INLINE const float* group_of(const float* x, const uint64_t* keep, int64_t begin, int count, int size, float* space) {
    const auto bits_at = [&](int part) { return static_cast<uint32_t>(keep[(begin + part) >> 6] >> ((begin + part) & 63)); };
    uint32_t all = count == size ? ~uint32_t{0} : 0;
    for (int part = 0; part < count; part += 32) all &= bits_at(part);
    if (all == ~uint32_t{0}) return x + begin;
    for (int part = 0; part < size; part += 32) {
        const int left = count - part;
        if (left >= 32) {
            select(x + begin + part, bits_at(part), std::integral_constant<int, 32>(), space + part);
        } else {
            std::memset(space + part, 0, 32 * sizeof(float));
            if (left > 0) select(x + begin + part, bits_at(part), left, space + part);
        }
    }
    return space;
}

// As integers, magnitudes of floats are in the order of the floats, with Inf and NaN on top.
static CM_INLINE int32_t largest_of(const float* x, int size) {
    int32_t top = 0;
    for (int part = 0; part < size; part += 32)
        for (int i = part; i < part + 32; ++i) {
            const int32_t magnitude = bits_of(x[i]) & 0x7fffffff;
            top = magnitude > top ? magnitude : top;
        }
    return top;
}

// x * factor as whole numbers in one or two bytes, and what each byte adds up to.
template <int bytes>
static CM_INLINE void round_to(const float* x, float factor, int size, int8_t (*codes)[kMaxGroup], int32_t* total) {
    int32_t sums[bytes] = {};
    for (int part = 0; part < size; part += 32)
        for (int i = part; i < part + 32; ++i) {
            // 1.5 * 2^23 leaves no bits for a fraction: adding it rounds to the nearest whole number
            const int32_t code = bits_of(x[i] * factor + 12582912.0f) - bits_of(12582912.0f);
            const int32_t first = bytes == 1 ? code : (code + kHigh / 2) >> 7;
            codes[0][i] = static_cast<int8_t>(first), sums[0] += first;
            if constexpr (bytes == 2) codes[1][i] = static_cast<int8_t>(code - first * kHigh), sums[1] += code - first * kHigh;
        }
    for (int byte = 0; byte < bytes; ++byte) total[byte] = sums[byte];
}

template <int bytes>
static void quantise_to(const float* x, const Matrix& m, Rows& rows, int row, int64_t first_group, int64_t last_group) {
    const size_t listed = rows.ids.size();
    const uint64_t* keep = rows.keep.data() + row * rows.words;
    for (int64_t g = first_group; g < last_group; ++g) {
        const int64_t first = rows.first[g], quads = rows.first[g + 1] - first;
        float* scale = rows.scale.data() + row * rows.groups + g;
        int32_t* sum = rows.sum.data() + row * bytes * rows.groups + g;
        int8_t* out = rows.codes + row * bytes * listed + first * kQuad;
        *scale = 0.0f;
        for (int byte = 0; byte < bytes; ++byte) sum[byte * rows.groups] = 0;
        if (quads == 0) continue;
        const int64_t begin = g * m.group;
        float space[kMaxGroup];
        const float* kept = group_of(x, keep, begin, static_cast<int>(std::min<int64_t>(m.inputs - begin, m.group)), m.group, space);
        const int32_t* ids = rows.ids.data() + first * kQuad;
        const int numbers = static_cast<int>(quads) * kQuad;
        if (m.bits == 32) {
            float* out = rows.values.data() + row * listed + first * kQuad;
            for (int i = 0; i < numbers; ++i) out[i] = kept[ids[i] - begin];
            for (int i = numbers - 1; i > numbers - kQuad && ids[i] == ids[numbers - kQuad]; --i) out[i] = 0.0f;
            continue;
        }
        const int32_t top = largest_of(kept, m.group);
        const float largest = float_of(top);
        if (top >= 0x7f800000) *scale = std::numeric_limits<float>::quiet_NaN();  // so every output is NaN: nothing is hidden
        if (top >= 0x7f800000 || largest < kSmallest) {
            for (int byte = 0; byte < bytes; ++byte) std::memset(out + byte * listed, 0, numbers);
            continue;
        }
        constexpr float kTop = bytes == 1 ? 127.0f : 127.0f * kHigh;
        int8_t codes[bytes][kMaxGroup];
        int32_t total[bytes];
        round_to<bytes>(kept, kTop / largest, m.group, codes, total);
        *scale = largest / kTop;
        for (int byte = 0; byte < bytes; ++byte) {
            sum[byte * rows.groups] = total[byte];
            pick(codes[byte], ids, begin, numbers, m.group, out + byte * listed);
        }
    }
}

static void quantise(const float* x, const Matrix& m, Rows& rows, int row, int64_t first, int64_t last) {
    return rows.bytes == 1 ? quantise_to<1>(x, m, rows, row, first, last) : quantise_to<2>(x, m, rows, row, first, last);
}
