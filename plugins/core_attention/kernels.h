// The kernels of CoreAttention: softmax over the listed rows, in splits that are combined in their order.
//
//   attend    a block copies the K and V of up to 64 rows into shared memory, all loads under way at once. Then a few
//             threads per row make its scores, one warp per query a softmax step for all these rows, and one thread per
//             column (several, for narrow heads) adds up the weighted rows. Loops, not unrolled code: a kernel this
//             short spends its time on fetching what it executes
//   combine   (m, l, o) of all splits -> y = sum exp(m_i - m) o_i / sum exp(m_i - m) l_i
//
// m is the largest score so far, l the sum of exp(score - m), o the sum of exp(score - m) v. A score of -inf adds
// nothing; a split that has seen no row has m = -inf and weighs nothing.
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
    int32_t rows;    // held in shared memory
    int32_t stride;  // of a row there
    float scale;
    float* parts;  // [splits, rows] of (o[d], m, l), if there is more than one split
    T* y;
};

// Eight numbers of a row from column `first` on, between memory and shared memory; zeros past the end of the row.
template <class T, bool kAligned>
struct Eight {
    static constexpr int kWords = 8 * sizeof(T) / sizeof(uint4);
    uint4 words[kWords];

    __device__ void fetch(const T* row, int first, int) {
        CM_UNROLL
        for (int i = 0; i < kWords; ++i) words[i] = load(reinterpret_cast<const uint4*>(row + first) + i);
    }
    __device__ void store(T* to) const {
        CM_UNROLL
        for (int i = 0; i < kWords; ++i) reinterpret_cast<uint4*>(to)[i] = words[i];
    }
};

template <class T>
struct Eight<T, false> {
    T numbers[8];

    __device__ void fetch(const T* row, int first, int columns) {
        CM_UNROLL
        for (int i = 0; i < 8; ++i) numbers[i] = first + i < columns ? row[first + i] : from_float<T>(0.0f);
    }
    __device__ void store(T* to) const {
        CM_UNROLL
        for (int i = 0; i < 8; ++i) to[i] = numbers[i];
    }
};

template <class T, int kQueries, bool kAligned>
__global__ void CM_THREADS(kAttendThreads) attend(Attend<T> a) {
    let_next_start();
    const AttentionSizes& s = a.sizes;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int eights = (s.columns + 7) / 8;

    float* q = reinterpret_cast<float*>(shared_memory());  // [kQueries][eights * 8]
    float* factors = q + kQueries * eights * 8;            // [kMostQueries]
    float* largests = factors + kMostQueries;              // [kMostQueries], m
    float* sums = largests + kMostQueries;                 // [kMostQueries], l
    float* outputs = sums + kMostQueries;                  // [parts][kQueries][columns], at the end; until then:
    T* k = reinterpret_cast<T*>(outputs);                  // [rows][stride]
    T* v = k + a.rows * a.stride;                          // [rows][stride]
    float* scores = reinterpret_cast<float*>(v + a.rows * a.stride);  // [rows][kQueries]

    const int query_start = static_cast<int>(blockIdx.x % a.query_tiles) * kQueries;
    const uint32_t place = blockIdx.x / a.query_tiles;
    const int split = static_cast<int>(place % a.splits);
    const int kv = static_cast<int>(place / a.splits);  // b * Hk + g
    const int b = kv / s.kv_heads;
    const int all_queries = s.queries_per_kv_head();

    // Query i of a key/value head: head i / S of its group, position i % S; as a row of [B,H,S] that is consecutive.
    // A tile that is not full repeats its last query and stores it once.
    const auto query = [&](int j) { return query_start + j < all_queries ? query_start + j : all_queries - 1; };
    for (int i = threadIdx.x; i < kQueries * eights * 8; i += kAttendThreads) {
        const int column = i % (eights * 8);
        const int64_t row = static_cast<int64_t>(kv) * all_queries + query(i / (eights * 8));
        q[i] = column < s.columns ? to_float(a.q[row * s.columns + column]) : 0.0f;
    }
    const auto position_of = [&](int32_t n) {
        const int64_t position = a.ids == nullptr ? n : a.ids[static_cast<int64_t>(b) * s.listed + n];
        require(position >= 0 && position < s.cached, "a core token is not a row of the cache");
        return within(position, s.cached);
    };

    const int32_t per_split = (s.listed + a.splits - 1) / a.splits;
    const int32_t begin = split * per_split;
    const int32_t end = begin + per_split < s.listed ? begin + per_split : s.listed;
    // One column of o for each thread, and where heads are narrow, a part of the rows.
    const int parts = kAttendThreads / s.columns, part = threadIdx.x / s.columns, column = threadIdx.x % s.columns;
    float o[kQueries] = {};
    float m = -INFINITY, l = 0.0f;  // of query `warp`
    for (int32_t start = begin; start < end; start += a.rows) {
        const int32_t rows = end - start < a.rows ? end - start : a.rows;
        constexpr int kAtOnce = 4;
        const int pieces = rows * eights;
        for (int from = threadIdx.x; from < pieces; from += kAtOnce * kAttendThreads) {
            Eight<T, kAligned> of_k[kAtOnce], of_v[kAtOnce];
            CM_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                const int piece = from + i * kAttendThreads, first = piece % eights * 8;
                if (piece >= pieces) continue;
                const int64_t row = static_cast<int64_t>(kv) * s.cached + position_of(start + piece / eights);
                of_k[i].fetch(a.k + row * s.columns, first, s.columns);
                of_v[i].fetch(a.v + row * s.columns, first, s.columns);
            }
            CM_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                const int piece = from + i * kAttendThreads, first = piece % eights * 8;
                if (piece >= pieces) continue;
                of_k[i].store(k + piece / eights * a.stride + first);
                of_v[i].store(v + piece / eights * a.stride + first);
            }
        }
        for (int i = threadIdx.x; i < rows * kQueries; i += kAttendThreads) {
            const int64_t mask_row = static_cast<int64_t>(a.mask_batch == 1 ? 0 : b) * s.queries +
                                     query(i % kQueries) % s.queries;
            scores[i] = to_float(a.mask[mask_row * s.cached + position_of(start + i / kQueries)]);
        }
        __syncthreads();

        // Threads next to each other take different rows: the padding is for them.
        for (int i = threadIdx.x; i < rows * kQueries; i += kAttendThreads) {
            const int row = i % rows, j = i / rows;
            float dot = 0.0f;
            for (int first = 0; first < eights * 8; first += 8) {
                float numbers[8];
                constexpr int kPer = sizeof(uint4) / sizeof(T);
                CM_UNROLL
                for (int c = 0; c < 8; c += kPer) {
                    spread<T>(*reinterpret_cast<const uint4*>(k + row * a.stride + first + c), numbers + c);
                }
                CM_UNROLL
                for (int c = 0; c < 8; ++c) dot += q[j * eights * 8 + first + c] * numbers[c];
            }
            scores[row * kQueries + j] += a.scale * dot;
        }
        __syncthreads();

        if (warp < kQueries) {
            float largest = m;
            for (int row = lane; row < rows; row += kWarp) largest = larger(largest, scores[row * kQueries + warp]);
            largest = warp_largest(largest);
            float sum = 0.0f;
            for (int row = lane; row < rows; row += kWarp) {
                const float score = scores[row * kQueries + warp];
                const float weight = score == -INFINITY ? 0.0f : expf(score - largest);
                scores[row * kQueries + warp] = weight;
                sum += weight;
            }
            const float factor = m == -INFINITY ? 0.0f : expf(m - largest);
            l = l * factor + warp_sum(sum);
            m = largest;
            if (lane == 0) factors[warp] = factor;
        }
        __syncthreads();

        CM_UNROLL
        for (int j = 0; j < kQueries; ++j) o[j] *= factors[j];
        for (int row = part; part < parts && row < rows; row += parts) {
            const float number = to_float(v[row * a.stride + column]);
            CM_UNROLL
            for (int j = 0; j < kQueries; ++j) o[j] += scores[row * kQueries + j] * number;
        }
        __syncthreads();  // before the next rows, and before o takes the place of K and V
    }

    if (part < parts) {
        CM_UNROLL
        for (int j = 0; j < kQueries; ++j) outputs[(part * kQueries + j) * s.columns + column] = o[j];
    }
    if (warp < kQueries && lane == 0) {
        largests[warp] = m;
        sums[warp] = l;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kQueries * s.columns; i += kAttendThreads) {
        const int j = i / s.columns, here = i % s.columns;
        if (query_start + j >= all_queries) break;
        float total = 0.0f;
        for (int p = 0; p < parts; ++p) total += outputs[p * kQueries * s.columns + i];
        const int64_t row = static_cast<int64_t>(kv) * all_queries + query_start + j;
        if (a.splits == 1) {
            a.y[row * s.columns + here] = from_float<T>(total / sums[j]);
        } else {
            float* out = a.parts + (split * s.rows() + row) * (s.columns + 2);
            out[here] = total;
            if (here == 0) {
                out[s.columns] = largests[j];
                out[s.columns + 1] = sums[j];
            }
        }
    }
}

constexpr int kCombineThreads = 512;

// One block per row of y. A thread adds up one column of some of the splits; then come the sums of these, in order.
template <class T>
__global__ void CM_THREADS(kCombineThreads)
    combine(const float* parts, int32_t splits, int64_t rows, int32_t columns, T* y) {
    wait_for_previous();
    const int lane = threadIdx.x % kWarp;
    const int64_t row = blockIdx.x, step = rows * (columns + 2);
    const float* mine = parts + row * (columns + 2);
    float largest = -INFINITY;
    for (int i = lane; i < splits; i += kWarp) largest = larger(largest, mine[i * step + columns]);
    largest = warp_largest(largest);

    const int groups = kCombineThreads / columns, group = threadIdx.x / columns, column = threadIdx.x % columns;
    constexpr int kAtOnce = 8;
    float sum = 0.0f, total = 0.0f;
    for (int start = group; group < groups && start < splits; start += kAtOnce * groups) {
        float m[kAtOnce], l[kAtOnce], number[kAtOnce];
        CM_UNROLL
        for (int u = 0; u < kAtOnce; ++u) {
            const int i = start + u * groups;
            m[u] = i < splits ? mine[i * step + columns] : -INFINITY;
            l[u] = i < splits ? mine[i * step + columns + 1] : 0.0f;
            number[u] = i < splits ? mine[i * step + column] : 0.0f;
        }
        CM_UNROLL
        for (int u = 0; u < kAtOnce; ++u) {
            const float weight = m[u] == -INFINITY ? 0.0f : expf(m[u] - largest);
            sum += weight * l[u];
            total += weight * number[u];
        }
    }
    float* totals = reinterpret_cast<float*>(shared_memory());  // [threads]
    float* sums = totals + kCombineThreads;                     // [threads]
    totals[threadIdx.x] = total;
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (group > 0) return;
    for (int g = 1; g < groups; ++g) {
        total += totals[g * columns + column];
        sum += sums[g * columns + column];
    }
    y[row * columns + column] = from_float<T>(total / sum);
}

}  // namespace cm
