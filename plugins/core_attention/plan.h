// How the work of one CoreAttention call is cut into blocks: plain arithmetic, for the workspace and the launches.
//
// The queries of a key/value head are its H/Hk heads times S positions. Up to 8 of them are handled together, so a row
// of the cache is read once for them; the listed rows are cut into splits, so that small batches fill the chip.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

namespace cm {

constexpr int kAttendThreads = 256;
constexpr int kMostQueries = 8;    // handled together: one warp each for their softmax
constexpr int kLeastRows = 64;     // of the cache, per split
constexpr int kMostRows = 64;      // of the cache that a block holds at a time
constexpr int kMostColumns = 256;  // one thread each

struct AttentionSizes {
    int32_t batch, heads, kv_heads, queries;  // B, H, Hk, S
    int32_t cached;                           // P
    int32_t listed;                           // M, or P without a list
    int32_t columns;                          // d

    __host__ __device__ int32_t queries_per_kv_head() const { return heads / kv_heads * queries; }
    __host__ __device__ int64_t rows() const { return static_cast<int64_t>(batch) * heads * queries; }
};

inline int query_tile(int32_t queries) { return queries == 1 ? 1 : queries <= 4 ? 4 : kMostQueries; }

inline int32_t attention_splits(const AttentionSizes& s, int tile, int32_t grid_blocks) {
    const int64_t tiles = (s.queries_per_kv_head() + tile - 1) / tile;
    const int64_t without = tiles * s.batch * s.kv_heads;
    const int64_t wanted = std::min<int64_t>(grid_blocks / without, (s.listed + kLeastRows - 1) / kLeastRows);
    return static_cast<int32_t>(std::max<int64_t>(1, wanted));
}

// Bytes of the parts of every shape up to `most`: per split and row its sum, its maximum and d numbers.
inline int64_t attention_workspace(const AttentionSizes& most, int32_t grid_blocks) {
    const int64_t together = std::min<int64_t>(kMostQueries, most.queries_per_kv_head());
    const int64_t splits = (most.listed + kLeastRows - 1) / kLeastRows;
    const int64_t parts = std::min<int64_t>(grid_blocks * together, splits * most.rows());
    return std::max<int64_t>(0, parts) * (most.columns + 2) * static_cast<int64_t>(sizeof(float));
}

// What a block of `attend` keeps in shared memory, in floats: its rows of K and V padded so that threads which read
// different rows meet in no bank, the scores or weights [row][query], q [query][column] and three sums of each query.
struct AttendShared {
    int32_t rows;    // held at a time
    int32_t stride;  // numbers from one row of K or V to the next
    size_t bytes;

    AttendShared(int32_t columns, int number_bytes, int queries) {
        constexpr size_t kMost = 48 * 1024;  // what every GPU gives without being asked
        const int whole = (columns + 7) / 8 * 8;
        stride = whole + 16 / number_bytes;
        const size_t fixed = sizeof(float) * (queries * whole + 3 * kMostQueries);  // whole 16 bytes
        const size_t per_row = 2 * static_cast<size_t>(stride) * number_bytes + sizeof(float) * queries;
        rows = kMostRows;
        while (fixed + rows * per_row > kMost) rows /= 2;
        // at the end the weighted rows of all threads lie where K and V were
        bytes = std::max(fixed + rows * per_row, fixed + sizeof(float) * queries * kAttendThreads);
    }
};

}  // namespace cm
