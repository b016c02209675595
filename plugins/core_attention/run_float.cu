#include "run.cuh"

template cudaError_t cm::run_attention<float>(const AttentionCall& call, cudaStream_t stream);
