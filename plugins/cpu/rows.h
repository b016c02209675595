// Rows of floats: parts that are summed, norms, and products with rows of a remainder, in one order for every row; included like
// quantise.h, behind attention.h.

// sum [width] = what the parts have, one after the other, `apart` floats from one another
static void add_parts(const float* parts, int64_t count, size_t apart, int64_t width, float* sum) {
    for (int64_t i = 0; i + Isa::kLanes <= width; i += Isa::kLanes) {
        Float all = Isa::load(parts + i);
        for (int64_t part = 1; part < count; ++part) all = Isa::more(all, Isa::load(parts + part * apart + i));
        Isa::store(sum + i, all);
    }
    for (int64_t i = width / Isa::kLanes * Isa::kLanes; i < width; ++i) {
        sum[i] = parts[i];
        for (int64_t part = 1; part < count; ++part) sum[i] += parts[part * apart + i];
    }
}

// sum = x + added, y = sum / root mean square of sum * weight
static void normalise(const float* __restrict x, const float* __restrict added, const float* __restrict weight, float epsilon,
                      int64_t width, float* __restrict sum, float* __restrict y) {
    for (int64_t i = 0; i < width; ++i) sum[i] = x[i] + added[i];
    const int64_t whole = width / kStep * kStep;
    float squares = add_all(whole, [&](int64_t i) { return sum[i] * sum[i]; });
    for (int64_t i = whole; i < width; ++i) squares += sum[i] * sum[i];
    const float factor = 1.0f / std::sqrt(squares / static_cast<float>(width) + epsilon);
    for (int64_t i = 0; i < width; ++i) y[i] = sum[i] * factor * weight[i];
}

// Sum of x (code - 8) scale over a row of a remainder: codes of 32 inputs in 16 bytes (byte j: input j, above it j + 16) and again,
// then the scales, float16. Sums of every 16th input are apart until the end.
static float remainder(const uint8_t* __restrict row, const float* __restrict x, const float* __restrict eights, int64_t groups) {
    constexpr int kHalf = kRemainder / 2;
    static_assert(kHalf % kStep == 0);
    const uint8_t* halves = row + groups * kHalf;
    float sums[kHalf] = {}, middle = 0.0f, scales[kStep];
    for (int64_t g = 0; g < groups; ++g, row += kHalf, x += kRemainder) {
        if (g % kStep == 0) {
            uint16_t read[kStep] = {};
            std::memcpy(read, halves + g * sizeof *read, std::min<int64_t>(kStep, groups - g) * sizeof *read);
            for (int i = 0; i < kStep; i += Isa::kLanes) Isa::store(scales + i, Isa::half(read + i));
        }
        const float scale = scales[g % kStep];
        for (int j = 0; j < kHalf; ++j)
            sums[j] += scale * (x[j] * static_cast<float>(row[j] & 15) + x[kHalf + j] * static_cast<float>(row[j] >> 4));
        middle += scale * eights[g];
    }
    return add_all(kHalf, [&](int64_t j) { return sums[j]; }) - middle;
}
