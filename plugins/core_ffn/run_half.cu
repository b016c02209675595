#include "run.cuh"

template cudaError_t cm::run_ffn<__half>(const FfnCall& call, cudaStream_t stream);
