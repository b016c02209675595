#include "run.cuh"

template cudaError_t cm::run_attention<__half>(const AttentionCall& call, cudaStream_t stream);
