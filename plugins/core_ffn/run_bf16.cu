#include "run.cuh"

template cudaError_t cm::run_ffn<__nv_bfloat16>(const FfnCall& call, cudaStream_t stream);
