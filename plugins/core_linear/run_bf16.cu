#include "run.cuh"

template cudaError_t cm::run_linear<__nv_bfloat16>(const LinearCall& call, cudaStream_t stream);
