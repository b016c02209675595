// Attention of a few queries over rows of a cache, for one instruction set: included behind activate.h and product.h.
//
//     score[h, r] = q[h] . key[r] + added[r]     share = e^(score - largest)     y[h] = sum over r share[h, r] value[r] / sum share[h]
//
// Each head of each token is computed by itself, row by row in the order of the list, with steps that depend on nothing but
// its length. So its numbers are the same whoever is read beside it and wherever in the cache its rows begin. Rows of halves or
// bytes become floats in registers, in one and the same way for every head.

#include "shares.h"

constexpr int kFour = 4;       // rows whose scores are computed at once
constexpr int kTileRows = 64;  // of values that every head adds up before the next ones: 16 KB of the first cache with a width of 64

static void turn(const Turn& t, const float* __restrict x, float* __restrict out) {
    float head[kMaxHead];
    for (int i = 0; i < t.width; ++i) head[i] = x[i];
    if (t.bias != nullptr)
        for (int i = 0; i < t.width; ++i) head[i] += t.bias[i];
    if (t.norm != nullptr) {
        const int filled = (t.width + kStep - 1) / kStep * kStep;
        for (int i = t.width; i < filled; ++i) head[i] = 0.0f;
        const float mean = add_all(filled, [&](int64_t i) { return head[i] * head[i]; }) / static_cast<float>(t.width);
        const float inverse = 1.0f / std::sqrt(mean + t.epsilon);
        for (int i = 0; i < t.width; ++i) head[i] = head[i] * inverse * t.norm[i];
    }
    const int half = t.rotary / 2;
    for (int i = 0; i < half; ++i) out[i] = (head[i] * t.cos[i] - head[half + i] * t.sin[i]) * t.factor;
    for (int i = 0; i < half; ++i)
        out[half + i] = (head[half + i] * t.cos[t.second + i] + head[i] * t.sin[t.second + i]) * t.factor;
    for (int i = t.rotary; i < t.width; ++i) out[i] = head[i] * t.factor;
}

// ---------------------------------------------------------------- rows

// code = round(x / scale), scale = max |x| / 127 as a bfloat16. That is off by less than half a code of 127, so the largest
// number always gets 127, and its scale again when the row that comes back is rounded once more.
static void round_to_bytes(const float* x, int width, uint8_t* row) {
    for (int begin = 0; begin < width; begin += kRounded) {
        const int count = std::min(kRounded, width - begin);
        float numbers[kRounded] = {};
        std::memcpy(numbers, x + begin, count * sizeof(float));
        const int32_t top = largest_of(numbers, kRounded);
        uint32_t bits = 0;
        float factor = 0.0f;
        if (top >= 0x7f800000) {
            bits = 0x7fc00000;  // so that all of them are NaN: nothing is hidden
        } else if (float_of(top) >= kSmallest) {
            bits = static_cast<uint32_t>(bits_of(float_of(top) / 127.0f));
            bits += 0x7fff + (bits >> 16 & 1);
            factor = 1.0f / float_of(static_cast<int32_t>(bits & 0xffff0000u));
        }
        int8_t codes[1][kMaxGroup] = {};
        int32_t total;
        if (factor != 0.0f) round_to<1>(numbers, factor, kRounded, codes, &total);
        std::memcpy(row + begin, codes, count);
        const uint16_t scale = static_cast<uint16_t>(bits >> 16);
        std::memcpy(row + width + begin / kRounded * 2, &scale, sizeof scale);
    }
}

// float16, to the nearest, or the even one of two. A finite number stays finite: some models have keys of hundreds with a few far
// larger ones, and one that became infinite would make every score of its channel infinite or NaN; as the largest float16 it still
// outweighs the others. What was infinite or NaN before is so afterwards: nothing is hidden.
static void round_to_halves(const float* x, int width, uint8_t* row) {
    constexpr float kMost = 65504.0f;
    for (int begin = 0; begin < width; begin += Isa::kLanes) {
        const int count = std::min(Isa::kLanes, width - begin);
        float numbers[Isa::kLanes] = {};
        for (int i = 0; i < count; ++i) {
            const float v = x[begin + i];
            numbers[i] = std::fabs(v) < std::numeric_limits<float>::infinity() ? std::min(std::max(v, -kMost), kMost) : v;
        }
        uint16_t halves[Isa::kLanes];
        Isa::halve(Isa::load(numbers), halves);
        std::memcpy(row + begin * sizeof *halves, halves, count * sizeof *halves);
    }
}

static void round(Cells cells, const float* x, int width, uint8_t* row) {
    return cells == Cells::kHalf ? round_to_halves(x, width, row) : round_to_bytes(x, width, row);
}

// A register of numbers of a row, from number `at` on; where the row ends within it, 0 behind the end.
template <Cells cells, bool whole>
static CM_INLINE Float numbers_of(const uint8_t* row, int width, int at) {
    static_assert(kRounded % Isa::kLanes == 0);
    if constexpr (cells == Cells::kFloat) {
        const float* x = reinterpret_cast<const float*>(row) + at;
        return whole ? Isa::load(x) : Isa::some(x, width - at);
    } else {
        using Cell = std::conditional_t<cells == Cells::kHalf, uint16_t, int8_t>;
        Cell rest[Isa::kLanes];
        const Cell* there = reinterpret_cast<const Cell*>(row) + at;
        if (!whole)
            for (int i = 0; i < Isa::kLanes; ++i) rest[i] = at + i < width ? there[i] : 0;
        if constexpr (cells == Cells::kHalf) return Isa::half(whole ? there : rest);
        else return Isa::mul(Isa::bytes(whole ? there : rest), Isa::scale(row + width + at / kRounded * 2));
    }
}

template <Cells cells>
static void widen_cells(const uint8_t* row, int width, float* x) {
    int at = 0;
    for (; at + Isa::kLanes <= width; at += Isa::kLanes) Isa::store(x + at, numbers_of<cells, true>(row, width, at));
    float rest[Isa::kLanes];
    if (at < width) Isa::store(rest, numbers_of<cells, false>(row, width, at)), std::memcpy(x + at, rest, (width - at) * sizeof(float));
}

static void widen_row(Cells cells, const uint8_t* row, int width, float* x) {
    return cells == Cells::kHalf ? widen_cells<Cells::kHalf>(row, width, x) : widen_cells<Cells::kByte>(row, width, x);
}

// ---------------------------------------------------------------- scores

template <Cells cells, int n, bool whole>
static CM_INLINE void add_products(const Attention& a, int head, const uint8_t* const* keys, int at, Float (*sums)[kFour]) {
    Float k[kFour];
    for (int r = 0; r < kFour; ++r) k[r] = numbers_of<cells, whole>(keys[r], a.width, at);
    for (int h = 0; h < n; ++h) {
        const Float q = Isa::load(a.q + (head + h) * a.apart + at);
        for (int r = 0; r < kFour; ++r) sums[h][r] = Isa::fma(q, k[r], sums[h][r]);
    }
}

// Of n heads at a time, and of what is left with smaller n, for four rows.
template <Cells cells, int n>
static CM_INLINE void scores_of(const Attention& a, int head, const uint8_t* const* keys, float* out, size_t stride) {
    for (; head + n <= a.heads; head += n) {
        Float sums[n][kFour];
        for (int h = 0; h < n; ++h)
            for (int r = 0; r < kFour; ++r) sums[h][r] = Isa::all(0.0f);
        int at = 0;
        for (; at + Isa::kLanes <= a.width; at += Isa::kLanes) add_products<cells, n, true>(a, head, keys, at, sums);
        if (at < a.width) add_products<cells, n, false>(a, head, keys, at, sums);
        for (int h = 0; h < n; ++h) Isa::add_up(sums[h], out + (head + h) * stride);
    }
    if constexpr (n > 1) {
        if (head < a.heads) scores_of<cells, n - 1>(a, head, keys, out, stride);
    }
}

// The same of turned keys, without sums over lanes: kStep * `steps` rows from `row` on.
template <int n, int steps>
static CM_INLINE void scores_of_turned(const Attention& a, int head, int64_t row, size_t stride) {
    constexpr int kColumns = kStep / Isa::kLanes * steps;
    for (; head + n <= a.heads; head += n) {
        Float sums[n][kColumns];
        for (int h = 0; h < n; ++h)
            for (int c = 0; c < kColumns; ++c) sums[h][c] = Isa::all(0.0f);
        const float* keys = a.turned + row * a.width;
        for (int i = 0; i < a.width; ++i, keys += kStep) {
            Float k[kColumns];
            for (int c = 0; c < kColumns; ++c)
                k[c] = Isa::load(keys + static_cast<size_t>(c * Isa::kLanes / kStep) * a.width * kStep + c * Isa::kLanes % kStep);
            for (int h = 0; h < n; ++h) {
                const Float q = Isa::all(a.q[(head + h) * a.apart + i]);
                for (int c = 0; c < kColumns; ++c) sums[h][c] = Isa::fma(q, k[c], sums[h][c]);
            }
        }
        for (int h = 0; h < n; ++h)
            for (int c = 0; c < kColumns; ++c) Isa::store(a.scores + (head + h) * stride + row + c * Isa::kLanes, sums[h][c]);
    }
    if constexpr (n > 1) {
        if (head < a.heads) scores_of_turned<n - 1, steps>(a, head, row, stride);
    }
}

// ---------------------------------------------------------------- values

// y += shares * values, of n heads and `columns` registers from number `at` of a head.
template <Cells cells, int n, int columns, bool whole>
static CM_INLINE void add_values(const Attention& a, int head, int at, int64_t begin, int64_t end, size_t stride) {
    Float sums[n][columns];
    for (int h = 0; h < n; ++h)
        for (int c = 0; c < columns; ++c) sums[h][c] = Isa::load(a.y + (head + h) * a.apart + at + c * Isa::kLanes);
    for (int64_t r = begin; r < end; ++r) {
        const uint8_t* v = a.values + static_cast<size_t>(a.rows[r]) * a.row;
        Float value[columns];
        for (int c = 0; c < columns; ++c) value[c] = numbers_of<cells, whole>(v, a.width, at + c * Isa::kLanes);
        for (int h = 0; h < n; ++h) {
            const Float share = Isa::all(a.scores[(head + h) * stride + r]);
            for (int c = 0; c < columns; ++c) sums[h][c] = Isa::fma(share, value[c], sums[h][c]);
        }
    }
    for (int h = 0; h < n; ++h)
        for (int c = 0; c < columns; ++c) Isa::store(a.y + (head + h) * a.apart + at + c * Isa::kLanes, sums[h][c]);
}

template <Cells cells, int n>
static CM_INLINE void values_of(const Attention& a, int head, int64_t begin, int64_t end, size_t stride) {
    constexpr int kColumns = Isa::kColumns, kWide = kColumns * Isa::kLanes;
    for (; head + n <= a.heads; head += n) {
        int at = 0;
        for (; at + kWide <= a.width; at += kWide) add_values<cells, n, kColumns, true>(a, head, at, begin, end, stride);
        for (; at + Isa::kLanes <= a.width; at += Isa::kLanes) add_values<cells, n, 1, true>(a, head, at, begin, end, stride);
        if (at < a.width) add_values<cells, n, 1, false>(a, head, at, begin, end, stride);
    }
    if constexpr (n > 1) {
        if (head < a.heads) values_of<cells, n - 1>(a, head, begin, end, stride);
    }
}

template <Cells cells>
static void attend_to(const Attention& a) {
    const size_t stride = static_cast<size_t>(a.seen + kStep - 1) / kStep * kStep;
    const int64_t filled = static_cast<int64_t>(stride);
    constexpr int kSteps = std::max(1, Isa::kColumns * Isa::kLanes / kStep);
    int64_t row = a.turned ? 0 : filled;
    for (; row + kSteps * kStep <= filled; row += kSteps * kStep) scores_of_turned<Isa::kRows, kSteps>(a, 0, row, stride);
    for (; row < filled; row += kStep) scores_of_turned<Isa::kRows, 1>(a, 0, row, stride);
    for (int64_t r = a.turned ? a.seen : 0; r < a.seen; r += kFour) {
        const uint8_t* keys[kFour];
        for (int i = 0; i < kFour; ++i) keys[i] = a.keys + static_cast<size_t>(a.rows[std::min(r + i, a.seen - 1)]) * a.row;
        scores_of<cells, Isa::kColumns>(a, 0, keys, a.scores + r, stride);
    }
    std::memset(a.y, 0, a.heads * a.apart * sizeof(float));
    float inverse[kMaxHeads];
    for (int h = 0; h < a.heads; ++h) inverse[h] = 1.0f / shares(a.scores + h * stride, a.added + h * a.added_apart, a.seen, filled);
    for (int64_t r = 0; r < a.seen; r += kTileRows) values_of<cells, Isa::kRows>(a, 0, r, std::min(r + kTileRows, a.seen), stride);
    for (int h = 0; h < a.heads; ++h)
        for (size_t i = 0; i < a.apart; ++i) a.y[h * a.apart + i] *= inverse[h];
}

static void attend(const Attention& a) {
    if (a.cells == Cells::kByte) return attend_to<Cells::kByte>(a);
    return a.cells == Cells::kHalf ? attend_to<Cells::kHalf>(a) : attend_to<Cells::kFloat>(a);
}
