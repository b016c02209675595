// One CoreAttention call on a stream: picks the kernel for the shape and the alignment and launches one or two.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "plan.h"

namespace cm {

// Everything is on the device; ids are null without a list.
struct AttentionCall {
    AttentionSizes sizes;
    int32_t mask_batch;  // 1 or B
    int32_t grid_blocks;
    float scale;
    const void *q, *k, *v, *mask;
    const int32_t* ids;
    void* y;
    float* workspace;
};

// T: float, __half or __nv_bfloat16. Defined in run.cuh, instantiated in one file per type.
template <class T>
cudaError_t run_attention(const AttentionCall& call, cudaStream_t stream);

}  // namespace cm
