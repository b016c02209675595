#include "run.cuh"

template cudaError_t cm::run_linear<float>(const LinearCall& call, cudaStream_t stream);
