// Rows of floats: parts that are summed, and norms; included like quantise.h. Plain loops, in one order for every row.

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
    float squares[kStep] = {};
    const auto add = [&](int64_t i, int lane) {
        sum[i] = x[i] + added[i];
        squares[lane] += sum[i] * sum[i];
    };
    const int64_t whole = width / kStep * kStep;
    for (int64_t i = 0; i < whole; i += kStep)
        for (int lane = 0; lane < kStep; ++lane) add(i + lane, lane);
    for (int64_t i = whole; i < width; ++i) add(i, static_cast<int>(i - whole));
    for (int half = kStep / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) squares[lane] += squares[lane + half];
    const float factor = 1.0f / std::sqrt(squares[0] / static_cast<float>(width) + epsilon);
    for (int64_t i = 0; i < width; ++i) y[i] = sum[i] * factor * weight[i];
}
