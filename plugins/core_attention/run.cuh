// The definition of run_attention: from values known at run time to kernels.
#pragma once

#include "kernels.h"
#include "run.h"

namespace cm {

template <class T, int kQueries, bool kAligned>
cudaError_t launch_attention(const AttentionCall& call, cudaStream_t stream) {
    const AttentionSizes& s = call.sizes;
    const int32_t splits = attention_splits(s, kQueries, call.grid_blocks);
    const int32_t query_tiles = static_cast<int32_t>(ceil_div(s.queries_per_kv_head(), kQueries));
    const AttendShared shared(s.columns, sizeof(T), kQueries);
    const Attend<T> a{static_cast<const T*>(call.q), static_cast<const T*>(call.k), static_cast<const T*>(call.v),
                      static_cast<const T*>(call.mask), call.ids, s, call.mask_batch, splits, query_tiles, shared.rows,
                      shared.stride, call.scale, call.workspace, static_cast<T*>(call.y)};
    const int64_t grid = static_cast<int64_t>(query_tiles) * splits * s.batch * s.kv_heads;
    const cudaError_t error =
        launch(attend<T, kQueries, kAligned>, grid, kAttendThreads, shared.bytes, stream, a);
    if (error != cudaSuccess || splits == 1) return error;
    return launch_early(combine<T>, s.rows(), kCombineThreads, sizeof(float) * 2 * kCombineThreads, stream,
                        static_cast<const float*>(call.workspace), splits, s.rows(), s.columns,
                        static_cast<T*>(call.y));
}

template <class T>
cudaError_t run_attention(const AttentionCall& call, cudaStream_t stream) {
    const bool fits = call.sizes.columns % 8 == 0 && aligned(call.q, 16) && aligned(call.k, 16) &&
                      aligned(call.v, 16);
    if (!fits) return launch_attention<T, 1, false>(call, stream);
    switch (query_tile(call.sizes.queries_per_kv_head())) {
        case 1: return launch_attention<T, 1, true>(call, stream);
        case 4: return launch_attention<T, 4, true>(call, stream);
        default: return launch_attention<T, kMostQueries, true>(call, stream);
    }
}

}  // namespace cm
