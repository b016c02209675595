// The activations of CoreFFN in float32.
#pragma once

#include "../native/device.h"
#include "activations.h"

namespace cm {

__device__ inline float sigmoid(float g) { return 1.0f / (1.0f + expf(-g)); }

// A branch per neuron, not per weight: it costs nothing beside the reads.
__device__ inline float activate(Activation which, float g) {
    switch (which) {
        case Activation::kSilu: return g * sigmoid(g);
        case Activation::kGelu: return 0.5f * g * (1.0f + erff(g * 0.70710678f));
        case Activation::kGeluTanh: return 0.5f * g * (1.0f + tanhf(0.79788456f * (g + 0.044715f * g * g * g)));
        case Activation::kQuickGelu: return g * sigmoid(1.702f * g);
        case Activation::kRelu: return g > 0.0f ? g : 0.0f;
        case Activation::kRelu2: return g > 0.0f ? g * g : 0.0f;
        case Activation::kLeakyRelu: return g > 0.0f ? g : 0.01f * g;
        case Activation::kSigmoid: return sigmoid(g);
        case Activation::kTanh: return tanhf(g);
        case Activation::kMish: return g * tanhf(g > 20.0f ? g : log1pf(expf(g)));
    }
    return 0.0f;
}

}  // namespace cm
