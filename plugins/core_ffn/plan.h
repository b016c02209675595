// How the work of one CoreFFN call is cut into blocks: plain arithmetic, shared by the workspace and the launches.
//
// Rows of x that read the same neurons form a group: all rows (no list), those of a request, or a single token.
// Within a group up to 8 rows are handled together, so a row of weights is read once for them.
#pragma once

#include <algorithm>
#include <cstdint>

namespace cm {

constexpr int kGateUpWarps = 4;
constexpr int kDownWarps = 8;
constexpr int kLeastPerSplit = 32;  // neurons: four for each warp of a block of the down product

struct FfnSizes {
    int32_t groups;          // lists of neurons
    int32_t rows_per_group;  // rows of x that share one list
    int32_t columns;         // D
    int32_t neurons;         // N, per row of x
    int32_t bits;            // 0, 4 or 8
    int32_t bytes;           // of one number of x

    int64_t rows() const { return static_cast<int64_t>(groups) * rows_per_group; }
};

// Columns that one thread handles at a time: 16 bytes of numbers or int8, 8 bytes of int4.
inline int chunk_columns(int bits, int bytes) { return bits ? 16 : 16 / bytes; }

// Rows of x that a block handles together. The down product keeps rows * chunk_columns sums in registers, at most 64.
inline int row_tile(int32_t rows_per_group) { return rows_per_group == 1 ? 1 : rows_per_group <= 4 ? 4 : 8; }
inline int down_row_tile(int32_t rows_per_group, int bits) {
    const int tile = row_tile(rows_per_group);
    return bits ? std::min(4, tile) : tile;
}

inline int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

inline int64_t column_tiles(const FfnSizes& s) { return tiles(s.columns, 32 * chunk_columns(s.bits, s.bytes)); }

// Parts into which the sum over neurons is cut, so that every block of the down product has a place at once: of the four
// per multiprocessor that `grid_blocks` stands for, registers leave three, and two with low-bit weights (docs/gpu.md).
inline int32_t down_splits(const FfnSizes& s, int tile, int32_t grid_blocks) {
    const int64_t without = column_tiles(s) * s.groups * tiles(s.rows_per_group, tile);
    const int64_t at_once = static_cast<int64_t>(grid_blocks) * (s.bits ? 2 : 3) / 4;
    const int64_t wanted = std::min<int64_t>(at_once / without, tiles(s.neurons, kLeastPerSplit));
    return static_cast<int32_t>(std::max<int64_t>(1, wanted));
}

// Bytes of partial sums for every shape up to `most`: splits * rows is bounded by the blocks times the rows of a block,
// so the largest shape alone would not do: it needs fewer splits.
inline int64_t ffn_workspace(const FfnSizes& most, int32_t grid_blocks) {
    const int64_t by_blocks = grid_blocks / column_tiles(most) * std::min<int64_t>(8, most.rows_per_group);
    const int64_t by_neurons = tiles(most.neurons, kLeastPerSplit) * most.rows();
    return std::max<int64_t>(0, std::min(by_blocks, by_neurons)) * most.columns * static_cast<int64_t>(sizeof(float));
}

}  // namespace cm
