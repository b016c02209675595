// The kernels of CoreFFN. Every weight is read once per group of rows, and the same inputs give the same bytes.
//
//   gate_up     one warp per neuron: both dot products at once, then z = act(gate) * up
//   down        one block per 32 chunks of columns and part of the neurons: its warps share the neurons, then add up
//   add_splits  the parts of y, added in their order
//
// Loads are issued in batches before any is used (kBatch of 16 bytes and two matrices, or kNeurons rows), because at
// batch 1 the speed is the number of bytes that are under way.
#pragma once

#include "activate.h"
#include "plan.h"
#include "rows.h"

namespace cm {

// Which neurons a group of rows reads.
struct Lists {
    const int32_t* ids;  // [groups, listed], blocks of neighbours; null: all neurons in their order
    int32_t listed;
    int32_t block;
    int32_t neurons;  // N = listed * block
    int32_t places;   // F / block: ids are below it

    // In two steps, so that ids can be under way while other work is done: what is at neuron n of the list, and
    // which row of the weights that means. An id below 0 lists nothing.
    __device__ int32_t id(int64_t group, int32_t n) const {
        const int32_t place = block == 1 ? n : n / block;
        return ids == nullptr ? place : ids[group * listed + place];
    }
    __device__ int64_t row(int32_t id, int32_t n) const {
        require(id < places, "a core neuron is not a row of the weights");
        const int32_t real = within(id, places);
        return block == 1 ? real : static_cast<int64_t>(real) * block + n % block;
    }
};

// Rows of x that one block handles: `count` of them from `first` on, all in group `group`.
struct RowTile {
    int64_t group;
    int64_t first;
    int32_t count;

    __device__ static RowTile at(int64_t tile, int32_t rows_per_group, int32_t rows) {
        const int64_t per_group = ceil_div(rows_per_group, rows);
        const int32_t start = static_cast<int32_t>(tile % per_group) * rows;
        const int64_t group = tile / per_group;
        const int32_t left = rows_per_group - start;
        return RowTile{group, group * rows_per_group + start, left < rows ? left : rows};
    }
    // A tile that is not full repeats its last row and stores it once.
    __device__ int64_t row(int32_t r) const { return first + (r < count ? r : count - 1); }
};

template <class W>
struct GateUp {
    const typename W::Number* x;  // [rows, D]
    W gate, up;
    Lists lists;
    int64_t row_tiles;
    int32_t rows_per_group;
    Activation activation;
    typename W::Number* z;  // [rows, N]
};

template <class W, int kRows>
__global__ void CM_THREADS(kGateUpWarps* kWarp) gate_up(GateUp<W> a) {
    using T = typename W::Number;
    constexpr int kColumns = W::kColumns;
    constexpr int kBatch = W::kVector ? 4 : 1;
    let_next_start();
    const int lane = threadIdx.x % kWarp;
    const int32_t n = static_cast<int32_t>(blockIdx.x / a.row_tiles) * kGateUpWarps + threadIdx.x / kWarp;
    if (n >= a.lists.neurons) return;
    const RowTile tile = RowTile::at(blockIdx.x % a.row_tiles, a.rows_per_group, kRows);
    const int32_t id = a.lists.id(tile.group, n);
    if (id < 0) {
        if (lane < tile.count) a.z[tile.row(lane) * a.lists.neurons + n] = from_float<T>(0.0f);
        return;
    }
    const int64_t neuron = a.lists.row(id, n);
    const int32_t columns = a.gate.m.columns;
    const int chunks = static_cast<int>(ceil_div(columns, kColumns));

    float gate[kRows] = {}, up[kRows] = {};
    for (int start = 0; start < chunks; start += kBatch * kWarp) {
        typename W::Raw gate_raw[kBatch], up_raw[kBatch];
        CM_UNROLL
        for (int i = 0; i < kBatch; ++i) {
            const int chunk = start + i * kWarp + lane;
            if (chunk < chunks) {
                gate_raw[i] = a.gate.fetch(neuron, chunk);
                up_raw[i] = a.up.fetch(neuron, chunk);
            }
        }
        CM_UNROLL
        for (int i = 0; i < kBatch; ++i) {
            const int chunk = start + i * kWarp + lane;
            if (chunk >= chunks) break;  // without a branch, ptxas moves each load down to where its numbers are used
            float of_gate[kColumns], of_up[kColumns];
            W::numbers(gate_raw[i], of_gate);
            W::numbers(up_raw[i], of_up);
            CM_UNROLL
            for (int r = 0; r < kRows; ++r) {
                float x[kColumns];
                load_numbers<T, kColumns, W::kVector>(a.x + tile.row(r) * columns, chunk * kColumns, columns, x);
                float of_chunk[2] = {W::kScaled ? 0.0f : gate[r], W::kScaled ? 0.0f : up[r]};
                CM_UNROLL
                for (int c = 0; c < kColumns; ++c) {
                    of_chunk[0] += x[c] * of_gate[c];
                    of_chunk[1] += x[c] * of_up[c];
                }
                if constexpr (W::kScaled) {
                    gate[r] += of_chunk[0] * W::factor(gate_raw[i]);
                    up[r] += of_chunk[1] * W::factor(up_raw[i]);
                } else {
                    gate[r] = of_chunk[0];
                    up[r] = of_chunk[1];
                }
            }
        }
    }
    CM_UNROLL
    for (int r = 0; r < kRows; ++r) {
        gate[r] = warp_sum(gate[r]);
        up[r] = warp_sum(up[r]);
        if (lane == 0 && r < tile.count) {
            a.z[tile.row(r) * a.lists.neurons + n] = from_float<T>(activate(a.activation, gate[r]) * up[r]);
        }
    }
}

// Where the sums of a block go: one tile of columns of one part of a sum.
template <class T>
struct Sums {
    T* y;          // [rows, columns]
    float* parts;  // [splits, rows, columns], if there is more than one split
    int64_t rows;
    int32_t columns;
    int32_t splits, split;
    int64_t column_tile;
};

// The warps' sums, added in the order of the warps.
template <class W, int kRows>
__device__ void add_warps(const float (&sum)[kRows][W::kColumns], const RowTile& tile,
                          const Sums<typename W::Number>& out) {
    constexpr int kColumns = W::kColumns;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    float* shared = reinterpret_cast<float*>(shared_memory());  // [warps][kColumns][lanes]
    CM_UNROLL  // or `sum` would move from registers to memory
    for (int r = 0; r < kRows; ++r) {
        CM_UNROLL
        for (int c = 0; c < kColumns; ++c) shared[(warp * kColumns + c) * kWarp + lane] = sum[r][c];
        __syncthreads();
        for (int i = threadIdx.x; i < kColumns * kWarp; i += kDownWarps * kWarp) {
            float total = 0.0f;
            CM_UNROLL
            for (int w = 0; w < kDownWarps; ++w) total += shared[w * kColumns * kWarp + i];
            const int64_t column = (out.column_tile * kWarp + i % kWarp) * static_cast<int64_t>(kColumns) + i / kWarp;
            if (column < out.columns && r < tile.count) {
                if (out.splits == 1) {
                    out.y[tile.row(r) * out.columns + column] = from_float<typename W::Number>(total);
                } else {
                    out.parts[(out.split * out.rows + tile.row(r)) * out.columns + column] = total;
                }
            }
        }
        __syncthreads();
    }
}

// Which terms of a long sum a warp adds: an eighth of those of its split.
struct Stretch {
    int64_t begin;
    int32_t end;

    __device__ static Stretch of_warp(int32_t terms, int32_t splits, int split, int warp) {
        const int32_t per_split = static_cast<int32_t>(ceil_div(terms, splits));
        const int32_t per_warp = static_cast<int32_t>(ceil_div(per_split, kDownWarps));
        const int64_t split_end = static_cast<int64_t>(split + 1) * per_split;
        const int32_t last = static_cast<int32_t>(split_end < terms ? split_end : terms);
        const int64_t begin = static_cast<int64_t>(split) * per_split + warp * per_warp;
        return Stretch{begin, static_cast<int32_t>(begin + per_warp < last ? begin + per_warp : last)};
    }
};

template <class W>
struct Down {
    const typename W::Number* z;  // [rows, N]
    W down;
    Lists lists;
    int64_t row_tiles;
    int64_t column_tiles;
    int64_t rows;
    int32_t rows_per_group;
    int32_t splits;
    float* parts;            // [splits, rows, D], if there is more than one split
    typename W::Number* y;  // [rows, D]
};

template <class W, int kRows>
__global__ void CM_THREADS(kDownWarps* kWarp) down(Down<W> a) {
    using T = typename W::Number;
    constexpr int kColumns = W::kColumns;
    constexpr int kNeurons = W::kVector ? 4 : 1;
    let_next_start();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t place = blockIdx.x / a.row_tiles;
    const int split = static_cast<int>(place / a.column_tiles);
    const int chunk = static_cast<int>(place % a.column_tiles) * kWarp + lane;
    const RowTile tile = RowTile::at(blockIdx.x % a.row_tiles, a.rows_per_group, kRows);
    const int32_t columns = a.down.m.columns, neurons = a.lists.neurons;
    const bool active = chunk * kColumns < columns;

    const auto [begin, end] = Stretch::of_warp(neurons, a.splits, split, warp);

    float sum[kRows][kColumns] = {};
    for (int64_t start = begin; start < end; start += kWarp) {
        // Lane i finds out which row neuron start + i is, and what its z are; the warp then asks it.
        const int32_t count = static_cast<int32_t>(end - start < kWarp ? end - start : kWarp);
        const int32_t mine = static_cast<int32_t>(start) + (lane < count ? lane : count - 1);
        const int32_t my_id = a.lists.id(tile.group, mine);
        const int32_t my_row = my_id < 0 ? -1 : static_cast<int32_t>(a.lists.row(my_id, mine));
        typename W::Raw raw[kNeurons] = {};  // zeros where nothing is read
        const auto read_rows = [&](int first, typename W::Raw* out) {
            CM_UNROLL
            for (int i = 0; i < kNeurons; ++i) {
                const int32_t row = __shfl_sync(kAllLanes, my_row, (first + i) % kWarp);
                if (active && first + i < count && row >= 0) out[i] = a.down.fetch(row, chunk);
            }
        };
        read_rows(0, raw);
        if (start == begin) wait_for_previous();  // z is being written while the first rows come
        float my_z[kRows];
        CM_UNROLL
        for (int r = 0; r < kRows; ++r) my_z[r] = lane < count ? to_float(a.z[tile.row(r) * neurons + mine]) : 0.0f;
        for (int first = 0; first < count; first += kNeurons) {
            typename W::Raw next[kNeurons] = {};
            read_rows(first + kNeurons, next);
            CM_UNROLL
            for (int i = 0; i < kNeurons; ++i) {
                float of_down[kColumns];
                W::numbers(raw[i], of_down);
                float factor = 1.0f;
                if constexpr (W::kScaled) factor = W::factor(raw[i]);
                CM_UNROLL
                for (int r = 0; r < kRows; ++r) {
                    const float weight = __shfl_sync(kAllLanes, my_z[r], (first + i) % kWarp) * factor;
                    CM_UNROLL
                    for (int c = 0; c < kColumns; ++c) sum[r][c] += weight * of_down[c];
                }
            }
            CM_UNROLL
            for (int i = 0; i < kNeurons; ++i) raw[i] = next[i];
        }
    }
    if (begin >= end) wait_for_previous();  // or this kernel could end before the one that it follows

    add_warps<W, kRows>(sum, tile, {a.y, a.parts, a.rows, columns, a.splits, split, place % a.column_tiles});
}

constexpr int kAddColumns = kWarp, kAddGroups = 8;

// Every eighth part is added by one warp, then the eight sums, in their order.
template <class T>
__global__ void CM_THREADS(kAddGroups* kAddColumns) add_splits(const float* parts, int32_t splits, int64_t size, T* y) {
    wait_for_previous();
    const int lane = threadIdx.x % kAddColumns, group = threadIdx.x / kAddColumns;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kAddColumns + lane;
    constexpr int kAtOnce = 8;
    float total = 0.0f;
    for (int start = group; i < size && start < splits; start += kAtOnce * kAddGroups) {
        float part[kAtOnce];
        CM_UNROLL
        for (int k = 0; k < kAtOnce; ++k) {
            const int s = start + k * kAddGroups;
            part[k] = s < splits ? parts[s * size + i] : 0.0f;
        }
        CM_UNROLL
        for (int k = 0; k < kAtOnce; ++k) total += part[k];
    }
    float* shared = reinterpret_cast<float*>(shared_memory());  // [groups][columns]
    shared[group * kAddColumns + lane] = total;
    __syncthreads();
    if (group > 0 || i >= size) return;
    total = 0.0f;
    CM_UNROLL
    for (int g = 0; g < kAddGroups; ++g) total += shared[g * kAddColumns + lane];
    y[i] = from_float<T>(total);
}

}  // namespace cm
