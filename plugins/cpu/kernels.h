// What the ops and the kernels of every instruction set agree on.
//
//     y[r, n] = sum over listed k of x[r, k] * W[k, n]        W[k, n] = scale[k / group, n] * (code[k, n] - zero[k / group, n])
//
// W is stored by inputs: all outputs of one k are neighbours ("a row of W"), so a k that is not listed is not read.
// Outputs come in panels of 128. x is rounded with one scale per row and group, to one byte or to two: 128 high + low, each
// multiplied by itself and added up as integers. Its listed k are taken four at a time ("a quad"): one dot product
// instruction with 32-bit lanes multiplies a quad for as many outputs as it has lanes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../core_ffn/activations.h"

namespace cm::cpu {

constexpr int kPanel = 128;  // outputs
constexpr int kQuad = 4;     // inputs
constexpr int kMaxGroup = 128;
constexpr int kRowsOfTile = 16;      // of x, where it comes in tiles
constexpr int kInputsOfTile = 32;    // and its inputs; every group has a multiple of them
constexpr int kFewRows = 16;      // rows of x up to which reading W decides the time, not arithmetic
constexpr int kManyRows = 320;    // taken at once, at most
constexpr int kHigh = 128;         // what the upper byte of x counts
constexpr int kStep = 16;         // floats: what attention computes with is filled up to a multiple of it
constexpr int kMaxHead = 512;     // numbers of a head of attention
constexpr int kMaxHeads = 32;     // of a token, or tokens of a head, attended to in one task
constexpr int kRemainder = 32;    // inputs of a remainder that share a scale
constexpr int kRemainderBytes = kRemainder / 2 + 2;  // of their codes and their scale
constexpr int kRounded = 32;      // numbers of a row of the cache that share a scale, where they are bytes

struct Matrix {
    int bits = 0;   // 4, 8 or 32
    int group = 0;  // inputs that share a scale
    int64_t inputs = 0, panels = 0;
    const uint8_t* codes = nullptr;   // whole rows; floats with 32 bits
    const uint16_t* scale = nullptr;  // float16 [groups, panels * 128]
    const uint8_t* zero = nullptr;    // the same shape; null: 8 or 128 everywhere

    int64_t groups() const { return (inputs + group - 1) / group; }
    int64_t steps() const { return groups() * group / kInputsOfTile; }
    size_t row_bytes() const { return static_cast<size_t>(panels) * kPanel * bits / 8; }
};

// Memory that begins where a register of any size may be stored.
class Aligned {
public:
    template <class Register>
    Register* of(size_t count) {
        const size_t needed = count * sizeof(Register) + 64;
        if (memory_.size() < needed) memory_.resize(needed);
        return reinterpret_cast<Register*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) & ~uintptr_t{63});
    }

private:
    std::vector<uint8_t> memory_;
};

// A block of rows of x, made ready for a product. The listed k are those that any of its rows keeps.
struct Rows {
    int count = 0;
    int bytes = 1;                 // of a number of x; two only with weights of 8 bits
    int64_t groups = 0, kept = 0;
    size_t words = 0;              // of 64 bits, per row of `keep`
    std::vector<uint64_t> keep;    // [count, words] one bit for each k
    std::vector<int32_t> ids;      // listed k, a multiple of four in every group: the last is filled up with its first
    std::vector<int32_t> first;    // [groups + 1] quad with which a group begins
    int64_t all_of = 0, in = 0;    // `ids` are all of so many k, in groups of so many; 0: they are not
    int8_t* codes = nullptr;       // [count, bytes, ids], the upper byte first; 0 where a row does not keep k
    std::vector<float> values;     // [count, ids] with weights of 32 bits
    std::vector<float> scale;      // [count, groups]
    std::vector<int32_t> sum;      // [count, bytes, groups] of codes
    // In place of all that is listed, with every k: x in bfloat16 [blocks of 16 rows, steps, 16, 32], 0 behind the last input.
    uint16_t* tiles = nullptr;

    void reserve_codes() { codes = memory_.of<int8_t>(count * bytes * ids.size()), tiles = nullptr; }
    int64_t blocks() const { return (count + kRowsOfTile - 1) / kRowsOfTile; }
    void reserve_tiles(int64_t steps) { tiles = memory_.of<uint16_t>(blocks() * kRowsOfTile * steps * kInputsOfTile); }
    const int8_t* codes_of(int row) const { return codes + static_cast<size_t>(row) * bytes * ids.size(); }
    const int32_t* sum_of(int row, int byte) const { return sum.data() + (static_cast<size_t>(row) * bytes + byte) * groups; }
    const float* values_of(int row) const { return values.data() + static_cast<size_t>(row) * ids.size(); }

private:
    Aligned memory_;
};

// Neighbouring panels, and where their outputs go.
struct Span {
    int64_t begin = 0, end = 0;
    float* y = nullptr;  // of panel `begin` and the first row of x; rows of y are `stride` floats apart
    size_t stride = 0;
    int first_row = 0, end_row = 0;  // of x, where there are many; end 0: all of them
};

// Neighbouring groups of inputs, whose products are summed before they become part of y. `add`: y has those of others, which
// takes more than kFewRows rows of x. `follow`: up to which group the same thread goes on, most likely.
struct Groups {
    int64_t begin = 0, end = 0;
    bool add = false;
    int64_t follow = 0;
};

// How a head of a query or a key is made of what its product gave: bias, norm over the head, rotation, factor.
struct Turn {
    const float *bias = nullptr, *norm = nullptr;  // [width]; null: none
    const float *cos = nullptr, *sin = nullptr;    // [rotary / 2], and for the second half `second` further on
    int width = 0, rotary = 0;                     // the first `rotary` numbers of a head are turned
    size_t second = 0;
    float epsilon = 0.0f, factor = 1.0f;
};

// What the rows of a cache are made of: floats; float16; or bytes, int8 [width], then for every kRounded of them a scale, bfloat16.
// All of them are in the order of the machine.
enum class Cells { kFloat, kHalf, kByte };

// Cells of a row of `width` numbers, and its bytes.
inline int64_t cells_of_row(Cells cells, int64_t width) {
    return width + (cells == Cells::kByte ? (width + kRounded - 1) / kRounded * 2 : 0);
}
inline size_t bytes_of_row(Cells cells, int64_t width) {
    return static_cast<size_t>(cells_of_row(cells, width)) * (cells == Cells::kFloat ? 4 : cells == Cells::kHalf ? 2 : 1);
}

// Queries of the same keys: the heads of one token that share them, or the same head of several tokens ("heads" here, too); and
// the rows of the cache that they see. Rows of q, y and scores are apart by a multiple of kStep floats.
struct Attention {
    int heads = 0, width = 0;
    size_t apart = 0;                  // floats from a head of q or y to the next: width, filled up
    const float* q = nullptr;          // turned, times the scale; 0 where it is filled up
    const uint8_t *keys = nullptr, *values = nullptr;  // of row 0
    Cells cells = Cells::kFloat;       // of their rows
    size_t row = 0;                    // bytes from one to the next
    const int32_t* rows = nullptr;     // [seen]
    const uint16_t* tiles = nullptr;   // of the head, from a key on that is the first of a step; what `tile_head` made
    const float* turned = nullptr;     // keys of the rows once more, [seen filled up / kStep, width, kStep]; null: there is no such copy
    const float* added = nullptr;      // [seen] by the mask, to the scores
    size_t added_apart = 0;            // floats from those of a head to the next one's; 0: the same for all
    int64_t seen = 0;
    float* scores = nullptr;           // [heads, seen, filled up] to work in
    float* y = nullptr;                // filled up, too
};

// The kernels of one instruction set.
struct Kernels {
    const char* name;
    bool (*usable)();
    // One bit for each k of a row: not (|x| * norm < threshold), so NaN counts. norm null: all.
    void (*keep)(const float* x, const float* norm, float threshold, int64_t inputs, uint64_t* bits);
    // Fills codes, scale and sum (or values) of some groups of one row, when keep, ids and first are there.
    void (*quantise)(const float* x, const Matrix&, Rows&, int row, int64_t first, int64_t last);
    // Writes all outputs of the spans: what these groups of inputs add to them.
    void (*multiply)(const Matrix&, const Rows&, Groups, const Span* spans, int count);
    // z = activation(gate) * up
    void (*gate)(Activation, const float* gate, const float* up, float* z, int64_t count);
    // sum [width] = what the parts have, one after the other, `apart` floats from one another
    void (*add_parts)(const float* parts, int64_t count, size_t apart, int64_t width, float* sum);
    // sum = x + added, y = sum / root mean square of sum * weight
    void (*normalise)(const float* x, const float* added, const float* weight, float epsilon, int64_t width, float* sum, float* y);
    // What a row of a remainder (refine.cpp) adds to its output: sum of x (code - 8) scale; `eights` [groups]: 8 times the sums of x.
    float (*remainder)(const uint8_t* row, const float* x, const float* eights, int64_t groups);
    // out = x, turned
    void (*turn)(const Turn&, const float* x, float* out);
    // y = softmax(q keys + added) values
    void (*attend)(const Attention&);
    // A row of a cache from numbers to halves or bytes and back; what back gave goes to the same row again.
    void (*round)(Cells, const float* x, int width, uint8_t* row);
    void (*widen_row)(Cells, const uint8_t* row, int width, float* x);
    // Fills `tiles` of 16 rows of x, `stride` floats apart, from row 16 * block on; null: there are no instructions for them.
    void (*widen)(const float* x, size_t stride, const Matrix&, Rows&, int block) = nullptr;
    // Where there are tiles: keys and values [keys, width] of a head -> tiles_of_keys(width) numbers for every kInputsOfTile keys,
    // the last of them filled up; and the same as `attend` with those.
    void (*tile_head)(const float* keys, const float* values, int64_t count, int64_t width, uint16_t* tiles) = nullptr;
    void (*attend_tiles)(const Attention&) = nullptr;
};

// Steps of kInputsOfTile numbers of a head, the last one filled up.
inline int64_t steps_of(int64_t width) { return (width + kInputsOfTile - 1) / kInputsOfTile; }

// Numbers of the tiles of kInputsOfTile keys and their values: keys are two parts (high and low), values one.
inline size_t tiles_of_keys(int64_t width) { return static_cast<size_t>(steps_of(width)) * kInputsOfTile * kInputsOfTile * 3; }

const Kernels* const* all_kernels();  // best first, ends with null
extern const bool kSecondCache;          // into which cache this processor is best asked for memory ahead
extern const Kernels kPortable;

}  // namespace cm::cpu
