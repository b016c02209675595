// Attention of a few queries over rows of a cache, for one instruction set: included behind activate.h and product.h.
//
//     score[h, r] = q[h] . key[r] + added[r]     share = e^(score - largest)     y[h] = sum over r share[h, r] value[r] / sum share[h]
//
// Each head of each token is computed by itself, row by row in the order of the list, with steps that depend on nothing but
// its length. So its numbers are the same whoever is read beside it and wherever in the cache its rows begin.

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

// ---------------------------------------------------------------- scores

template <int n, bool whole>
static CM_INLINE void add_products(const Attention& a, int head, const float* const* keys, int at, Float (*sums)[kFour]) {
    Float k[kFour];
    for (int r = 0; r < kFour; ++r) k[r] = whole ? Isa::load(keys[r] + at) : Isa::some(keys[r] + at, a.width - at);
    for (int h = 0; h < n; ++h) {
        const Float q = Isa::load(a.q + (head + h) * a.apart + at);
        for (int r = 0; r < kFour; ++r) sums[h][r] = Isa::fma(q, k[r], sums[h][r]);
    }
}

// Of n heads at a time, and of what is left with smaller n, for four rows.
template <int n>
static CM_INLINE void scores_of(const Attention& a, int head, const float* const* keys, float* out, size_t stride) {
    for (; head + n <= a.heads; head += n) {
        Float sums[n][kFour];
        for (int h = 0; h < n; ++h)
            for (int r = 0; r < kFour; ++r) sums[h][r] = Isa::all(0.0f);
        int at = 0;
        for (; at + Isa::kLanes <= a.width; at += Isa::kLanes) add_products<n, true>(a, head, keys, at, sums);
        if (at < a.width) add_products<n, false>(a, head, keys, at, sums);
        for (int h = 0; h < n; ++h) Isa::add_up(sums[h], out + (head + h) * stride);
    }
    if constexpr (n > 1) {
        if (head < a.heads) scores_of<n - 1>(a, head, keys, out, stride);
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
template <int n, int columns, bool whole>
static CM_INLINE void add_values(const Attention& a, int head, int at, int64_t begin, int64_t end, size_t stride) {
    Float sums[n][columns];
    for (int h = 0; h < n; ++h)
        for (int c = 0; c < columns; ++c) sums[h][c] = Isa::load(a.y + (head + h) * a.apart + at + c * Isa::kLanes);
    for (int64_t r = begin; r < end; ++r) {
        const float* v = a.values + static_cast<size_t>(a.rows[r]) * a.width + at;
        Float value[columns];
        for (int c = 0; c < columns; ++c) value[c] = whole ? Isa::load(v + c * Isa::kLanes) : Isa::some(v, a.width - at);
        for (int h = 0; h < n; ++h) {
            const Float share = Isa::all(a.scores[(head + h) * stride + r]);
            for (int c = 0; c < columns; ++c) sums[h][c] = Isa::fma(share, value[c], sums[h][c]);
        }
    }
    for (int h = 0; h < n; ++h)
        for (int c = 0; c < columns; ++c) Isa::store(a.y + (head + h) * a.apart + at + c * Isa::kLanes, sums[h][c]);
}

template <int n>
static CM_INLINE void values_of(const Attention& a, int head, int64_t begin, int64_t end, size_t stride) {
    constexpr int kColumns = Isa::kColumns, kWide = kColumns * Isa::kLanes;
    for (; head + n <= a.heads; head += n) {
        int at = 0;
        for (; at + kWide <= a.width; at += kWide) add_values<n, kColumns, true>(a, head, at, begin, end, stride);
        for (; at + Isa::kLanes <= a.width; at += Isa::kLanes) add_values<n, 1, true>(a, head, at, begin, end, stride);
        if (at < a.width) add_values<n, 1, false>(a, head, at, begin, end, stride);
    }
    if constexpr (n > 1) {
        if (head < a.heads) values_of<n - 1>(a, head, begin, end, stride);
    }
}

static void attend(const Attention& a) {
    const size_t stride = static_cast<size_t>(a.seen + kStep - 1) / kStep * kStep;
    const int64_t filled = static_cast<int64_t>(stride);
    constexpr int kSteps = std::max(1, Isa::kColumns * Isa::kLanes / kStep);
    int64_t row = a.turned ? 0 : filled;
    for (; row + kSteps * kStep <= filled; row += kSteps * kStep) scores_of_turned<Isa::kRows, kSteps>(a, 0, row, stride);
    for (; row < filled; row += kStep) scores_of_turned<Isa::kRows, 1>(a, 0, row, stride);
    for (int64_t r = a.turned ? a.seen : 0; r < a.seen; r += kFour) {
        const float* keys[kFour];
        for (int i = 0; i < kFour; ++i) keys[i] = a.keys + static_cast<size_t>(a.rows[std::min(r + i, a.seen - 1)]) * a.width;
        scores_of<Isa::kColumns>(a, 0, keys, a.scores + r, stride);
    }
    std::memset(a.y, 0, a.heads * a.apart * sizeof(float));
    float inverse[kMaxHeads];
    for (int h = 0; h < a.heads; ++h) inverse[h] = 1.0f / shares(a.scores + h * stride, a.added + h * a.added_apart, a.seen, filled);
    for (int64_t r = 0; r < a.seen; r += kTileRows) values_of<Isa::kRows>(a, 0, r, std::min(r + kTileRows, a.seen), stride);
    for (int h = 0; h < a.heads; ++h)
        for (size_t i = 0; i < a.apart; ++i) a.y[h * a.apart + i] *= inverse[h];
}
