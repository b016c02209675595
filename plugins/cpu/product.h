// The products, for one instruction set: included by its file, in its namespace, after
//
//     struct Isa           Int: a register of packed codes or of int32 sums, Float: of as many floats, kLanes of them
//         kRows, kColumns  rows of x and registers of outputs that are summed in registers at once
//         unpack<bits>     four rows of a panel of W -> bytes, four neighbours for one output, in the order of outputs
//         dot<bits>        sums + 4 codes of W * 4 codes of x, per lane
//         zeros            zero points of kLanes outputs, times(zeros, n): each times n, |n| < 2^15
//
// A single row of x is the common case of writing an answer: W is unpacked in registers. Several rows share a tile:
// some groups of a panel are unpacked once, into a buffer that stays in the first cache, and multiplied for every row.
// Every output is summed in the order of k, group by group, in both forms: results do not depend on who computes them.

using Int = Isa::Int;
using Float = Isa::Float;
constexpr int kRegisters = kPanel / Isa::kLanes;  // of a panel's outputs
static_assert(kRegisters % Isa::kColumns == 0);

// Listed rows of W from one quad to another, all of whose lines of one panel are asked for.
template <int bits>
static CM_INLINE void fetch(const uint8_t* panel, size_t row_bytes, const int32_t* ids, int begin, int end) {
    for (int i = begin * kQuad; i < end * kQuad; ++i)
        for (int line = 0; line < kPanel * bits / 8; line += 64)
            __builtin_prefetch(panel + static_cast<size_t>(ids[i]) * row_bytes + line, 0, 2);
}

template <int bits>
static CM_INLINE Int zeros_at(const Matrix& m, int64_t g, int64_t output) {
    if (m.zero == nullptr) return Isa::all((1 << (bits - 1)) - (bits == 8 ? Isa::kOffset : 0));
    return Isa::template zeros<bits>(m.zero + g * m.panels * kPanel + output);
}

template <int bits>
static CM_INLINE void unpack(const uint8_t* panel, size_t row_bytes, const int32_t* ids, Int* out) {
    Isa::template unpack<bits>(panel + static_cast<size_t>(ids[0]) * row_bytes, panel + static_cast<size_t>(ids[1]) * row_bytes,
                               panel + static_cast<size_t>(ids[2]) * row_bytes, panel + static_cast<size_t>(ids[3]) * row_bytes,
                               out);
}

// ---------------------------------------------------------------- one row of x

// One panel of one group: y += x W.
template <int bits>
static CM_INLINE void one_panel(const Matrix& m, const Rows& rows, int64_t g, int64_t panel, float* y) {
    const uint8_t* codes = m.codes + panel * kPanel * bits / 8;
    const int begin = rows.first[g], end = rows.first[g + 1];
    Int sums[kRegisters];
    for (int r = 0; r < kRegisters; ++r)
        sums[r] = Isa::times(zeros_at<bits>(m, g, panel * kPanel + r * Isa::kLanes), -rows.sum[g]);
    for (int quad = begin; quad < end; ++quad) {
        Int w[kRegisters];
        unpack<bits>(codes, m.row_bytes(), rows.ids.data() + quad * kQuad, w);
        const Int x = Isa::quad(rows.codes.data() + quad * kQuad);
        for (int r = 0; r < kRegisters; ++r) sums[r] = Isa::template dot<bits>(sums[r], w[r], x);
    }
    const uint16_t* scale = m.scale + (g * m.panels + panel) * kPanel;
    const Float x_scale = Isa::all(rows.scale[g]);
    for (int r = 0; r < kRegisters; ++r) {
        float* out = y + r * Isa::kLanes;
        const Float s = Isa::mul(Isa::half(scale + r * Isa::kLanes), x_scale);
        Isa::store(out, Isa::fma(Isa::number(sums[r]), s, Isa::load(out)));
    }
}

template <>
CM_INLINE void one_panel<32>(const Matrix& m, const Rows& rows, int64_t g, int64_t panel, float* y) {
    Float sums[kRegisters];
    for (int r = 0; r < kRegisters; ++r) sums[r] = Isa::load(y + r * Isa::kLanes);
    for (int i = rows.first[g] * kQuad; i < rows.first[g + 1] * kQuad; ++i) {
        const float* w = reinterpret_cast<const float*>(m.codes + rows.ids[i] * m.row_bytes()) + panel * kPanel;
        const Float x = Isa::all(rows.values[i]);
        for (int r = 0; r < kRegisters; ++r) sums[r] = Isa::fma(x, Isa::load(w + r * Isa::kLanes), sums[r]);
    }
    for (int r = 0; r < kRegisters; ++r) Isa::store(y + r * Isa::kLanes, sums[r]);
}

template <int bits>
static void one_row(const Matrix& m, const Rows& rows, const Span* spans, int count) {
    for (int64_t g = 0; g < rows.groups; ++g) {
        const int begin = rows.first[g], end = rows.first[g + 1];
        if (begin == end) continue;
        // Memory answers late, and no processor foresees which rows come: ask for those of the next group now.
        const int next_end = g + 1 < rows.groups ? rows.first[g + 2] : end;
        for (const Span* span = spans; span != spans + count; ++span)
            for (int64_t panel = span->begin; panel < span->end; ++panel) {
                fetch<bits>(m.codes + panel * kPanel * bits / 8, m.row_bytes(), rows.ids.data(), end, next_end);
                one_panel<bits>(m, rows, g, panel, span->y + (panel - span->begin) * kPanel);
            }
    }
}

// ---------------------------------------------------------------- several rows of x

// Some groups of one panel of W, unpacked.
struct Tile {
    std::vector<uint8_t> memory;
    Int* codes = nullptr;  // [quads, kRegisters]; with 32 bits the floats of W, [inputs, kRegisters]
    Float* scale = nullptr;  // [groups, kRegisters]
    Int* zeros = nullptr;    // [groups, kRegisters]

    void reserve(size_t quads, size_t groups) {
        const size_t needed = (quads * kQuad + 2 * groups) * kRegisters * sizeof(Int) + 64;
        if (memory.size() < needed) memory.resize(needed);
        const uintptr_t aligned = (reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63};
        codes = reinterpret_cast<Int*>(aligned);
        scale = reinterpret_cast<Float*>(codes + quads * kQuad * kRegisters);
        zeros = reinterpret_cast<Int*>(scale + groups * kRegisters);
    }
};

template <int bits>
static CM_INLINE void fill(Tile& tile, const Matrix& m, const Rows& rows, int64_t g_begin, int64_t g_end, int64_t panel) {
    const int first = rows.first[g_begin], last = rows.first[g_end];
    if constexpr (bits == 32) {
        float* out = reinterpret_cast<float*>(tile.codes);
        for (int i = first * kQuad; i < last * kQuad; ++i, out += kPanel)
            std::memcpy(out, m.codes + rows.ids[i] * m.row_bytes() + panel * kPanel * sizeof(float), kPanel * sizeof(float));
        return;
    } else {
        const uint8_t* codes = m.codes + panel * kPanel * bits / 8;
        for (int quad = first; quad < last; ++quad)
            unpack<bits>(codes, m.row_bytes(), rows.ids.data() + quad * kQuad, tile.codes + (quad - first) * kRegisters);
        for (int64_t g = g_begin; g < g_end; ++g)
            for (int r = 0; r < kRegisters; ++r) {
                const int64_t output = panel * kPanel + r * Isa::kLanes;
                tile.scale[(g - g_begin) * kRegisters + r] = Isa::half(m.scale + g * m.panels * kPanel + output);
                tile.zeros[(g - g_begin) * kRegisters + r] = zeros_at<bits>(m, g, output);
            }
    }
}

// `n` rows of x from `row`, kColumns registers of outputs from `column`: y += x tile.
template <int bits, int n>
static CM_INLINE void block(const Tile& tile, const Rows& rows, int64_t g_begin, int64_t g_end, int row, int column, float* y,
                            size_t stride) {
    constexpr int kColumns = Isa::kColumns;
    const int first = rows.first[g_begin];
    const size_t listed = rows.ids.size();
    const int8_t* x = rows.codes_of(row);
    for (int64_t g = g_begin; g < g_end; ++g) {
        const Int* zeros = tile.zeros + (g - g_begin) * kRegisters + column;
        const Float* scale = tile.scale + (g - g_begin) * kRegisters + column;
        Int sums[n][kColumns];
        for (int i = 0; i < n; ++i)
            for (int c = 0; c < kColumns; ++c) sums[i][c] = Isa::times(zeros[c], -rows.sum[(row + i) * rows.groups + g]);
        const Int* w = tile.codes + (rows.first[g] - first) * kRegisters + column;
        for (int quad = rows.first[g]; quad < rows.first[g + 1]; ++quad, w += kRegisters)
            for (int i = 0; i < n; ++i) {
                const Int codes = Isa::quad(x + i * listed + quad * kQuad);
                for (int c = 0; c < kColumns; ++c) sums[i][c] = Isa::template dot<bits>(sums[i][c], w[c], codes);
            }
        for (int i = 0; i < n; ++i) {
            const Float x_scale = Isa::all(rows.scale[(row + i) * rows.groups + g]);
            for (int c = 0; c < kColumns; ++c) {
                float* out = y + i * stride + c * Isa::kLanes;
                Isa::store(out, Isa::fma(Isa::number(sums[i][c]), Isa::mul(scale[c], x_scale), Isa::load(out)));
            }
        }
    }
}

// The same for floats.
template <int n>
static CM_INLINE void float_block(const Tile& tile, const Rows& rows, int64_t g_begin, int64_t g_end, int row, int column, float* y,
                                  size_t stride) {
    constexpr int kColumns = Isa::kColumns;
    const size_t listed = rows.ids.size();
    const float* x = rows.values_of(row);
    const Float* w = reinterpret_cast<const Float*>(tile.codes) + column;
    Float out[n][kColumns];
    for (int i = 0; i < n; ++i)
        for (int c = 0; c < kColumns; ++c) out[i][c] = Isa::load(y + i * stride + c * Isa::kLanes);
    for (int k = rows.first[g_begin] * kQuad; k < rows.first[g_end] * kQuad; ++k, w += kRegisters)
        for (int i = 0; i < n; ++i) {
            const Float factor = Isa::all(x[i * listed + k]);
            for (int c = 0; c < kColumns; ++c) out[i][c] = Isa::fma(factor, w[c], out[i][c]);
        }
    for (int i = 0; i < n; ++i)
        for (int c = 0; c < kColumns; ++c) Isa::store(y + i * stride + c * Isa::kLanes, out[i][c]);
}

// All rows of x and outputs of the tile, n rows at a time and what is left with smaller n.
template <int bits, int n>
static void blocks(const Tile& tile, const Rows& rows, int64_t g_begin, int64_t g_end, int row, float* y, size_t stride) {
    for (; row + n <= rows.count; row += n)
        for (int column = 0; column < kRegisters; column += Isa::kColumns) {
            float* out = y + row * stride + column * Isa::kLanes;
            if constexpr (bits == 32) {
                float_block<n>(tile, rows, g_begin, g_end, row, column, out, stride);
            } else {
                block<bits, n>(tile, rows, g_begin, g_end, row, column, out, stride);
            }
        }
    if constexpr (n > 1) {
        if (row < rows.count) blocks<bits, n - 1>(tile, rows, g_begin, g_end, row, y, stride);
    }
}

template <int bits>
static void several_rows(const Matrix& m, const Rows& rows, const Span* spans, int count) {
    static thread_local Tile tile;
    // With few rows memory decides, and long stretches of a row of W are read; with many, sums stay in registers longer.
    const int64_t step = rows.count <= kFewRows || bits == 32 ? 1 : kTileInputs / m.group;
    tile.reserve(static_cast<size_t>(step) * m.group / kQuad, step);
    for (int64_t g = 0; g < rows.groups; g += step) {
        const int64_t end = g + step < rows.groups ? g + step : rows.groups;
        if (rows.first[g] == rows.first[end]) continue;
        const int next_end = rows.first[end + step < rows.groups ? end + step : rows.groups];
        for (const Span* span = spans; span != spans + count; ++span)
            for (int64_t panel = span->begin; panel < span->end; ++panel) {
                fetch<bits>(m.codes + panel * kPanel * bits / 8, m.row_bytes(), rows.ids.data(), rows.first[end], next_end);
                fill<bits>(tile, m, rows, g, end, panel);
                blocks<bits, Isa::kRows>(tile, rows, g, end, 0, span->y + (panel - span->begin) * kPanel, span->stride);
            }
    }
}

template <int bits>
static void multiply_bits(const Matrix& m, const Rows& rows, const Span* spans, int count) {
    for (const Span* span = spans; span != spans + count; ++span)
        for (int row = 0; row < rows.count; ++row)
            std::memset(span->y + row * span->stride, 0, (span->end - span->begin) * kPanel * sizeof(float));
    return rows.count == 1 ? one_row<bits>(m, rows, spans, count) : several_rows<bits>(m, rows, spans, count);
}

static void multiply(const Matrix& m, const Rows& rows, const Span* spans, int count) {
    switch (m.bits) {
        case 4: return multiply_bits<4>(m, rows, spans, count);
        case 8: return multiply_bits<8>(m, rows, spans, count);
        default: return multiply_bits<32>(m, rows, spans, count);
    }
}
