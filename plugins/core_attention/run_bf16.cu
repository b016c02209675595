#include "run.cuh"

template cudaError_t cm::run_attention<__nv_bfloat16>(const AttentionCall& call, cudaStream_t stream);
