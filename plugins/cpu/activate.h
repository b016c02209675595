// z = activation(gate) * up, as plugins/core_ffn/activate.h computes them; included like quantise.h.

// e^x = 2^exponent * what is given back, for x from -87 to 88.7; to 2 units in the last place, in a form that compilers vectorise.
static CM_INLINE float exponential_part(float x, int32_t& exponent) {
    const float shifted = x * 1.44269504f + 12582912.0f;
    const float whole = shifted - 12582912.0f;
    const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * rest + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    exponent = bits_of(shifted) - bits_of(12582912.0f);
    return p * rest * rest + rest + 1.0f;
}

// e^x. Inf and NaN stay.
static CM_INLINE float exponential(float x) {
    int32_t exponent;
    const float part = exponential_part(x > 88.7f ? 88.7f : (x < -87.0f ? -87.0f : x), exponent);
    const int32_t half = exponent >> 1;  // 2^exponent in two steps, since 2^128 is no float
    const float result = part * float_of((half + 127) << 23) * float_of((exponent - half + 127) << 23);
    return x > 88.7f ? std::numeric_limits<float>::infinity() : (x < -87.0f ? 0.0f : (x == x ? result : x));
}

// The same of numbers that are 0 or less, or NaN.
static CM_INLINE float exponential_of_negative(float x) {
    int32_t exponent;
    const float part = exponential_part(x < -87.0f ? -87.0f : x, exponent);
    return x < -87.0f ? 0.0f : part * float_of((exponent + 127) << 23);
}

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
