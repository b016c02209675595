// The definition of run_linear: from values known at run time to kernels.
#pragma once

#include "../core_ffn/run.cuh"
#include "kernels.h"
#include "run.h"

namespace cm {

template <class W, int kRows>
cudaError_t launch_active(const LinearCall& call, cudaStream_t stream) {
    using T = typename W::Number;
    const FfnSizes& s = call.sizes;
    const int64_t row_tiles = s.groups * tiles(s.rows_per_group, kRows);
    const int32_t splits = down_splits(s, kRows, call.grid_blocks);
    const W weights{Matrix<T>(call.weights, static_cast<const T*>(call.scales), s.columns, call.group, W::kColumns)};
    const Active<W> a{static_cast<const T*>(call.x), weights, call.norm, call.thresholds, s.neurons, row_tiles,
                      column_tiles(s), s.rows(), s.rows_per_group, splits, call.workspace, static_cast<T*>(call.y)};
    return launch_sums<W>(read_active<W, kRows>, a, s, stream);
}

template <class T, int kBits>
cudaError_t run_linear_bits(const LinearCall& call, cudaStream_t stream) {
    using Aligned = Rows<T, kBits, true>;
    const FfnSizes& s = call.sizes;
    if (!fits_vectors(call.weights, s.columns, kBits, call.group, sizeof(T))) {
        return launch_active<Rows<T, kBits, false>, 1>(call, stream);
    }
    const int below = down_row_tile(s.rows_per_group, kBits);
    if constexpr (kBits == 0) {
        if (below == 8) return launch_active<Aligned, 8>(call, stream);
    }
    return below == 1 ? launch_active<Aligned, 1>(call, stream) : launch_active<Aligned, 4>(call, stream);
}

template <class T>
cudaError_t run_linear(const LinearCall& call, cudaStream_t stream) {
    switch (call.sizes.bits) {
        case 0: return run_linear_bits<T, 0>(call, stream);
        case 4: return run_linear_bits<T, 4>(call, stream);
        case 8: return run_linear_bits<T, 8>(call, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace cm
