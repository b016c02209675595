// The products, for one instruction set: included by its file, in its namespace, after
//
//     struct Isa           Int: a register of packed codes or of int32 sums, Float: of as many floats, kLanes of them
//         kRows, kColumns  rows of x and registers of outputs that are summed in registers at once, group by group
//         kManyRows, kManyColumns   the same where the sums of groups stay there, too
//         unpack<bits>     four rows of a panel of W -> bytes, four neighbours for one output, in the order of outputs
//         dot<bits>        sums + 4 codes of W * 4 codes of x, per lane
//         zeros            zero points of kLanes outputs, times(zeros, n): each times n, |n| < 2^15
//         times_high       each lane times kHigh
//         larger(a, b)     a if it is larger than b, else b
//         kTwoCodes        whether dot<8> is exact for every byte, so that one of two 4-bit codes can be multiplied as it is;
//                          then `pairs` are the bytes of four rows, and upper(pairs) their upper codes times 16
//
// A single row of x is the common case of writing an answer: W is unpacked in registers, and so it is for two to four where a byte
// of two codes can be multiplied. Other numbers of rows share a tile: some groups of a panel are unpacked once, into a buffer that
// stays in a cache, and multiplied for every row.
// Every output is summed in the order of k, group by group, in both forms: results do not depend on who computes them.

using Int = Isa::Int;
using Float = Isa::Float;
constexpr int kRegisters = kPanel / Isa::kLanes;  // of a panel's outputs
static_assert(kRegisters % Isa::kColumns == 0 && kRegisters % Isa::kManyColumns == 0);

// How far ahead of what is multiplied W is asked for, in bytes along its rows: memory answers late, and processors follow by
// themselves only long stretches of few rows. A core waits where more than some 16 lines are on their way, so they are asked for
// a few at a time, between products.
constexpr int kAhead = 768;

// A line of memory is asked for into the first cache or into the second one. AMD's Zen 4 reads up to twice as fast with the
// second; Intel's Cascade Lake was measured with the first.
static CM_INLINE void ask(const uint8_t* line, bool second_cache) {
    if (second_cache) {
        __builtin_prefetch(line, 0, 2);
    } else {
        __builtin_prefetch(line, 0, 3);
    }
}

// Pointers to many rows of W are loaded where they are needed. GCC would keep them in vector registers, and take them out there
// with the unit that multiplies.
static CM_INLINE void keep_in_memory() { asm volatile("" ::: "memory"); }

// The rows of W that are listed as quads `begin` to `end`, at one panel.
template <int bits>
struct Piece {
    const Matrix& m;
    const int32_t* ids;
    int begin, end;
    int64_t panel;

    // What is read kAhead later, at most a span: `span` is one of `count`, after the last of which quads up to `next` follow.
    Piece later(const Span* spans, int count, const Span* span, int next) const {
        Piece then = *this;
        then.panel += std::clamp<int64_t>(kAhead / kBytes, 1, span->end - span->begin);
        if (then.panel < span->end) return then;
        then.panel -= span->end;
        if (++span == spans + count) span = spans, then.begin = end, then.end = next;
        then.panel += span->begin;
        if (then.panel >= span->end) then.end = then.begin;
        return then;
    }

    // The first or second half of its quads, in turn.
    CM_INLINE void ask_for(int half) const {
        const int middle = (begin + end + 1) / 2;
        const bool second_cache = kSecondCache;
        for (int i = (half ? middle : begin) * kQuad; i < (half ? end : middle) * kQuad; ++i)
            for (int line = 0; line < kBytes; line += 64)
                ask(m.codes + static_cast<size_t>(ids[i]) * m.row_bytes() + panel * kBytes + line, second_cache);
    }

    static constexpr int kBytes = kPanel * bits / 8;
};

template <int bits>
static CM_INLINE Int zeros_at(const Matrix& m, int64_t g, int64_t output) {
    if (m.zero == nullptr) return Isa::all((1 << (bits - 1)) - (bits == 8 ? Isa::kOffset : 0));
    return Isa::template zeros<bits>(m.zero + g * m.panels * kPanel + output);
}

// Zero points of some outputs, times the sum of a row's codes, which is taken away from sums of codes of W times codes of x.
template <int bytes>
static CM_INLINE Int taken_away(Int zeros, const Rows& rows, int row, int64_t g) {
    const Int first = Isa::times(zeros, -rows.sum_of(row, 0)[g]);
    if constexpr (bytes == 1) return first;
    return Isa::more(Isa::times_high(first), Isa::times(zeros, -rows.sum_of(row, 1)[g]));
}

template <int bits>
static CM_INLINE void unpack(const uint8_t* const* rows, int64_t offset, Int* out) {
    Isa::template unpack<bits>(rows[0] + offset, rows[1] + offset, rows[2] + offset, rows[3] + offset, out);
}

// ---------------------------------------------------------------- one row of x

// Quads are taken kTogether at a time, along all outputs: 16 rows of W are as many as processors fetch well side by side.
// What a group's quads have summed is kept in memory between two passes, as integers: in the first or second cache.
constexpr int kTogether = 4;

// Quads of one group. With `first` sums begin, with `last` they end and become part of y, which begins with `fresh`.
struct Pass {
    int64_t g;
    int quad;
    bool first, last, fresh;
};

// y += sums * factor; = with `fresh`
static CM_INLINE void give(Int sums, Float factor, bool fresh, float* y) {
    Isa::store(y, Isa::fma(Isa::number(sums), factor, fresh ? Isa::all(0.0f) : Isa::load(y)));
}

// sums of a panel += four rows of W * x, of n rows of x. Where a byte of two codes is multiplied as it is, low + 16 high, a second
// product has the upper codes alone, times 16: cheaper than to part the codes before.
template <class I, int bits, int n>
static CM_INLINE void add_quad(const uint8_t* const* rows, int64_t offset, const Int* x, Int (*sums)[kRegisters]) {
    constexpr int kHalf = kRegisters / 2;
    if constexpr (bits == 4 && I::kTwoCodes) {
        Int both[kHalf];
        I::pairs(rows[0] + offset, rows[1] + offset, rows[2] + offset, rows[3] + offset, both);
        for (int r = 0; r < kHalf; ++r) {
            const Int upper = I::upper(both[r]);
            for (int i = 0; i < n; ++i) {
                sums[i][r] = I::template dot<8>(sums[i][r], both[r], x[i]);
                sums[i][kHalf + r] = I::template dot<8>(sums[i][kHalf + r], upper, x[i]);
            }
        }
    } else {
        Int w[kRegisters];
        unpack<bits>(rows, offset, w);
        for (int r = 0; r < kRegisters; ++r)
            for (int i = 0; i < n; ++i) sums[i][r] = I::template dot<bits>(sums[i][r], w[r], x[i]);
    }
}

// The sums of all codes, after the last quad of a group.
template <class I, int bits>
static CM_INLINE void part(Int* sums) {
    constexpr int kHalf = kRegisters / 2;
    if constexpr (bits == 4 && I::kTwoCodes)
        for (int r = 0; r < kHalf; ++r) sums[r] = I::less(sums[r], sums[kHalf + r]), sums[kHalf + r] = I::sixteenth(sums[kHalf + r]);
}

// The same with two bytes of x, the sums of its upper one apart.
static CM_INLINE void add_quad(const uint8_t* const* rows, int64_t offset, Int high, Int low, Int* sums_high, Int* sums) {
    Int w[kRegisters];
    unpack<8>(rows, offset, w);
    for (int r = 0; r < kRegisters; ++r) {
        sums_high[r] = Isa::template dot<8>(sums_high[r], w[r], high);
        sums[r] = Isa::template dot<8>(sums[r], w[r], low);
    }
}

// Panels from `begin` to `end` of a span; `now` are the rows of W, `ahead` where to ask for what comes, both less the panel.
// Without `ahead` that is kAhead further along the same rows.
template <int bits, int bytes, int quads>
static CM_INLINE void stretch(const Matrix& m, const Rows& rows, const Pass& pass, const Span& span, int64_t begin, int64_t end,
                              const uint8_t* const* now, const uint8_t* const* ahead, Int* sums) {
    constexpr int kBytes = kPanel * bits / 8;
    Int x[bytes][quads];
    for (int byte = 0; byte < bytes; ++byte)
        for (int q = 0; q < quads; ++q)
            x[byte][q] = Isa::quad(rows.codes + byte * rows.ids.size() + (pass.quad + q) * kQuad);
    const Float x_scale = Isa::all(rows.scale[pass.g]);
    const bool second_cache = kSecondCache;
    for (int64_t panel = begin; panel < end; ++panel) {
        const auto ask_for = [&](int q) {
            keep_in_memory();
            for (int i = q * kQuad; i < (q + 1) * kQuad; ++i)
                for (int line = 0; line < kBytes; line += 64)
                    ask((ahead ? ahead[i] : now[i] + kAhead) + panel * kBytes + line, second_cache);
        };
        Int* kept = sums + (panel - span.begin) * kRegisters;
        Int of[kRegisters];
        for (int r = 0; r < kRegisters; ++r) of[r] = pass.first ? Isa::all(0) : kept[r];
        if constexpr (bytes == 1) {
            for (int q = 0; q < quads; ++q) ask_for(q), add_quad<Isa, bits, 1>(now + q * kQuad, panel * kBytes, &x[0][q], &of);
        } else {
            Int high[kRegisters];
            for (int r = 0; r < kRegisters; ++r) high[r] = Isa::all(0);
            for (int q = 0; q < quads; ++q) ask_for(q), add_quad(now + q * kQuad, panel * kBytes, x[0][q], x[1][q], high, of);
            for (int r = 0; r < kRegisters; ++r) of[r] = Isa::more(of[r], Isa::times_high(high[r]));
        }
        if (!pass.last) {
            for (int r = 0; r < kRegisters; ++r) kept[r] = of[r];
            continue;
        }
        part<Isa, bits>(of);
        const uint16_t* scale = m.scale + (pass.g * m.panels + panel) * kPanel;
        float* y = span.y + (panel - span.begin) * kPanel;
        for (int r = 0; r < kRegisters; ++r) {
            const int64_t output = r * Isa::kLanes;
            const Int zeros = taken_away<bytes>(zeros_at<bits>(m, pass.g, panel * kPanel + output), rows, 0, pass.g);
            give(Isa::more(of[r], zeros), Isa::mul(Isa::half(scale + output), x_scale), pass.fresh, y + output);
        }
    }
}

template <int bits, int bytes, int quads>
static void take(const Matrix& m, const Rows& rows, const Pass& pass, const Span* spans, int count, int last_quad, Int* sums) {
    constexpr int kBytes = kPanel * bits / 8, kRows = quads * kQuad;
    const uint8_t *now[kRows], *next[kRows], *ahead[kRows];
    for (int i = 0; i < kRows; ++i) {
        const int at = pass.quad * kQuad + i, later = at + kRows, end = last_quad * kQuad;
        now[i] = m.codes + static_cast<size_t>(rows.ids[at]) * m.row_bytes();
        next[i] = m.codes + static_cast<size_t>(rows.ids[later < end ? later : end - 1]) * m.row_bytes();
    }
    for (const Span* span = spans; span != spans + count; ++span) {
        // at the end of a span the next one is asked for, and at the end of the last one the rows that come next
        const int64_t turn = span->end - span->begin > kAhead / kBytes ? span->end - kAhead / kBytes : span->begin;
        stretch<bits, bytes, quads>(m, rows, pass, *span, span->begin, turn, now, nullptr, sums);
        const bool is_last = span + 1 == spans + count;
        const int64_t jump = ((is_last ? spans : span + 1)->begin - turn) * kBytes;
        for (int i = 0; i < kRows; ++i) ahead[i] = (is_last ? next : now)[i] + jump;
        stretch<bits, bytes, quads>(m, rows, pass, *span, turn, span->end, now, ahead, sums);
        sums += (span->end - span->begin) * kRegisters;
    }
}

template <int bits, int bytes>
static void one_row(const Matrix& m, const Rows& rows, Groups groups, int64_t first, const Span* spans, int count) {
    static thread_local Aligned memory;
    int64_t panels = 0;
    for (const Span* span = spans; span != spans + count; ++span) panels += span->end - span->begin;
    Int* sums = memory.of<Int>(panels * kRegisters);
    const int last_quad = rows.first[groups.end];
    for (int64_t g = groups.begin; g < groups.end; ++g) {
        const int begin = rows.first[g], end = rows.first[g + 1];
        for (int quad = begin, taken; quad < end; quad += taken) {
            const int left = end - quad;
            taken = left <= kTogether ? left : left < 2 * kTogether ? (left + 1) / 2 : kTogether;  // two halves: no short rest
            const Pass pass{g, quad, quad == begin, taken == left, g == first};
            switch (taken) {
                case 1: take<bits, bytes, 1>(m, rows, pass, spans, count, last_quad, sums); break;
                case 2: take<bits, bytes, 2>(m, rows, pass, spans, count, last_quad, sums); break;
                case 3: take<bits, bytes, 3>(m, rows, pass, spans, count, last_quad, sums); break;
                default: take<bits, bytes, kTogether>(m, rows, pass, spans, count, last_quad, sums);
            }
        }
    }
}

template <>
void one_row<32, 1>(const Matrix& m, const Rows& rows, Groups groups, int64_t first, const Span* spans, int count) {
    for (int64_t g = groups.begin; g < groups.end; ++g) {
        const int begin = rows.first[g], end = rows.first[g + 1], next = rows.first[g + 1 < groups.end ? g + 2 : g + 1];
        if (begin == end) continue;
        for (const Span* span = spans; span != spans + count; ++span)
            for (int64_t panel = span->begin; panel < span->end; ++panel) {
                const Piece<32> later = Piece<32>{m, rows.ids.data(), begin, end, panel}.later(spans, count, span, next);
                later.ask_for(0), later.ask_for(1);
                float* y = span->y + (panel - span->begin) * kPanel;
                Float sums[kRegisters];
                for (int r = 0; r < kRegisters; ++r) sums[r] = g == first ? Isa::all(0.0f) : Isa::load(y + r * Isa::kLanes);
                for (int i = begin * kQuad; i < end * kQuad; ++i) {
                    const float* w = reinterpret_cast<const float*>(m.codes + rows.ids[i] * m.row_bytes()) + panel * kPanel;
                    const Float x = Isa::all(rows.values[i]);
                    for (int r = 0; r < kRegisters; ++r) sums[r] = Isa::fma(x, Isa::load(w + r * Isa::kLanes), sums[r]);
                }
                for (int r = 0; r < kRegisters; ++r) Isa::store(y + r * Isa::kLanes, sums[r]);
            }
    }
}

// ---------------------------------------------------------------- several rows of x

// Some groups of one panel of W, unpacked.
struct Tile {
    Aligned memory;
    Int* codes = nullptr;  // [quads, kRegisters]; with 32 bits the floats of W, [inputs, kRegisters]
    Float* scale = nullptr;  // [groups, kRegisters]
    Int* zeros = nullptr;    // [groups, kRegisters]

    void reserve(size_t quads, size_t groups) {
        codes = memory.of<Int>((quads * kQuad + 2 * groups) * kRegisters);
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
        for (int quad = first; quad < last; ++quad) {
            const uint8_t* four[kQuad];
            for (int i = 0; i < kQuad; ++i) four[i] = m.codes + static_cast<size_t>(rows.ids[quad * kQuad + i]) * m.row_bytes();
            unpack<bits>(four, panel * kPanel * bits / 8, tile.codes + (quad - first) * kRegisters);
        }
        for (int64_t g = g_begin; g < g_end; ++g)
            for (int r = 0; r < kRegisters; ++r) {
                const int64_t output = panel * kPanel + r * Isa::kLanes;
                tile.scale[(g - g_begin) * kRegisters + r] = Isa::half(m.scale + g * m.panels * kPanel + output);
                tile.zeros[(g - g_begin) * kRegisters + r] = zeros_at<bits>(m, g, output);
            }
    }
}

// Part of y: `n` rows of x from `row`, `columns` registers of outputs from `column` of the tile; rows of y are `stride` apart.
template <int n, int columns>
struct Block {
    const Tile& tile;
    const Rows& rows;
    int64_t g_begin;  // of the tile
    int row, column;
    float* y;
    size_t stride;

    // out += what a group adds
    template <int bits, int bytes, class Out>
    CM_INLINE void add(int64_t g, Out out) const {
        const size_t listed = rows.ids.size();
        const int8_t* x = rows.codes_of(row);
        const Float* scale = tile.scale + (g - g_begin) * kRegisters + column;
        Int sums[n][columns], high[bytes == 1 ? 1 : n][columns];
        const Int* zeros = tile.zeros + (g - g_begin) * kRegisters + column;
        for (int i = 0; i < n; ++i)
            for (int c = 0; c < columns; ++c) sums[i][c] = taken_away<bytes>(zeros[c], rows, row + i, g);
        if constexpr (bytes == 2)
            for (int i = 0; i < n; ++i)
                for (int c = 0; c < columns; ++c) high[i][c] = Isa::all(0);
        const Int* w = tile.codes + (rows.first[g] - rows.first[g_begin]) * kRegisters + column;
        for (int quad = rows.first[g]; quad < rows.first[g + 1]; ++quad, w += kRegisters)
            for (int i = 0; i < n; ++i) {
                const int8_t* codes = x + i * bytes * listed + quad * kQuad;
                if constexpr (bytes == 2)
                    for (int c = 0; c < columns; ++c) high[i][c] = Isa::template dot<bits>(high[i][c], w[c], Isa::quad(codes));
                const Int last = Isa::quad(codes + (bytes - 1) * listed);
                for (int c = 0; c < columns; ++c) sums[i][c] = Isa::template dot<bits>(sums[i][c], w[c], last);
            }
        if constexpr (bytes == 2)
            for (int i = 0; i < n; ++i)
                for (int c = 0; c < columns; ++c) sums[i][c] = Isa::more(sums[i][c], Isa::times_high(high[i][c]));
        for (int i = 0; i < n; ++i) {
            const Float x_scale = Isa::all(rows.scale[(row + i) * rows.groups + g]);
            for (int c = 0; c < columns; ++c) {
                const Float factor = Isa::mul(scale[c], x_scale);
                out(i, c, [&](Float before) { return Isa::fma(Isa::number(sums[i][c]), factor, before); });
            }
        }
    }

    // out += what a group of floats adds, the tile's only one
    CM_INLINE void add_floats(Float (*out)[columns]) const {
        const size_t listed = rows.ids.size();
        const float* x = rows.values_of(row);
        const Float* w = reinterpret_cast<const Float*>(tile.codes) + column;
        for (int k = rows.first[g_begin] * kQuad; k < rows.first[g_begin + 1] * kQuad; ++k, w += kRegisters)
            for (int i = 0; i < n; ++i) {
                const Float factor = Isa::all(x[i * listed + k]);
                for (int c = 0; c < columns; ++c) out[i][c] = Isa::fma(factor, w[c], out[i][c]);
            }
    }

    float* at(int i, int c) const { return y + i * stride + c * Isa::kLanes; }

    // y += what the tile's only group adds; = with `fresh`
    template <int bits, int bytes>
    CM_INLINE void add_one(bool fresh) const {
        const auto before = [&](int i, int c) { return fresh ? Isa::all(0.0f) : Isa::load(at(i, c)); };
        if constexpr (bits == 32) {
            Float out[n][columns];
            for (int i = 0; i < n; ++i)
                for (int c = 0; c < columns; ++c) out[i][c] = before(i, c);
            add_floats(out);
            for (int i = 0; i < n; ++i)
                for (int c = 0; c < columns; ++c) Isa::store(at(i, c), out[i][c]);
        } else {
            add<bits, bytes>(g_begin, [&](int i, int c, auto more) { Isa::store(at(i, c), more(before(i, c))); });
        }
    }

    // y = or += what all groups of the tile, up to g_end, add together
    template <int bits, int bytes>
    CM_INLINE void add_sum(int64_t g_end, bool to_y) const {
        Float out[n][columns];
        for (int i = 0; i < n; ++i)
            for (int c = 0; c < columns; ++c) out[i][c] = Isa::all(0.0f);
        for (int64_t g = g_begin; g < g_end; ++g)
            add<bits, bytes>(g, [&](int i, int c, auto more) { out[i][c] = more(out[i][c]); });
        for (int i = 0; i < n; ++i)
            for (int c = 0; c < columns; ++c) Isa::store(at(i, c), to_y ? Isa::more(Isa::load(at(i, c)), out[i][c]) : out[i][c]);
    }
};

// Rows of x from `row` to `end` and all outputs of the tile, n rows at a time and what is left with smaller n. compute(block): see above.
template <int n, int columns, class Compute>
static CM_INLINE void blocks(const Tile& tile, const Rows& rows, int64_t g_begin, int row, int end, float* y, size_t stride,
                             Compute compute) {
    for (; row + n <= end; row += n)
        for (int column = 0; column < kRegisters; column += columns)
            compute(Block<n, columns>{tile, rows, g_begin, row, column, y + row * stride + column * Isa::kLanes, stride});
    if constexpr (n > 1) {
        if (row < end) blocks<n - 1, columns>(tile, rows, g_begin, row, end, y, stride, compute);
    }
}

constexpr int kDirectly = 4;  // rows up to which it is faster to unpack W again for every two or three of them than into a tile

// y of n rows of x from `row` on += what a group of W adds, at one panel; = with `fresh`. `now`: where its listed rows of W are,
// less the panel. Their sums fit into registers beside the codes of a quad.
template <int n>
static CM_INLINE void add_directly(const Matrix& m, const Rows& rows, int row, int64_t g, int64_t panel, const uint8_t* const* now,
                                   bool fresh, float* y, size_t stride) {
    const size_t listed = rows.ids.size();
    const int8_t* x = rows.codes_of(row) + rows.first[g] * kQuad;
    const int quads = rows.first[g + 1] - rows.first[g];
    Int sums[n][kRegisters];
    for (int i = 0; i < n; ++i)
        for (int r = 0; r < kRegisters; ++r) sums[i][r] = Isa::all(0);
    for (int quad = 0; quad < quads; ++quad, now += kQuad, x += kQuad) {
        Int codes[n];
        for (int i = 0; i < n; ++i) codes[i] = Isa::quad(x + i * listed);
        add_quad<Isa, 4, n>(now, panel * kPanel / 2, codes, sums);
    }
    for (int i = 0; i < n; ++i) part<Isa, 4>(sums[i]);
    const uint16_t* scales = m.scale + (g * m.panels + panel) * kPanel;
    for (int r = 0; r < kRegisters; ++r) {
        const int output = r * Isa::kLanes;
        const Int zeros = zeros_at<4>(m, g, panel * kPanel + output);
        const Float scale = Isa::half(scales + output);
        for (int i = 0; i < n; ++i) {
            const Float factor = Isa::mul(scale, Isa::all(rows.scale[(row + i) * rows.groups + g]));
            const Int sum = Isa::more(sums[i][r], taken_away<1>(zeros, rows, row + i, g));
            give(sum, factor, fresh, y + (row + i) * stride + output);
        }
    }
}

// Few rows: memory decides, and long stretches of a row of W are read, group after group.
template <int bits, int bytes>
static void few_rows(const Matrix& m, const Rows& rows, Groups groups, int64_t first, const Span* spans, int count) {
    constexpr bool kCanBeDirect = bits == 4 && Isa::kTwoCodes;
    const bool is_direct = kCanBeDirect && rows.count <= kDirectly;
    static thread_local Tile tile;
    tile.reserve(m.group / kQuad, 1);
    for (int64_t g = groups.begin; g < groups.end; ++g) {
        const int begin = rows.first[g], end = rows.first[g + 1], next = rows.first[std::min(g + 2, groups.end)];
        if (begin == end) continue;
        const uint8_t* now[kMaxGroup];
        for (int i = 0; i < (is_direct ? end - begin : 0) * kQuad; ++i)
            now[i] = m.codes + static_cast<size_t>(rows.ids[begin * kQuad + i]) * m.row_bytes();
        for (const Span* span = spans; span != spans + count; ++span)
            for (int64_t panel = span->begin; panel < span->end; ++panel) {
                const Piece<bits> later = Piece<bits>{m, rows.ids.data(), begin, end, panel}.later(spans, count, span, next);
                float* y = span->y + (panel - span->begin) * kPanel;
                later.ask_for(0);
                if constexpr (kCanBeDirect) {
                    if (is_direct) {
                        if (rows.count == 3) {
                            add_directly<3>(m, rows, 0, g, panel, now, g == first, y, span->stride);
                        } else {
                            for (int row = 0; row < rows.count; row += 2)
                                add_directly<2>(m, rows, row, g, panel, now, g == first, y, span->stride);
                        }
                        later.ask_for(1);
                        continue;
                    }
                }
                fill<bits>(tile, m, rows, g, g + 1, panel);
                later.ask_for(1);
                blocks<Isa::kRows / bytes, Isa::kColumns>(tile, rows, g, 0, rows.count, y, span->stride,
                                                          [&](const auto& block) { block.template add_one<bits, bytes>(g == first); });
            }
    }
}

// Many rows: arithmetic decides. All groups of a panel are unpacked, into the second cache, and summed in registers.
template <int bits, int bytes>
static void many_rows(const Matrix& m, const Rows& rows, Groups groups, const Span* spans, int count) {
    static thread_local Tile tile;
    for (const Span* span = spans; span != spans + count; ++span)
        for (int64_t panel = span->begin; panel < span->end; ++panel) {
            tile.reserve(rows.first[groups.end] - rows.first[groups.begin], groups.end - groups.begin);
            fill<bits>(tile, m, rows, groups.begin, groups.end, panel);
            blocks<Isa::kManyRows / bytes, Isa::kManyColumns>(
                tile, rows, groups.begin, span->first_row, span->end_row ? span->end_row : rows.count,
                span->y + (panel - span->begin) * kPanel, span->stride,
                [&](const auto& block) { block.template add_sum<bits, bytes>(groups.end, groups.add); });
        }
}

template <int bits, int bytes>
static void multiply_bits(const Matrix& m, const Rows& rows, Groups groups, const Span* spans, int count) {
    if constexpr (bits != 32) {
        if (rows.count > kFewRows) return many_rows<bits, bytes>(m, rows, groups, spans, count);
    }
    int64_t first = groups.begin;  // the group that y begins with
    while (first < groups.end && rows.first[first] == rows.first[first + 1]) ++first;
    if (first < groups.end)
        return (rows.count == 1 ? one_row<bits, bytes> : few_rows<bits, bytes>)(m, rows, groups, first, spans, count);
    for (const Span* span = spans; span != spans + count; ++span)
        for (int row = 0; row < rows.count; ++row)
            std::memset(span->y + row * span->stride, 0, (span->end - span->begin) * kPanel * sizeof(float));
}

static void multiply(const Matrix& m, const Rows& rows, Groups groups, const Span* spans, int count) {
    switch (m.bits) {
        case 4: return multiply_bits<4, 1>(m, rows, groups, spans, count);
        case 8:
            if (rows.bytes == 2) return multiply_bits<8, 2>(m, rows, groups, spans, count);
            return multiply_bits<8, 1>(m, rows, groups, spans, count);
        default: return multiply_bits<32, 1>(m, rows, groups, spans, count);
    }
}
