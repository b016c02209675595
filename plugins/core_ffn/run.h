// One CoreFFN call on a stream: picks the kernels for the shape and the alignment and launches two or three.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "plan.h"

namespace cm {

enum class Activation : int32_t;

// Everything is on the device. The weights' scales are null when bits is 0; ids are null without a list.
struct FfnCall {
    FfnSizes sizes;
    int32_t in_weights;  // F
    int32_t listed;      // K, ids per list
    int32_t block;
    int32_t group;
    int32_t grid_blocks;
    Activation activation;
    const void* x;
    const void* weights[3];  // gate, up, down
    const void* scales[3];
    const int32_t* ids;
    void* y;
    void* z;
    float* workspace;
};

// T: float, __half or __nv_bfloat16. Defined in run.cuh, instantiated in one file per type: they compile side by side.
template <class T>
cudaError_t run_ffn(const FfnCall& call, cudaStream_t stream);

}  // namespace cm
