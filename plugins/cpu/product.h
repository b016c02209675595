// The products, for one instruction set: included by its file, in its namespace, after
//
//     struct Isa           Int: a register of packed codes or of int32 sums, Float: of as many floats, kLanes of them
//         kRows, kColumns  rows of x and registers of outputs that are summed in registers at once, group by group
//         kManyRows, kManyColumns   the same where the sums of groups stay there, too
//         unpack<bits>     four rows of a panel of W -> bytes, four neighbours for one output, in the order of outputs
//         dot<bits>        sums + 4 codes of W * 4 codes of x, per lane
//         zeros            zero points of kLanes outputs; more_times(sums, zeros, n): sums + zeros * n, |n| < 2^15
//         times_high       each lane times kHigh
//         larger(a, b)     a if it is larger than b, else b
//         kTwoCodes        whether dot<8> is exact for every byte, so that one of two 4-bit codes can be multiplied as it is;
//                          then `pairs` are the bytes of four rows, and upper(pairs) their upper codes times 16
//
// A single row of x is the common case of writing an answer: W is unpacked in registers, and so it is for every two or three of few
// rows where a byte of two codes can be multiplied. Elsewhere rows share a tile: some groups of a panel are unpacked once, into a
// buffer that stays in a cache, and multiplied for every row.
// Every output is summed in the order of k, group by group, in both forms: results do not depend on who computes them.

using Int = Isa::Int;
using Float = Isa::Float;
constexpr int kRegisters = kPanel / Isa::kLanes;  // of a panel's outputs
static_assert(kRegisters % Isa::kColumns == 0 && kRegisters % Isa::kManyColumns == 0);

// Quads of one row of x are taken kTogether at a time, along all outputs: 32 rows of W, read side by side.
// What a larger group's quads have summed is kept in memory between two passes, as integers: in the first or second cache.
constexpr int kTogether = 8;

// How far ahead of what is multiplied W is asked for, in bytes along its rows: memory answers late, and processors follow by
// themselves only long stretches of few rows. A core waits where more than some 16 lines are on their way, so they are asked for
// a few at a time, between products.
constexpr int kAhead = 512;

// Where a panel's sums are few registers, loops over its quads are written out, and what differs is a template parameter: branches
// there make GCC keep sums in memory. Elsewhere that is large code, which takes a minute to compile.
constexpr bool kWrittenOut = kRegisters <= 8;

// Which cache lines are asked for into: AMD's Zen 4 reads up to twice as fast with the second one; Intel's Cascade Lake was measured
// with the first. kEither: found out when they are asked for.
enum class Cache { kFirst, kSecond, kEither };

// Whether short rows of W are asked for in windows, see below: measured on Intel's servers only.
template <Cache cache>
constexpr bool kWindows = kWrittenOut && cache == Cache::kFirst;

// Pointers to four rows of W, in registers: GCC would keep those of many rows in vector registers, and take them out there with the
// unit that multiplies.
struct Four {
    const uint8_t* rows[kQuad];

    CM_INLINE explicit Four(const uint8_t* const* from) {
        for (int i = 0; i < kQuad; ++i) {
            rows[i] = from[i];
            asm volatile("" : "+r"(rows[i]));
        }
    }

    template <int bytes, Cache cache>
    CM_INLINE void ask_for(int64_t offset) const {
        const bool second = cache == Cache::kEither ? kSecondCache : cache == Cache::kSecond;
        for (int i = 0; i < kQuad; ++i)
            for (int line = 0; line < bytes; line += 64) {
                if (second) {
                    __builtin_prefetch(rows[i] + offset + line, 0, 2);
                } else {
                    __builtin_prefetch(rows[i] + offset + line, 0, 3);
                }
            }
    }
};

// What is asked for while quad q is multiplied, `offset` bytes behind the beginnings of its rows `now`: what follows there,
template <int bytes, Cache cache>
struct Following {
    CM_INLINE void operator()(const Four& now, int, int64_t offset) const { now.ask_for<bytes, cache>(offset + kAhead); }
};

// other rows,
template <int bytes, Cache cache>
struct Others {
    const uint8_t* const* ahead;
    CM_INLINE void operator()(const Four&, int q, int64_t offset) const { Four(ahead + q * kQuad).ask_for<bytes, cache>(offset); }
};

// or nothing.
struct Nothing {
    CM_INLINE void operator()(const Four&, int, int64_t) const {}
};

// Processors read ahead by themselves, but only within pages (4 KB), and from 16 of them at once twice as fast as from one. Long rows of W
// lie in pages of their own. Short ones are neighbours: the 32 of a group fill so few pages that these end as soon as they have begun.
// So a second cache is asked for the listed rows of a window of 64 KB before it is their turn, in another order: the window is cut into 16
// streams, and one line of each is asked for after the other. Measured on Intel's servers: rows of 768 bytes are read 1.2 times as
// fast, those of 4 KB .95 times.
class Window {
public:
    // What is asked for while group g is multiplied, the groups before it were; null: nothing but what is near.
    static Window* before(const Matrix& m, const Rows& rows, Groups groups, int64_t g, const Span* spans, int count) {
        static thread_local Window window;
        if (m.row_bytes() > kShortRow || count != 1 || spans->end - spans->begin != m.panels) return nullptr;
        const int64_t bytes = m.group * static_cast<int64_t>(m.row_bytes()), most = kMaxRows * kStreams / m.group;
        const int64_t of_one = std::max<int64_t>(1, std::min(most, (kBytes + bytes / 2) / bytes));
        if ((g - groups.begin) % of_one == 0) window.fill(m, rows, g + of_one, std::min(g + 2 * of_one, std::max(groups.end, groups.follow)));
        return window.count_ ? &window : nullptr;
    }

    // Lines of the next turns, each of kAtOnce; and how many turns have been taken.
    CM_INLINE void ask_for(int64_t turn) const {
        const uint32_t* from = lines_.data() + std::min((turn_ + turn) * kAtOnce, count_ - kAtOnce);
        for (int i = 0; i < kAtOnce; ++i) __builtin_prefetch(codes_ + from[i], 0, 2);
    }
    void take(int64_t turns) { turn_ += turns; }

    static constexpr int kLine = 64;

private:
    static constexpr int kAtOnce = 4, kStreams = 16, kMaxRows = 32;  // lines; of a window; of a stream
    static constexpr int64_t kBytes = 64 << 10;
    static constexpr size_t kShortRow = 3 << 10;

    void fill(const Matrix& m, const Rows& rows, int64_t begin, int64_t end) {
        turn_ = count_ = 0;
        if (begin >= end) return;
        const int row_bytes = static_cast<int>(m.row_bytes()), of_stream = static_cast<int>((end - begin) * m.group) / kStreams;
        codes_ = m.codes + begin * m.group * m.row_bytes();
        const int64_t whole = rows.kept == m.inputs && end * m.group <= m.inputs ? (end - begin) * m.group * row_bytes : 0;
        if (whole != 0 && whole == whole_ && row_bytes == row_bytes_) return void(count_ = whole / kLine);  // the same lines again
        whole_ = whole, row_bytes_ = row_bytes;
        lines_.resize((static_cast<size_t>((end - begin) * m.group) + kAtOnce * of_stream) * row_bytes / kLine);
        uint32_t row_of[kMaxRows][kStreams];  // the i-th listed row of every stream that has one
        int streams[kMaxRows] = {}, last = -1, end_of_stream = of_stream, i = 0;
        const int32_t *id = rows.ids.data() + rows.first[begin] * kQuad, *last_id = rows.ids.data() + rows.first[end] * kQuad;
        for (const int first = static_cast<int>(begin * m.group); id != last_id; ++id) {
            const int row = *id - first;
            if (row <= last) continue;  // a quad is filled up
            for (last = row; row >= end_of_stream; end_of_stream += of_stream) i = 0;
            row_of[i][streams[i]++] = static_cast<uint32_t>(row * row_bytes), ++i;
        }
        uint32_t* out = lines_.data();
        for (i = 0; i < of_stream && streams[i]; ++i) {
            const int filled = (streams[i] + kAtOnce - 1) / kAtOnce * kAtOnce;
            for (int k = streams[i]; k < filled; ++k) row_of[i][k] = row_of[i][0];
            for (int line = 0; line < row_bytes; line += kLine)
                for (int k = 0; k < filled; k += kAtOnce, out += kAtOnce)
                    for (int j = 0; j < kAtOnce; ++j) out[j] = row_of[i][k + j] + line;
        }
        count_ = out - lines_.data();
    }

    const uint8_t* codes_ = nullptr;  // of the first row
    std::vector<uint32_t> lines_;     // bytes from there, in the order in which they are asked for
    int64_t count_ = 0, whole_ = 0;   // of them; bytes, where none is left out
    int row_bytes_ = 0;
    int64_t turn_ = 0;
};

// The same as `rest`, and lines of a window, of which a quad of a panel has a turn or two.
template <int bytes, class Rest>
struct Windowed {
    Rest rest;
    const Window& window;
    int quads;  // of a panel

    CM_INLINE void operator()(const Four& now, int q, int64_t offset) const {
        constexpr int kTurns = bytes / Window::kLine;
        rest(now, q, offset);
        for (int i = 0; i < kTurns; ++i) window.ask_for((offset / bytes * quads + q) * kTurns + i);
    }
};

// Calls multiply(what to ask for), `quads` times for every panel: what `near` asks for, and lines of the window.
template <int bytes, Cache cache, class Near, class Multiply>
static CM_INLINE void with_window(const Window* window, int quads, Near near, Multiply multiply) {
    if constexpr (kWindows<cache>) {
        if (window != nullptr) return multiply(Windowed<bytes, Near>{near, *window, quads});
    }
    multiply(near);
}

// Where the i-th listed row of W is.
static CM_INLINE const uint8_t* listed_row(const Matrix& m, const Rows& rows, int i) {
    return m.codes + static_cast<size_t>(rows.ids[i]) * m.row_bytes();
}

// Some of the listed rows of W, and as many that come after them in the list.
struct Listed {
    int count;
    const uint8_t *now[kMaxGroup], *next[kMaxGroup], *ahead[kMaxGroup];

    // Rows `begin` to `begin + count`, of those listed up to `end`.
    CM_INLINE Listed(const Matrix& m, const Rows& rows, int begin, int count, int end) : count(count) {
        for (int i = 0; i < count; ++i) {
            now[i] = listed_row(m, rows, begin + i);
            next[i] = listed_row(m, rows, std::min(begin + count + i, end - 1));
        }
    }

    // Calls multiply(span, first panel, last panel, what to ask for) for stretches of all spans.
    template <int bytes, Cache cache, class Multiply>
    CM_INLINE void each(const Span* spans, int spans_count, Multiply multiply) {
        for (const Span* span = spans; span != spans + spans_count; ++span) {
            // at the end of a span the next one is asked for, and at the end of the last one the rows that come next
            const int64_t turn = span->end - span->begin > kAhead / bytes ? span->end - kAhead / bytes : span->begin;
            multiply(*span, span->begin, turn, Following<bytes, cache>{});
            const bool is_last = span + 1 == spans + spans_count;
            const int64_t jump = ((is_last ? spans : span + 1)->begin - turn) * bytes;
            for (int i = 0; i < count; ++i) ahead[i] = (is_last ? next : now)[i] + jump;
            multiply(*span, turn, span->end, Others<bytes, cache>{ahead});
        }
    }
};

template <int code>
struct Middle {
    uint8_t of[kPanel] = {};
    constexpr Middle() {
        for (uint8_t& zero : of) zero = code;
    }
};

// A panel's zero points, and those where none are stored.
template <int bits>
static CM_INLINE const uint8_t* zeros_of(const Matrix& m, int64_t g, int64_t panel) {
    static constexpr Middle<1 << (bits - 1)> kMiddle;
    return m.zero != nullptr ? m.zero + (g * m.panels + panel) * kPanel : kMiddle.of;
}

// Sums of codes of W times codes of x, less zero points times the sum of the row's codes.
template <int bytes>
static CM_INLINE Int less_zeros(Int sums, Int zeros, const Rows& rows, int row, int64_t g) {
    if constexpr (bytes == 2) {
        const Int high = Isa::more_times(Isa::all(0), zeros, -rows.sum_of(row, 0)[g]);
        sums = Isa::more(sums, Isa::times_high(high));
    }
    return Isa::more_times(sums, zeros, -rows.sum_of(row, bytes - 1)[g]);
}

template <int bits>
static CM_INLINE void unpack(const uint8_t* const* rows, int64_t offset, Int* out) {
    Isa::template unpack<bits>(rows[0] + offset, rows[1] + offset, rows[2] + offset, rows[3] + offset, out);
}

// ---------------------------------------------------------------- one row of x

constexpr int kTimes = kWrittenOut ? kTogether : 1;  // that a loop is written out

// Quads of one group. With `first` sums begin, with `last` they end and become part of y, which begins with `fresh`.
struct Pass {
    int64_t g;
    int quad, quads;
    bool first, last, fresh;
};

alignas(64) static const Int kNothing[kRegisters] = {};  // sums that begin

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

alignas(64) static const float kNoSums[kPanel] = {};

// y of row `row` of x += what a group has summed, at one panel; = with `fresh`
template <int bits, int bytes>
static CM_INLINE void finish(const Matrix& m, const Rows& rows, int row, int64_t g, int64_t panel, Int* sums, bool fresh, float* y) {
    part<Isa, bits>(sums);
    const uint16_t* scale = m.scale + (g * m.panels + panel) * kPanel;
    const uint8_t* zero = zeros_of<bits>(m, g, panel);
    const Float x_scale = Isa::all(rows.scale[row * rows.groups + g]);
    const float* before = fresh ? kNoSums : y;
    for (int r = 0; r < kRegisters; ++r) {
        const int at = r * Isa::kLanes;
        const Int sum = less_zeros<bytes>(sums[r], Isa::template zeros<bits>(zero + at), rows, row, g);
        Isa::store(y + at, Isa::fma(Isa::number(sum), Isa::mul(Isa::half(scale + at), x_scale), Isa::load(before + at)));
    }
}

// Panels from `begin` to `end` of a span. `now`: rows of W, less the panel.
template <int bits, int bytes, int known, class Ask>
static CM_INLINE void stretch(const Matrix& m, const Rows& rows, const Pass& pass, const Span& span, int64_t begin, int64_t end,
                              const uint8_t* const* now, Ask ask_for, Int* sums) {
    constexpr int kBytes = kPanel * bits / 8;
    const int quads = known ? known : pass.quads;
    Int x[bytes][known ? known : kTogether];
    for (int byte = 0; byte < bytes; ++byte)
        for (int q = 0; q < quads; ++q)
            x[byte][q] = Isa::quad(rows.codes + byte * rows.ids.size() + (pass.quad + q) * kQuad);
    for (int64_t panel = begin; panel < end; ++panel) {
        Int *kept = sums + (panel - span.begin) * kRegisters, of[kRegisters];
        const Int* before = pass.first ? kNothing : kept;
        for (int r = 0; r < kRegisters; ++r) of[r] = before[r];
        const auto each = [&](auto add) {
#pragma GCC unroll kTimes
            for (int q = 0; q < quads; ++q) {
                const Four four(now + q * kQuad);
                ask_for(four, q, panel * kBytes);
                add(q, four.rows, panel * kBytes);
            }
        };
        if constexpr (bytes == 1) {
            each([&](int q, const uint8_t* const* four, int64_t at) { add_quad<Isa, bits, 1>(four, at, &x[0][q], &of); });
        } else {
            Int high[kRegisters];
            for (int r = 0; r < kRegisters; ++r) high[r] = Isa::all(0);
            each([&](int q, const uint8_t* const* four, int64_t at) { add_quad(four, at, x[0][q], x[1][q], high, of); });
            for (int r = 0; r < kRegisters; ++r) of[r] = Isa::more(of[r], Isa::times_high(high[r]));
        }
        if (!pass.last) {
            for (int r = 0; r < kRegisters; ++r) kept[r] = of[r];
        } else {
            finish<bits, bytes>(m, rows, 0, pass.g, panel, of, pass.fresh, span.y + (panel - span.begin) * kPanel);
        }
    }
}

template <int bits, int bytes, Cache cache, int known>
static void take(const Matrix& m, const Rows& rows, const Pass& pass, const Span* spans, int count, int last_quad, Window* window,
                 Int* sums) {
    constexpr int kBytes = kPanel * bits / 8;
    Listed listed(m, rows, pass.quad * kQuad, pass.quads * kQuad, last_quad * kQuad);
    listed.each<kBytes, cache>(spans, count, [&](const Span& span, int64_t begin, int64_t end, auto near) {
        with_window<kBytes, cache>(window, known ? known : pass.quads, near, [&](auto ask_for) {
            stretch<bits, bytes, known>(m, rows, pass, span, begin, end, listed.now, ask_for, sums);
        });
        if (end == span.end) sums += (span.end - span.begin) * kRegisters;
    });
    if (window != nullptr) window->take(pass.quads * m.panels * (kBytes / Window::kLine));
}

template <int bits, int bytes, Cache cache, int known = kWrittenOut && bits == 4 ? 1 : 0, class... More>
static CM_INLINE void take_quads(const Matrix& m, const Rows& rows, const Pass& pass, More... more) {
    if constexpr (known > 0 && known < kTogether) {
        if (pass.quads != known) return take_quads<bits, bytes, cache, known + 1>(m, rows, pass, more...);
    }
    take<bits, bytes, cache, known>(m, rows, pass, more...);
}

template <int bits, int bytes, Cache cache>
static void one_row(const Matrix& m, const Rows& rows, Groups groups, int64_t first, const Span* spans, int count) {
    static thread_local Aligned memory;
    int64_t panels = 0;
    for (const Span* span = spans; span != spans + count; ++span) panels += span->end - span->begin;
    Int* sums = memory.of<Int>(panels * kRegisters);
    const int last_quad = rows.first[groups.end];
    for (int64_t g = groups.begin; g < groups.end; ++g) {
        Window* window = kWindows<cache> ? Window::before(m, rows, groups, g, spans, count) : nullptr;
        const int begin = rows.first[g], end = rows.first[g + 1];
        for (int quad = begin, taken; quad < end; quad += taken) {
            const int left = end - quad;
            taken = left <= kTogether ? left : left < 2 * kTogether ? (left + 1) / 2 : kTogether;  // two halves: no short rest
            const Pass pass{g, quad, taken, quad == begin, taken == left, g == first};
            take_quads<bits, bytes, cache>(m, rows, pass, spans, count, last_quad, window, sums);
        }
    }
}

// The same with floats, whose sums are y.
template <Cache cache>
static void one_row_of_floats(const Matrix& m, const Rows& rows, Groups groups, int64_t first, const Span* spans, int count) {
    constexpr int kBytes = kPanel * sizeof(float);
    const int end = rows.first[groups.end] * kQuad;
    for (int64_t g = groups.begin; g < groups.end; ++g) {
        const int begin = rows.first[g] * kQuad, quads = rows.first[g + 1] - rows.first[g];
        if (quads == 0) continue;
        Listed listed(m, rows, begin, quads * kQuad, end);
        listed.each<kBytes, cache>(spans, count, [&](const Span& span, int64_t panel, int64_t last, auto ask_for) {
            for (; panel < last; ++panel) {
                float* y = span.y + (panel - span.begin) * kPanel;
                Float sums[kRegisters];
                for (int r = 0; r < kRegisters; ++r) sums[r] = g == first ? Isa::all(0.0f) : Isa::load(y + r * Isa::kLanes);
                for (int q = 0; q < quads; ++q) {
                    ask_for(Four(listed.now + q * kQuad), q, panel * kBytes);
                    for (int i = q * kQuad; i < (q + 1) * kQuad; ++i) {
                        const float* w = reinterpret_cast<const float*>(listed.now[i] + panel * kBytes);
                        const Float x = Isa::all(rows.values[begin + i]);
                        for (int r = 0; r < kRegisters; ++r) sums[r] = Isa::fma(x, Isa::load(w + r * Isa::kLanes), sums[r]);
                    }
                }
                for (int r = 0; r < kRegisters; ++r) Isa::store(y + r * Isa::kLanes, sums[r]);
            }
        });
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

// `row_at(i)`: where the i-th listed row of W is, less the panel.
template <int bits, class RowAt>
static CM_INLINE void fill(Tile& tile, const Matrix& m, const Rows& rows, int64_t g_begin, int64_t g_end, int64_t panel, RowAt row_at) {
    const int first = rows.first[g_begin], last = rows.first[g_end];
    if constexpr (bits == 32) {
        float* out = reinterpret_cast<float*>(tile.codes);
        for (int i = first * kQuad; i < last * kQuad; ++i, out += kPanel)
            std::memcpy(out, row_at(i) + panel * kPanel * sizeof(float), kPanel * sizeof(float));
    } else {
        for (int quad = first; quad < last; ++quad) {
            const uint8_t* four[kQuad];
            for (int i = 0; i < kQuad; ++i) four[i] = row_at(quad * kQuad + i);
            unpack<bits>(four, panel * kPanel * bits / 8, tile.codes + (quad - first) * kRegisters);
        }
        for (int64_t g = g_begin; g < g_end; ++g) {
            const uint16_t* scale = m.scale + (g * m.panels + panel) * kPanel;
            const uint8_t* zero = zeros_of<bits>(m, g, panel);
            for (int r = 0; r < kRegisters; ++r) {
                tile.scale[(g - g_begin) * kRegisters + r] = Isa::half(scale + r * Isa::kLanes);
                tile.zeros[(g - g_begin) * kRegisters + r] = Isa::template zeros<bits>(zero + r * Isa::kLanes);
            }
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
            for (int c = 0; c < columns; ++c) sums[i][c] = less_zeros<bytes>(Isa::all(0), zeros[c], rows, row + i, g);
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

// y of n rows of x from `row` on += what a group of W adds, at one panel; = with `fresh`. `now`: where its listed rows of W are,
// less the panel. Their sums fit into registers beside the codes of a quad.
template <int n, class Ask>
static CM_INLINE void add_directly(const Matrix& m, const Rows& rows, int row, int64_t g, int64_t panel, const uint8_t* const* now,
                                   Ask ask_for, bool fresh, float* y, size_t stride) {
    const size_t listed = rows.ids.size();
    const int8_t* x = rows.codes_of(row) + rows.first[g] * kQuad;
    const int quads = rows.first[g + 1] - rows.first[g];
    const int64_t at = panel * kPanel / 2;
    Int sums[n][kRegisters];
    for (int i = 0; i < n; ++i)
        for (int r = 0; r < kRegisters; ++r) sums[i][r] = Isa::all(0);
    for (int quad = 0; quad < quads; ++quad, x += kQuad) {
        const Four four(now + quad * kQuad);
        ask_for(four, quad, at);
        Int codes[n];
        for (int i = 0; i < n; ++i) codes[i] = Isa::quad(x + i * listed);
        add_quad<Isa, 4, n>(four.rows, at, codes, sums);
    }
#pragma GCC unroll kTimes
    for (int i = 0; i < n; ++i) finish<4, 1>(m, rows, row + i, g, panel, sums[i], fresh, y + (row + i) * stride);
}

// All rows of x, two or three at a time.
template <class Ask>
static CM_INLINE void directly(const Matrix& m, const Rows& rows, int64_t g, const Span& span, int64_t panel, int64_t last,
                              const uint8_t* const* now, Ask ask_for, bool fresh) {
    for (; panel < last; ++panel) {
        float* y = span.y + (panel - span.begin) * kPanel;
        // out of line, 16 rows take 1.3 times as long
        const auto take_at = [&](int row, auto ask) __attribute__((always_inline)) {
            const int left = rows.count - row, taken = left == 2 || left == 4 ? 2 : 3;
            taken == 2 ? add_directly<2>(m, rows, row, g, panel, now, ask, fresh, y, span.stride)
                       : add_directly<3>(m, rows, row, g, panel, now, ask, fresh, y, span.stride);
            return row + taken;
        };
        for (int row = take_at(0, ask_for); row < rows.count;) row = take_at(row, Nothing{});
    }
}

// The same, with each panel of the group unpacked into a tile.
template <int bits, int bytes, class Ask>
static void by_tile(Tile& tile, const Matrix& m, const Rows& rows, int64_t g, const Span& span, int64_t panel, int64_t last,
                    const uint8_t* const* now, Ask ask_for, bool fresh) {
    const int first = rows.first[g], quads = rows.first[g + 1] - first;
    for (; panel < last; ++panel) {
        const auto ask_for_quads = [&](int q, int end) {
            for (; q < end; ++q) ask_for(Four(now + q * kQuad), q, panel * kPanel * bits / 8);
        };
        ask_for_quads(0, quads / 2);
        fill<bits>(tile, m, rows, g, g + 1, panel, [&](int i) { return now[i - first * kQuad]; });
        ask_for_quads(quads / 2, quads);
        float* y = span.y + (panel - span.begin) * kPanel;
        blocks<Isa::kRows / bytes, Isa::kColumns>(tile, rows, g, 0, rows.count, y, span.stride,
                                                  [&](const auto& block) { block.template add_one<bits, bytes>(fresh); });
    }
}

// Few rows: memory decides, and long stretches of a row of W are read, group after group.
template <int bits, int bytes, Cache cache>
static void few_rows(const Matrix& m, const Rows& rows, Groups groups, int64_t first, const Span* spans, int count) {
    constexpr bool kDirectly = bits == 4 && Isa::kTwoCodes;
    static thread_local Tile tile;
    if constexpr (!kDirectly) tile.reserve(m.group / kQuad, 1);
    constexpr int kBytes = kPanel * bits / 8;
    const int end = rows.first[groups.end] * kQuad;
    for (int64_t g = groups.begin; g < groups.end; ++g) {
        Window* window = kWindows<cache> ? Window::before(m, rows, groups, g, spans, count) : nullptr;
        const int begin = rows.first[g] * kQuad, quads = rows.first[g + 1] - rows.first[g];
        if (quads == 0) continue;
        Listed listed(m, rows, begin, quads * kQuad, end);
        listed.each<kBytes, cache>(spans, count, [&](const Span& span, int64_t panel, int64_t last, auto near) {
            with_window<kBytes, cache>(window, quads, near, [&](auto ask_for) {
                if constexpr (kDirectly) {
                    directly(m, rows, g, span, panel, last, listed.now, ask_for, g == first);
                } else {
                    by_tile<bits, bytes>(tile, m, rows, g, span, panel, last, listed.now, ask_for, g == first);
                }
            });
        });
        if (window != nullptr) window->take(quads * m.panels * (kBytes / Window::kLine));
    }
}

// Many rows: arithmetic decides. All groups of a panel are unpacked, into the second cache, and summed in registers.
template <int bits, int bytes>
static void many_rows(const Matrix& m, const Rows& rows, Groups groups, const Span* spans, int count) {
    static thread_local Tile tile;
    for (const Span* span = spans; span != spans + count; ++span)
        for (int64_t panel = span->begin; panel < span->end; ++panel) {
            tile.reserve(rows.first[groups.end] - rows.first[groups.begin], groups.end - groups.begin);
            fill<bits>(tile, m, rows, groups.begin, groups.end, panel, [&](int i) { return listed_row(m, rows, i); });
            blocks<Isa::kManyRows / bytes, Isa::kManyColumns>(
                tile, rows, groups.begin, span->first_row, span->end_row ? span->end_row : rows.count,
                span->y + (panel - span->begin) * kPanel, span->stride,
                [&](const auto& block) { block.template add_sum<bits, bytes>(groups.end, groups.add); });
        }
}

template <int bits, int bytes, Cache cache>
static void multiply_bits(const Matrix& m, const Rows& rows, Groups groups, const Span* spans, int count) {
    if constexpr (bits != 32) {
        if (rows.count > kFewRows) return many_rows<bits, bytes>(m, rows, groups, spans, count);
    }
    int64_t first = groups.begin;  // the group that y begins with
    while (first < groups.end && rows.first[first] == rows.first[first + 1]) ++first;
    if (first < groups.end) {
        if (rows.count > 1) return few_rows<bits, bytes, cache>(m, rows, groups, first, spans, count);
        if constexpr (bits == 32) return one_row_of_floats<cache>(m, rows, groups, first, spans, count);
        else return one_row<bits, bytes, cache>(m, rows, groups, first, spans, count);
    }
    for (const Span* span = spans; span != spans + count; ++span)
        for (int row = 0; row < rows.count; ++row)
            std::memset(span->y + row * span->stride, 0, (span->end - span->begin) * kPanel * sizeof(float));
}

template <Cache cache>
static void multiply_with(const Matrix& m, const Rows& rows, Groups groups, const Span* spans, int count) {
    switch (m.bits) {
        case 4: return multiply_bits<4, 1, cache>(m, rows, groups, spans, count);
        case 8:
            if (rows.bytes == 2) return multiply_bits<8, 2, cache>(m, rows, groups, spans, count);
            return multiply_bits<8, 1, cache>(m, rows, groups, spans, count);
        default: return multiply_bits<32, 1, cache>(m, rows, groups, spans, count);
    }
}

static void multiply(const Matrix& m, const Rows& rows, Groups groups, const Span* spans, int count) {
    if constexpr (kWrittenOut) {
        return (kSecondCache ? multiply_with<Cache::kSecond> : multiply_with<Cache::kFirst>)(m, rows, groups, spans, count);
    } else {
        return multiply_with<Cache::kEither>(m, rows, groups, spans, count);
    }
}
