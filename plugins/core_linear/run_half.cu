#include "run.cuh"

template cudaError_t cm::run_linear<__half>(const LinearCall& call, cudaStream_t stream);
