// One CoreLinear call on a stream: picks the kernel for the shape and the alignment and launches one or two.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "../core_ffn/plan.h"

namespace cm {

// Everything is on the device; scales are null when bits is 0. Of the sizes, neurons are the inputs D, columns the outputs N.
struct LinearCall {
    FfnSizes sizes;
    int32_t group;
    int32_t grid_blocks;
    const void* x;
    const void* weights;
    const void* scales;
    const float* norm;
    const float* thresholds;
    void* y;
    float* workspace;
};

// T: float, __half or __nv_bfloat16. Defined in run.cuh, instantiated in one file per type.
template <class T>
cudaError_t run_linear(const LinearCall& call, cudaStream_t stream);

}  // namespace cm
