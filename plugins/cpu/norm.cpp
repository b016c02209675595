// The sum of a residual stream, and its norm for what reads it next.
//
//     ResidualNorm(x [...,D], added [...,D], weight [D]) -> y [...,D], sum [...,D]
//
//     sum = x + added, y = sum / sqrt(mean(sum^2) + epsilon) * weight
//
// For the few rows of a step: one thread. ONNX Runtime's own norm wakes all of them as soon as there are two rows.
#include "kernels.h"
#include "op.h"

namespace cm::cpu {
namespace {

struct ResidualNorm {
    static constexpr const char* kName = "ResidualNorm";
    static constexpr ort::ElementType kTypes[] = {ort::kFloat, ort::kFloat, ort::kFloat};
    static constexpr const char* kProvider = nullptr;
    static constexpr size_t kRequired = 3;
    static constexpr ort::ElementType kOutputs[] = {ort::kFloat, ort::kFloat};
    float epsilon;
    MaybeConstant of_weight;

    explicit ResidualNorm(const ort::Info* info) : epsilon(number(info, kName, "epsilon")), of_weight(info, 2) {}

    void compute(ort::Context* context) {
        Tensor read;
        const Tensor x = input(context, 0), added = input(context, 1), &weight = of_weight.of(context, read);
        if (x.shape.empty() || added.shape != x.shape)
            fail(kName, text_of(added.shape) + " is added to " + text_of(x.shape));
        const int64_t width = x.shape.back();
        if (weight.shape != std::vector<int64_t>{width})
            fail(kName, "the weight is " + text_of(weight.shape) + ", expected " + text_of({width}));
        float *y = output(context, x.shape, 0), *sum = output(context, x.shape, 1);
        const int64_t rows = width == 0 ? 0 : x.count() / width;
        for (int64_t at = 0; at < rows * width; at += width)
            kernels().normalise(static_cast<const float*>(x.data) + at, static_cast<const float*>(added.data) + at,
                                static_cast<const float*>(weight.data), epsilon, width, sum + at, y + at);
    }
};

}  // namespace

const ort::CustomOp* residual_norm() { return described<ResidualNorm>(); }

}  // namespace cm::cpu
