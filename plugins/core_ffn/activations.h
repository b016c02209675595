// The activations of CoreFFN by the names that nodes carry (ACTIVATIONS in body.py); activate.h computes them.
#pragma once

#include <cstdint>

namespace cm {

enum class Activation : int32_t {
    kSilu,
    kGelu,
    kGeluTanh,
    kQuickGelu,
    kRelu,
    kRelu2,
    kLeakyRelu,
    kSigmoid,
    kTanh,
    kMish,
};

struct NamedActivation {
    const char* name;
    Activation activation;
};

constexpr NamedActivation kActivations[] = {
    {"silu", Activation::kSilu},
    {"swish", Activation::kSilu},
    {"gelu", Activation::kGelu},
    {"gelu_pytorch_tanh", Activation::kGeluTanh},
    {"gelu_new", Activation::kGeluTanh},
    {"quick_gelu", Activation::kQuickGelu},
    {"relu", Activation::kRelu},
    {"relu2", Activation::kRelu2},
    {"leaky_relu", Activation::kLeakyRelu},
    {"sigmoid", Activation::kSigmoid},
    {"tanh", Activation::kTanh},
    {"mish", Activation::kMish},
};

}  // namespace cm
