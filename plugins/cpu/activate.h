// z = activation(gate) * up, as plugins/core_ffn/activate.h computes them; included like quantise.h.

static CM_INLINE float sigmoid(float g) { return 1.0f / (1.0f + exponential(-g)); }

template <class Function>
static CM_INLINE void each(Function activation, const float* gate, const float* up, float* z, int64_t count) {
    for (int64_t i = 0; i < count; ++i) z[i] = activation(gate[i]) * up[i];
}

static void gate(Activation which, const float* gate, const float* up, float* z, int64_t count) {
    const auto run = [&](auto activation) { each(activation, gate, up, z, count); };
    switch (which) {
        case Activation::kSilu: return run([](float g) { return g * sigmoid(g); });
        case Activation::kGelu: return run([](float g) { return 0.5f * g * (1.0f + std::erf(g * 0.70710678f)); });
        case Activation::kGeluTanh:  // 1 + tanh(u) = 2 sigmoid(2u)
            return run([](float g) { return g * sigmoid(1.59576912f * (g + 0.044715f * g * g * g)); });
        case Activation::kQuickGelu: return run([](float g) { return g * sigmoid(1.702f * g); });
        case Activation::kRelu: return run([](float g) { return g < 0.0f ? 0.0f : g; });
        case Activation::kRelu2: return run([](float g) { return g < 0.0f ? 0.0f : g * g; });
        case Activation::kLeakyRelu: return run([](float g) { return g < 0.0f ? 0.01f * g : g; });
        case Activation::kSigmoid: return run([](float g) { return sigmoid(g); });
        case Activation::kTanh: return run([](float g) { return 2.0f * sigmoid(2.0f * g) - 1.0f; });
        case Activation::kMish:  // tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2)
            return run([](float g) {
                const float e = exponential(g > 20.0f ? 20.0f : g), product = e * (e + 2.0f);
                return g * (product / (product + 2.0f));
            });
    }
}
