// The kernel of CoreLinear: of the rows of a weight, one for each input, those that this row of x needs.
//
//   read_active   as `down` of CoreFFN: its warps share the inputs, then add up. A warp looks at 32 inputs at a time and
//                 walks only over those that weigh enough, so a row that is left out costs no load and no product
#pragma once

#include "../core_ffn/kernels.h"

namespace cm {

template <class W>
struct Active {
    const typename W::Number* x;  // [rows, D]
    W weights;                    // [D, N]
    const float* norm;            // [D]
    const float* thresholds;      // [groups]
    int32_t inputs;               // D
    int64_t row_tiles;
    int64_t column_tiles;
    int64_t rows;
    int32_t rows_per_group;
    int32_t splits;
    float* parts;           // [splits, rows, N], if there is more than one split
    typename W::Number* y;  // [rows, N]
};

template <class W, int kRows>
__global__ void CM_THREADS(kDownWarps* kWarp) read_active(Active<W> a) {
    constexpr int kColumns = W::kColumns;
    constexpr int kAtOnce = W::kVector ? 4 : 1;
    let_next_start();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t place = blockIdx.x / a.row_tiles;
    const int split = static_cast<int>(place / a.column_tiles);
    const int chunk = static_cast<int>(place % a.column_tiles) * kWarp + lane;
    const RowTile tile = RowTile::at(blockIdx.x % a.row_tiles, a.rows_per_group, kRows);
    const int32_t columns = a.weights.m.columns;
    const bool inside = chunk * kColumns < columns;

    const auto [begin, end] = Stretch::of_warp(a.inputs, a.splits, split, warp);

    wait_for_previous();  // x says which rows are read
    const float threshold = a.thresholds[tile.group];
    float sum[kRows][kColumns] = {};
    for (int64_t start = begin; start < end; start += kWarp) {
        const int32_t count = static_cast<int32_t>(end - start < kWarp ? end - start : kWarp);
        const int32_t mine = static_cast<int32_t>(start) + (lane < count ? lane : count - 1);
        const float norm = a.norm[mine];
        float x[kRows];
        bool needed = false;
        CM_UNROLL
        for (int r = 0; r < kRows; ++r) {
            const float value = to_float(a.x[tile.row(r) * a.inputs + mine]);
            const bool is_low = fabsf(value) * norm < threshold;  // what is no number is not below it
            x[r] = lane < count && !is_low ? value : 0.0f;
            needed = needed || (lane < count && !is_low);
        }
        uint32_t left = lanes_where(needed);
        const auto take = [&](int* lanes, typename W::Raw* out) {
            CM_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                lanes[i] = left == 0 ? -1 : first_lane(left);
                left &= left - 1;
                if (inside && lanes[i] >= 0) out[i] = a.weights.fetch(start + lanes[i], chunk);
            }
        };
        int lanes[kAtOnce];
        typename W::Raw raw[kAtOnce] = {};  // zeros where nothing is read
        take(lanes, raw);
        while (lanes[0] >= 0) {
            int next_lanes[kAtOnce];
            typename W::Raw next[kAtOnce] = {};
            take(next_lanes, next);
            CM_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                float of_row[kColumns];
                W::numbers(raw[i], of_row);
                float factor = 1.0f;
                if constexpr (W::kScaled) factor = W::factor(raw[i]);
                CM_UNROLL
                for (int r = 0; r < kRows; ++r) {
                    const float here = __shfl_sync(kAllLanes, x[r], lanes[i] < 0 ? 0 : lanes[i]);
                    const float weight = lanes[i] < 0 ? 0.0f : here * factor;
                    CM_UNROLL
                    for (int c = 0; c < kColumns; ++c) sum[r][c] += weight * of_row[c];
                }
            }
            CM_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                raw[i] = next[i];
                lanes[i] = next_lanes[i];
            }
        }
    }
    add_warps<W, kRows>(sum, tile, {a.y, a.parts, a.rows, columns, a.splits, split, place % a.column_tiles});
}

}  // namespace cm
