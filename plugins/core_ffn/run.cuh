// The definition of run_ffn: from values known at run time to kernels.
#pragma once

#include "kernels.h"
#include "run.h"

namespace cm {

template <class Reader>
Reader reader(const FfnCall& call, int which) {
    using T = typename Reader::Number;
    return Reader{Matrix<T>(call.weights[which], static_cast<const T*>(call.scales[which]), call.sizes.columns,
                            call.group, Reader::kColumns)};
}

template <class W, int kRows>
cudaError_t launch_gate_up(const FfnCall& call, const Lists& lists, const W& gate, const W& up, cudaStream_t stream) {
    using T = typename W::Number;
    const int64_t row_tiles = call.sizes.groups * tiles(call.sizes.rows_per_group, kRows);
    const GateUp<W> a{static_cast<const T*>(call.x), gate, up, lists, row_tiles, call.sizes.rows_per_group,
                      call.activation, static_cast<T*>(call.z)};
    const int64_t grid = row_tiles * tiles(lists.neurons, kGateUpWarps);
    return launch(gate_up<W, kRows>, grid, kGateUpWarps * kWarp, 0, stream, a);
}

// A kernel whose blocks each make a part of the sums of y [rows, columns], and what adds the parts up.
template <class W, class Kernel, class Arguments>
cudaError_t launch_sums(Kernel kernel, const Arguments& a, const FfnSizes& s, cudaStream_t stream) {
    using T = typename W::Number;
    const size_t shared = sizeof(float) * kDownWarps * kWarp * W::kColumns;
    const cudaError_t error =
        launch_early(kernel, a.row_tiles * a.column_tiles * a.splits, kDownWarps * kWarp, shared, stream, a);
    if (error != cudaSuccess || a.splits == 1) return error;
    const int64_t size = s.rows() * s.columns;
    return launch_early(add_splits<T>, tiles(size, kAddColumns), kAddGroups * kAddColumns,
                        sizeof(float) * kAddGroups * kAddColumns, stream, static_cast<const float*>(a.parts), a.splits,
                        size, a.y);
}

template <class W, int kRows>
cudaError_t launch_down(const FfnCall& call, const Lists& lists, const W& weights, cudaStream_t stream) {
    using T = typename W::Number;
    const FfnSizes& s = call.sizes;
    const int64_t row_tiles = s.groups * tiles(s.rows_per_group, kRows);
    const int32_t splits = down_splits(s, kRows, call.grid_blocks);
    const Down<W> a{static_cast<const T*>(call.z), weights, lists, row_tiles, column_tiles(s), s.rows(),
                    s.rows_per_group, splits, call.workspace, static_cast<T*>(call.y)};
    return launch_sums<W>(down<W, kRows>, a, s, stream);
}

template <class T, int kBits>
cudaError_t run_bits(const FfnCall& call, const Lists& lists, cudaStream_t stream) {
    using Aligned = Rows<T, kBits, true>;
    using Any = Rows<T, kBits, false>;
    const FfnSizes& s = call.sizes;
    bool fits = aligned(call.x, 16);
    for (const void* w : call.weights) fits = fits && fits_vectors(w, s.columns, kBits, call.group, sizeof(T));
    const Aligned gate = reader<Aligned>(call, 0), up = reader<Aligned>(call, 1);
    const int together = row_tile(s.rows_per_group), below = down_row_tile(s.rows_per_group, kBits);

    cudaError_t error;
    if (!fits) {
        const Any any[] = {reader<Any>(call, 0), reader<Any>(call, 1), reader<Any>(call, 2)};
        error = launch_gate_up<Any, 1>(call, lists, any[0], any[1], stream);
        return error != cudaSuccess ? error : launch_down<Any, 1>(call, lists, any[2], stream);
    }
    switch (together) {
        case 1: error = launch_gate_up<Aligned, 1>(call, lists, gate, up, stream); break;
        case 4: error = launch_gate_up<Aligned, 4>(call, lists, gate, up, stream); break;
        default: error = launch_gate_up<Aligned, 8>(call, lists, gate, up, stream); break;
    }
    if (error != cudaSuccess) return error;
    const Aligned weights = reader<Aligned>(call, 2);
    if constexpr (kBits == 0) {
        if (below == 8) return launch_down<Aligned, 8>(call, lists, weights, stream);
    }
    return below == 1 ? launch_down<Aligned, 1>(call, lists, weights, stream)
                      : launch_down<Aligned, 4>(call, lists, weights, stream);
}

template <class T>
cudaError_t run_ffn(const FfnCall& call, cudaStream_t stream) {
    const Lists lists{call.ids, call.listed, call.block, call.sizes.neurons, call.in_weights / call.block};
    switch (call.sizes.bits) {
        case 0: return run_bits<T, 0>(call, lists, stream);
        case 4: return run_bits<T, 4>(call, lists, stream);
        case 8: return run_bits<T, 8>(call, lists, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace cm
