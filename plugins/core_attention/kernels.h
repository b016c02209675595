// The kernels of CoreAttention: softmax over the listed rows in one pass, in splits that are combined in their order.
//
//   attend    a row of the cache lies in L lanes, 8 numbers each (L = 16 for d = 128): 32/L rows per warp at once. Each
//             such team keeps, per query, the maximum m, the sum l of exp(score - m) and the weighted rows o
//   combine   (m, l, o) of all splits -> y = sum exp(m_i - m) o_i / sum exp(m_i - m) l_i
//
// A score of -inf adds nothing; a team or split that has seen no row has m = -inf and weighs nothing.
#pragma once

#include "../native/numbers.h"
#include "plan.h"

namespace cm {

template <class T>
struct Attend {
    const T *q, *k, *v, *mask;
    const int32_t* ids;  // [B,M]; null: all rows
    AttentionSizes sizes;
    int32_t mask_batch;  // 1 or B
    int32_t splits;
    int32_t query_tiles;
    int32_t lanes_per_row;
    float scale;
    float* parts;  // [splits, rows] of (o[d], m, l), if there is more than one split
    T* y;
};

// Softmax so far: a maximum, a sum and this lane's part of the weighted rows.
struct Softmax {
    float m = -INFINITY;
    float l = 0.0f;
    float o[kLaneColumns] = {};

    __device__ void add(float score, const float* row) {
        if (score == -INFINITY) return;
        const float most = fmaxf(m, score);
        const float before = expf(m - most);  // exp(-inf) = 0 for the first row
        const float weight = expf(score - most);
        m = most;
        l = l * before + weight;
        CM_UNROLL
        for (int c = 0; c < kLaneColumns; ++c) o[c] = o[c] * before + weight * row[c];
    }
    __device__ void merge(float other_m, float other_l, const float* other_o) {
        if (other_m == -INFINITY) return;
        const float most = fmaxf(m, other_m);
        const float mine = expf(m - most), others = expf(other_m - most);
        m = most;
        l = l * mine + other_l * others;
        CM_UNROLL
        for (int c = 0; c < kLaneColumns; ++c) o[c] = o[c] * mine + other_o[c] * others;
    }
};

// Columns `first`.. of a row of d numbers, zeros past its end.
template <class T, bool kAligned>
__device__ inline void lane_columns(const T* row, int first, int columns, float* out) {
    if (first < columns) {
        load_numbers<T, kLaneColumns, kAligned>(row, first, columns, out);
    } else {
        CM_UNROLL
        for (int c = 0; c < kLaneColumns; ++c) out[c] = 0.0f;
    }
}

template <class T, int kQueries, bool kAligned>
__global__ void CM_THREADS(kAttendWarps* kWarp) attend(Attend<T> a) {
    constexpr int kBatch = kQueries > 1 ? 2 : 4;  // rows of a team under way
    const AttentionSizes& s = a.sizes;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int teams_per_warp = kWarp / a.lanes_per_row, teams = kAttendWarps * teams_per_warp;
    const int team = warp * teams_per_warp + lane / a.lanes_per_row;
    const int first = lane % a.lanes_per_row * kLaneColumns;

    const int query_start = static_cast<int>(blockIdx.x % a.query_tiles) * kQueries;
    const int64_t place = blockIdx.x / a.query_tiles;
    const int split = static_cast<int>(place % a.splits);
    const int64_t kv = place / a.splits;  // b * Hk + g
    const int b = static_cast<int>(kv / s.kv_heads);
    const int all_queries = s.queries_per_kv_head();

    // Query i of a key/value head: head i / S of its group, position i % S; as a row of [B,H,S] that is consecutive.
    float q[kQueries][kLaneColumns];
    const T* mask[kQueries];
    Softmax softmax[kQueries];
    CM_UNROLL
    for (int j = 0; j < kQueries; ++j) {
        const int i = query_start + j < all_queries ? query_start + j : all_queries - 1;
        lane_columns<T, kAligned>(a.q + (kv * all_queries + i) * s.columns, first, s.columns, q[j]);
        const int64_t mask_row = static_cast<int64_t>(a.mask_batch == 1 ? 0 : b) * s.queries + i % s.queries;
        mask[j] = a.mask + mask_row * s.cached;
    }

    const int32_t per_split = static_cast<int32_t>(ceil_div(s.listed, a.splits));
    const int32_t begin = split * per_split;
    const int32_t end = begin + per_split < s.listed ? begin + per_split : s.listed;
    // The same number of rounds for every team: shuffles need whole warps.
    for (int32_t round = begin; round < end; round += kBatch * teams) {
        float k[kBatch][kLaneColumns], v[kBatch][kLaneColumns];
        int64_t position[kBatch];
        CM_UNROLL
        for (int u = 0; u < kBatch; ++u) {
            const int32_t n = round + u * teams + team;
            position[u] = -1;
            if (n < end) position[u] = a.ids == nullptr ? n : a.ids[static_cast<int64_t>(b) * s.listed + n];
            require(n >= end || (position[u] >= 0 && position[u] < s.cached), "a core token is not a row of the cache");
            position[u] = n < end ? within(position[u], s.cached) : -1;
        }
        CM_UNROLL
        for (int u = 0; u < kBatch; ++u) {
            const int64_t row = kv * s.cached + (position[u] < 0 ? 0 : position[u]);
            const int where = position[u] < 0 ? s.columns : first;  // nothing is read for a row that is not there
            lane_columns<T, kAligned>(a.k + row * s.columns, where, s.columns, k[u]);
            lane_columns<T, kAligned>(a.v + row * s.columns, where, s.columns, v[u]);
        }
        CM_UNROLL
        for (int u = 0; u < kBatch; ++u) {
            CM_UNROLL
            for (int j = 0; j < kQueries; ++j) {
                float dot = 0.0f;
                CM_UNROLL
                for (int c = 0; c < kLaneColumns; ++c) dot += q[j][c] * k[u][c];
                for (int apart = a.lanes_per_row / 2; apart > 0; apart /= 2) {
                    dot += __shfl_xor_sync(kAllLanes, dot, apart);
                }
                const bool there = position[u] >= 0;
                softmax[j].add(there ? a.scale * dot + to_float(mask[j][position[u]]) : -INFINITY, v[u]);
            }
        }
    }

    // Teams of a warp, then warps, each in a fixed order.
    float* shared = reinterpret_cast<float*>(shared_memory());  // [warps][kLaneColumns + 2][lanes]
    constexpr int kPart = (kLaneColumns + 2) * kWarp;
    CM_UNROLL
    for (int j = 0; j < kQueries; ++j) {
        for (int apart = a.lanes_per_row; apart < kWarp; apart *= 2) {
            float o[kLaneColumns];
            CM_UNROLL
            for (int c = 0; c < kLaneColumns; ++c) o[c] = __shfl_xor_sync(kAllLanes, softmax[j].o[c], apart);
            const float m = __shfl_xor_sync(kAllLanes, softmax[j].m, apart);
            const float l = __shfl_xor_sync(kAllLanes, softmax[j].l, apart);
            softmax[j].merge(m, l, o);
        }
        float* mine = shared + warp * kPart + lane;
        CM_UNROLL
        for (int c = 0; c < kLaneColumns; ++c) mine[c * kWarp] = softmax[j].o[c];
        mine[kLaneColumns * kWarp] = softmax[j].m;
        mine[(kLaneColumns + 1) * kWarp] = softmax[j].l;
        __syncthreads();
        if (warp == 0 && lane < a.lanes_per_row) {
            Softmax total;
            for (int w = 0; w < kAttendWarps; ++w) {
                const float* part = shared + w * kPart + lane;
                float o[kLaneColumns];
                CM_UNROLL
                for (int c = 0; c < kLaneColumns; ++c) o[c] = part[c * kWarp];
                total.merge(part[kLaneColumns * kWarp], part[(kLaneColumns + 1) * kWarp], o);
            }
            if (query_start + j < all_queries) {
                const int64_t row = kv * all_queries + query_start + j;
                if (a.splits == 1) {
                    for (int c = 0; c < kLaneColumns && first + c < s.columns; ++c) {
                        a.y[row * s.columns + first + c] = from_float<T>(total.o[c] / total.l);
                    }
                } else {
                    float* out = a.parts + (split * s.rows() + row) * (s.columns + 2);
                    for (int c = 0; c < kLaneColumns && first + c < s.columns; ++c) out[first + c] = total.o[c];
                    if (lane == 0) {
                        out[s.columns] = total.m;
                        out[s.columns + 1] = total.l;
                    }
                }
            }
        }
        __syncthreads();
    }
}

constexpr int kCombineThreads = 128;

// One thread per number of y; m and l of a row come from the cache for all but one of its threads.
template <class T>
__global__ void CM_THREADS(kCombineThreads)
    combine(const float* parts, int32_t splits, int64_t rows, int32_t columns, T* y) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x;
    if (i >= rows * columns) return;
    const int64_t row = i / columns, column = i % columns, step = rows * (columns + 2);
    const float* part = parts + row * (columns + 2);
    float most = -INFINITY;
    for (int s = 0; s < splits; ++s) most = fmaxf(most, part[s * step + columns]);
    float sum = 0.0f, total = 0.0f;
    for (int s = 0; s < splits; ++s) {
        const float m = part[s * step + columns];
        const float weight = m == -INFINITY ? 0.0f : expf(m - most);
        sum += weight * part[s * step + columns + 1];
        total += weight * part[s * step + column];
    }
    y[i] = from_float<T>(total / sum);
}

}  // namespace cm
