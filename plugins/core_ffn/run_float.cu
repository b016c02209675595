#include "run.cuh"

template cudaError_t cm::run_ffn<float>(const FfnCall& call, cudaStream_t stream);
