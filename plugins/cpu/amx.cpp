// AMX: Intel's servers since Sapphire Rapids. One instruction multiplies 16 rows of 32 inputs by 16 outputs, in bfloat16.
//
// For prompts and pictures, whose time is arithmetic: W is unpacked to bfloat16, scale and zero point included, and sums of
// all groups stay in tiles. Where single rows and several have to have the same bits (steps of decode), and with thresholds,
// avx512.cpp multiplies.
#include "target.h"
#if defined(CM_AMX)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"

namespace cm::cpu {
extern const Kernels kAvx512;
}

CM_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16")
namespace cm::cpu::amx {

#include "avx512.h"
#include "exponential.h"

using Int = Isa::Int;
using Float = Isa::Float;

#include "shares.h"

constexpr int kRegisters = kPanel / Isa::kLanes;  // columns of a panel, 16 outputs each
constexpr int64_t kMostSteps = 16;                // of W at a time, so that everything that is read again stays in the second cache

// Two floats in every 32 bits, that of `first` below.
static CM_INLINE Int beside(Float first, Float second) {
    const Int order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                                       18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (Int)_mm512_cvtne2ps_pbh(second, first));
}

// ---------------------------------------------------------------- x

// 16 rows of x, or what is left of them -> tiles, whose other rows are multiplied, too, but given to nobody. An infinite number
// becomes NaN, as with whole numbers (quantise.h).
static void widen(const float* x, size_t stride, const Matrix& m, Rows& rows, int block) {
    const int64_t steps = m.steps();
    const int count = std::min(rows.count - block * kRowsOfTile, kRowsOfTile);
    for (int row = 0; row < count; ++row) {
        const float* from = x + (static_cast<size_t>(block) * kRowsOfTile + row) * stride;
        uint16_t* to = rows.tiles + (block * steps * kRowsOfTile + row) * kInputsOfTile;
        for (int64_t at = 0; at < steps * kInputsOfTile; at += kInputsOfTile, to += kRowsOfTile * kInputsOfTile) {
            const int64_t left = std::max<int64_t>(m.inputs - at, 0);
            const uint32_t there = left >= kInputsOfTile ? ~0u : (1u << left) - 1;
            const auto part = [&](int i) {
                const Float v = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> i), from + at + i);
                return _mm512_add_ps(v, _mm512_sub_ps(v, v));
            };
            _mm512_storeu_si512(to, (Int)_mm512_cvtne2ps_pbh(part(Isa::kLanes), part(0)));
        }
    }
}

// ---------------------------------------------------------------- W

// Code k of each of four, at bit `low` of its byte, as 256 + code: the bits of a float below its exponent.
template <int bits, int low, int k>
static CM_INLINE Float above_256(Int codes) {
    constexpr int kShift = 15 - 8 * k - low;
    const Int moved = kShift > 0 ? _mm512_slli_epi32(codes, kShift > 0 ? kShift : 0) : _mm512_srli_epi32(codes, kShift > 0 ? 0 : -kShift);
    constexpr int kAndOr = 0xea;
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(moved, Isa::all(((1 << bits) - 1) << 15), Isa::all(0x43800000), kAndOr));
}

// Four inputs of 16 outputs -> two registers of W: (256 + code) * scale + less.
template <int bits, int low>
static CM_INLINE void numbers(Int codes, Float scale, Float less, Int* out) {
    const auto number = [&](Float code) { return Isa::fma(code, scale, less); };
    out[0] = beside(number(above_256<bits, low, 0>(codes)), number(above_256<bits, low, 1>(codes)));
    out[1] = beside(number(above_256<bits, low, 2>(codes)), number(above_256<bits, low, 3>(codes)));
}

// One step of a panel -> its tiles, `apart` registers from one column's to the next one's.
template <int bits>
static CM_INLINE void unpack(const Matrix& m, int64_t step, int64_t panel, const uint8_t* row, size_t row_bytes, Int* out,
                             int64_t apart) {
    const int64_t scales = (step * kInputsOfTile / m.group * m.panels + panel) * kPanel;
    Float scale[kRegisters], less[kRegisters];
    for (int r = 0; r < kRegisters; ++r) {
        scale[r] = Isa::half(m.scale + scales + r * Isa::kLanes);
        const Int zero = m.zero ? Isa::zeros<bits>(m.zero + scales + r * Isa::kLanes) : Isa::all(1 << (bits - 1));
        less[r] = Isa::mul(Isa::number(Isa::less(Isa::all(-256), zero)), scale[r]);
    }
    for (int quad = 0; quad < kInputsOfTile / kQuad; ++quad, out += 2) {
        const uint8_t* four[kQuad];
        for (int i = 0; i < kQuad; ++i, row += row_bytes) four[i] = row;
        Int codes[4];
        if constexpr (bits == 4) {
            Isa::pairs(four[0], four[1], four[2], four[3], codes);
            for (int r = 0; r < 4; ++r) numbers<4, 0>(codes[r], scale[r], less[r], out + r * apart);
            for (int r = 0; r < 4; ++r) numbers<4, 4>(codes[r], scale[4 + r], less[4 + r], out + (4 + r) * apart);
        } else {
            for (int half = 0; half < 2; ++half) {
                Isa::pairs(four[0] + 64 * half, four[1] + 64 * half, four[2] + 64 * half, four[3] + 64 * half, codes);
                for (int r = 4 * half; r < 4 * half + 4; ++r) numbers<8, 0>(codes[r - 4 * half], scale[r], less[r], out + r * apart);
            }
        }
    }
}

// ---------------------------------------------------------------- products

// While it lives, this thread's tiles have 16 rows of 64 bytes. By number, since instructions take nothing else: 0 to 3 are sums (two
// columns of the first 16 rows, two of the second), 4 and 5 x (the first rows, the second), 6 and 7 W (two columns).
struct Tiles {
    Tiles() {
        struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        for (int tile = 0; tile < 8; ++tile) shape.row_bytes[tile] = 64, shape.rows[tile] = kRowsOfTile;
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// Sums of 16 rows and 16 outputs, as a tile stores them.
using Sums = Float[kRowsOfTile];

// Sums of two columns of a panel, and the rows of one block of x or of two (`two`): = or += x W
template <bool two>
static CM_INLINE void multiply_columns(const uint16_t* x, size_t x_apart, const Int* w, int64_t w_apart, int64_t steps, Sums* sums,
                                       bool add) {
    asm volatile("" ::: "memory");  // what tiles load has been written
    if (add) {
        _tile_loadd(0, sums[0], 64);
        _tile_loadd(1, sums[1], 64);
        if (two) {
            _tile_loadd(2, sums[kRegisters], 64);
            _tile_loadd(3, sums[kRegisters + 1], 64);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; ++step, x += kRowsOfTile * kInputsOfTile, w += kRowsOfTile) {
        _tile_loadd(4, x, 64);
        _tile_loadd(6, w, 64);
        _tile_loadd(7, w + w_apart, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
            _tile_loadd(5, x + x_apart, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    if (two) {
        _tile_stored(2, sums[kRegisters], 64);
        _tile_stored(3, sums[kRegisters + 1], 64);
    }
}

// y = the sums of a panel's columns and some rows of a block of x
static CM_INLINE void give(const Sums* sums, int rows, float* y, size_t stride) {
    for (int row = 0; row < rows; ++row, y += stride)
        for (int column = 0; column < kRegisters; ++column) Isa::store(y + column * Isa::kLanes, sums[column][row]);
}

// Memory is read in long pieces of a row of W, since each row lies in another page: some steps of all panels of a span are copied
// first, then unpacked panel by panel.
template <int bits>
static void multiply_bits(const Matrix& m, const Rows& rows, Groups groups, const Span* spans, int count) {
    static thread_local Aligned copied, unpacked, summed;
    constexpr size_t kBytes = kPanel * bits / 8;
    const int64_t all = m.steps(), begin = groups.begin * m.group / kInputsOfTile, last = groups.end * m.group / kInputsOfTile;
    Int* w = unpacked.of<Int>(kMostSteps * kRowsOfTile * kRegisters);
    const Tiles tiles;
    for (const Span* span = spans; span != spans + count; ++span) {
        const int from = span->first_row, to = span->end_row ? span->end_row : rows.count;
        const int64_t blocks = (to - from + kRowsOfTile - 1) / kRowsOfTile;
        const size_t width = (span->end - span->begin) * kBytes;
        Sums* sums = summed.of<Sums>((span->end - span->begin) * blocks * kRegisters);
        uint8_t* codes = copied.of<uint8_t>(kMostSteps * kInputsOfTile * width);
        for (int64_t first = begin; first < last; first += kMostSteps) {
            const int64_t steps = std::min(kMostSteps, last - first);
            for (int64_t row = 0; row < steps * kInputsOfTile; ++row)
                std::memcpy(codes + row * width, m.codes + (first * kInputsOfTile + row) * m.row_bytes() + span->begin * kBytes, width);
            for (int64_t panel = span->begin; panel < span->end; ++panel) {
                for (int64_t step = 0; step < steps; ++step)
                    unpack<bits>(m, first + step, panel, codes + step * kInputsOfTile * width + (panel - span->begin) * kBytes, width,
                                 w + step * kRowsOfTile, steps * kRowsOfTile);
                for (int row = from; row < to; row += 2 * kRowsOfTile) {
                    const int here = std::min(to - row, kRowsOfTile), next = std::min(to - row - here, kRowsOfTile);
                    const uint16_t* x = rows.tiles + (row / kRowsOfTile * all + first) * kRowsOfTile * kInputsOfTile;
                    Sums* of_rows = sums + ((panel - span->begin) * blocks + (row - from) / kRowsOfTile) * kRegisters;
                    const size_t x_apart = static_cast<size_t>(all) * kRowsOfTile * kInputsOfTile, w_apart = steps * kRowsOfTile;
                    for (int column = 0; column < kRegisters; column += 2)
                        (next ? multiply_columns<true> : multiply_columns<false>)(x, x_apart, w + column * w_apart, w_apart, steps,
                                                                                 of_rows + column, first > begin);
                    if (first + steps < last) continue;
                    float* y = span->y + row * span->stride + (panel - span->begin) * kPanel;
                    give(of_rows, here, y, span->stride);
                    give(of_rows + kRegisters, next, y + kRowsOfTile * span->stride, span->stride);
                }
            }
        }
    }
}

static void multiply(const Matrix& m, const Rows& rows, Groups groups, const Span* spans, int count) {
    if (rows.tiles == nullptr) return kAvx512.multiply(m, rows, groups, spans, count);
    return m.bits == 4 ? multiply_bits<4>(m, rows, groups, spans, count) : multiply_bits<8>(m, rows, groups, spans, count);
}

// ---------------------------------------------------------------- attention of a prompt

// Scores are made of three products, since they are exponents: x = high + low, both
// bfloat16, and low * low is left out. Shares and values are bfloat16 alone.
constexpr size_t kTile = kRowsOfTile * kInputsOfTile;  // numbers
constexpr int kKeyTiles = kInputsOfTile / kRowsOfTile; // tiles of keys, 16 each, in a step of values

// 32 floats at p, of which `there` are read, and 0: their upper bits, and the upper bits of what is left.
static CM_INLINE void halve(const float* p, int64_t there, Int& high, Int& low) {
    const uint32_t mask = there >= kInputsOfTile ? ~0u : (there > 0 ? (1u << there) - 1 : 0);
    const Float a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
    const Float b = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> Isa::kLanes), p + Isa::kLanes);
    high = (Int)_mm512_cvtne2ps_pbh(b, a);
    const auto rest = [](Float v, __m256i bits) {
        return _mm512_sub_ps(v, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
    };
    low = (Int)_mm512_cvtne2ps_pbh(rest(b, _mm512_extracti64x4_epi64(high, 1)), rest(a, _mm512_castsi512_si256(high)));
}

// For 32 keys: [2 tiles of keys, steps, high and low] of K^T, then [2 * steps] of V.
static void tile_head(const float* keys, const float* values, int64_t count, int64_t width, uint16_t* tiles) {
    const int64_t steps = steps_of(width);
    for (int64_t first = 0; first < count; first += kInputsOfTile) {
        uint32_t* of_keys = reinterpret_cast<uint32_t*>(tiles);
        for (int64_t key = 0; key < kInputsOfTile; ++key)
            for (int64_t step = 0; step < steps; ++step) {
                alignas(64) uint32_t pairs[2][kRowsOfTile];
                Int high = Isa::all(0), low = Isa::all(0);
                if (first + key < count)
                    halve(keys + (first + key) * width + step * kInputsOfTile, width - step * kInputsOfTile, high, low);
                _mm512_store_si512(pairs[0], high);
                _mm512_store_si512(pairs[1], low);
                uint32_t* to = of_keys + (key / kRowsOfTile * steps + step) * 2 * (kTile / 2) + key % kRowsOfTile;
                for (int part = 0; part < 2; ++part)
                    for (int pair = 0; pair < kRowsOfTile; ++pair) to[part * (kTile / 2) + pair * kRowsOfTile] = pairs[part][pair];
            }
        Int* of_values = reinterpret_cast<Int*>(tiles + kKeyTiles * steps * 2 * kTile);
        for (int64_t at = 0; at < 2 * steps; ++at)
            for (int pair = 0; pair < kRowsOfTile; ++pair) {
                const int64_t left = std::min<int64_t>(std::max<int64_t>(width - at * Isa::kLanes, 0), Isa::kLanes), key = first + 2 * pair;
                const auto there = static_cast<__mmask16>((1u << left) - 1);
                const float* from = values + key * width + at * Isa::kLanes;
                const Float one = _mm512_maskz_loadu_ps(key < count ? there : 0, from);
                const Float other = _mm512_maskz_loadu_ps(key + 1 < count ? there : 0, from + width);
                _mm512_store_si512(of_values++, beside(one, other));
            }
        tiles += tiles_of_keys(width);
    }
}

// Scores of all queries and 32 keys: tiles 0 to 3 are sums, of two tiles of queries and two of keys.
template <bool two>
static CM_INLINE void score(const uint16_t* q, const uint16_t* keys, int64_t steps, float* scores, size_t stride) {
    const size_t row = stride * sizeof(float), of_block = static_cast<size_t>(steps) * 2 * kTile;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step, q += 2 * kTile, keys += 2 * kTile) {
        const auto add = [&](size_t of_q, size_t of_keys) __attribute__((always_inline)) {
            _tile_loadd(4, q + of_q, 64);
            _tile_loadd(6, keys + of_keys, 64);
            _tile_loadd(7, keys + of_block + of_keys, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (two) {
                _tile_loadd(5, q + of_block + of_q, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        };
        add(0, kTile), add(kTile, 0), add(0, 0);
    }
    _tile_stored(0, scores, row);
    _tile_stored(1, scores + kRowsOfTile, row);
    if (two) {
        _tile_stored(2, scores + kRowsOfTile * stride, row);
        _tile_stored(3, scores + kRowsOfTile * stride + kRowsOfTile, row);
    }
}

// y = shares * values, 32 numbers of a head.
template <bool two>
static CM_INLINE void mix(const uint16_t* shares, size_t stride, const uint16_t* values, size_t apart, int64_t key_steps, float* y,
                          size_t y_stride) {
    const size_t row = stride * sizeof(uint16_t), y_row = y_stride * sizeof(float);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < key_steps; ++step, shares += kInputsOfTile, values += apart) {
        _tile_loadd(4, shares, row);
        _tile_loadd(6, values, 64);
        _tile_loadd(7, values + kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
            _tile_loadd(5, shares + kRowsOfTile * stride, row);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, y, y_row);
    _tile_stored(1, y + kRowsOfTile, y_row);
    if (two) {
        _tile_stored(2, y + kRowsOfTile * y_stride, y_row);
        _tile_stored(3, y + kRowsOfTile * y_stride + kRowsOfTile, y_row);
    }
}

static void attend_tiles(const Attention& a) {
    static_assert(kMaxHeads == 2 * kRowsOfTile);
    static thread_local Aligned of_q, of_scores, of_shares, of_y;
    const int64_t steps = steps_of(a.width), key_steps = steps_of(a.seen), filled = key_steps * kInputsOfTile;
    const size_t apart = tiles_of_keys(a.width), wide = static_cast<size_t>(steps) * kInputsOfTile;
    const size_t stride = static_cast<size_t>(filled) + kInputsOfTile;  // not a power of two
    const bool two = a.heads > kRowsOfTile;
    uint16_t* q = of_q.of<uint16_t>(kMaxHeads * wide * 2);
    float *scores = of_scores.of<float>(kMaxHeads * stride), *y = of_y.of<float>(kMaxHeads * wide);
    uint16_t* shares_of = of_shares.of<uint16_t>(kMaxHeads * stride);
    for (int query = 0; query < (two ? 2 : 1) * kRowsOfTile; ++query)
        for (int64_t step = 0; step < steps; ++step) {
            Int high = Isa::all(0), low = Isa::all(0);
            if (query < a.heads) halve(a.q + query * a.apart + step * kInputsOfTile, a.width - step * kInputsOfTile, high, low);
            uint16_t* to = q + ((query / kRowsOfTile * steps + step) * 2) * kTile + query % kRowsOfTile * kInputsOfTile;
            _mm512_store_si512(to, high);
            _mm512_store_si512(to + kTile, low);
        }
    const Tiles tiles;
    asm volatile("" ::: "memory");  // what tiles load has been written
    for (int64_t step = 0; step < key_steps; ++step)
        (two ? score<true> : score<false>)(q, a.tiles + step * apart, steps, scores + step * kInputsOfTile, stride);
    float inverse[kMaxHeads];
    for (int query = 0; query < a.heads; ++query) {
        float* row = scores + query * stride;
        inverse[query] = 1.0f / shares(row, a.added + query * a.added_apart, a.seen, filled);
        for (int64_t i = 0; i < filled; i += kInputsOfTile)
            _mm512_store_si512(shares_of + query * stride + i, (Int)_mm512_cvtne2ps_pbh(Isa::load(row + i + Isa::kLanes), Isa::load(row + i)));
    }
    asm volatile("" ::: "memory");
    const uint16_t* values = a.tiles + kKeyTiles * steps * 2 * kTile;
    for (int64_t step = 0; step < steps; ++step)
        (two ? mix<true> : mix<false>)(shares_of, stride, values + step * 2 * kTile, apart, key_steps, y + step * kInputsOfTile, wide);
    for (int query = 0; query < a.heads; ++query)
        for (int i = 0; i < a.width; ++i) a.y[query * a.apart + i] = y[query * wide + i] * inverse[query];
}

}  // namespace cm::cpu::amx
CM_TARGET_END

namespace cm::cpu {
// The processor multiplies tiles of bfloat16, and Linux lets this process use them (it asks, since signal frames grow by them).
static bool usable() {
    constexpr uint32_t kTile = 1u << 24, kTileBf16 = 1u << 22, kBf16 = 1u << 5;
    constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = [&] {
        uint32_t a, a1, b, c, d, d1;
        __cpuid_count(7, 0, a, b, c, d);
        __cpuid_count(7, 1, a1, b, c, d1);
        return (d & kTile) && (d & kTileBf16) && (a1 & kBf16) && kAvx512.usable() &&
               syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
    }();
    return granted;
}

extern const Kernels kAmx;
const Kernels kAmx = [] {
    Kernels k = kAvx512;  // is there before anything that has to be computed
    k.name = "amx-bf16", k.usable = usable, k.multiply = amx::multiply, k.widen = amx::widen;
    k.tile_head = amx::tile_head, k.attend_tiles = amx::attend_tiles;
    return k;
}();
}  // namespace cm::cpu
#endif
