// e^x, in plain loops that compilers turn into vectors: included by quantise.h.

static CM_INLINE int32_t bits_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static CM_INLINE float float_of(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

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
