// Scores that become shares: included by attention.h, behind the registers and exponential.h.

// Adds up what `of` gives for 0 .. count - 1, a multiple of kStep.
template <class Function>
static CM_INLINE float add_all(int64_t count, Function of) {
    float sums[kStep] = {};
    for (int64_t i = 0; i < count; i += kStep)
        for (int j = 0; j < kStep; ++j) sums[j] += of(i + j);
    for (int width = kStep / 2; width > 0; width /= 2)
        for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
    return sums[0];
}

// scores -> e^(score + added - largest), 0 where they are filled up; their sum, or 1 where nothing is seen. NaN and Inf make it NaN.
static float shares(float* __restrict scores, const float* __restrict added, int64_t seen, int64_t filled) {
    constexpr float kNothing = -std::numeric_limits<float>::infinity();
    Float top = Isa::all(kNothing);
    int64_t i = 0;
    for (; i + Isa::kLanes <= seen; i += Isa::kLanes) {
        const Float score = Isa::more(Isa::load(scores + i), Isa::load(added + i));
        Isa::store(scores + i, score);
        top = Isa::larger(score, top);
    }
    float tops[Isa::kLanes];
    Isa::store(tops, top);
    float largest = *std::max_element(tops, tops + Isa::kLanes);
    for (; i < seen; ++i) {
        scores[i] += added[i];
        largest = scores[i] > largest ? scores[i] : largest;
    }
    for (; i < filled; ++i) scores[i] = kNothing;
    if (largest == kNothing) largest = 0.0f;  // what is left are zeros, and NaN
    for (i = 0; i < filled; i += kStep)
        for (int j = 0; j < kStep; ++j) scores[i + j] = exponential_of_negative(scores[i + j] - largest);
    const float sum = add_all(filled, [&](int64_t at) { return scores[at]; });
    return sum == 0.0f && seen > 0 ? 1.0f : sum;
}
