// CoreLinear as a TensorRT plugin, for weights that are held by inputs. Inputs: x, w[, w_scale], norm, threshold.
// Output: y. Attributes: by_inputs (1), bits, group (op.py says what they mean).
#pragma once

#include "../native/plugin.h"
#include "run.h"

namespace cm {

class CoreLinear final : public OpPlugin {
  public:
    static constexpr const char* kName = "CoreLinear";
    static constexpr const char* kVersion = "1";

    static CoreLinear* create(const Fields& fields);
    static std::vector<nvinfer1::PluginField> attributes();

    nvinfer1::IPluginV3* clone() noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* in, int32_t inputs, nvinfer1::DimsExprs const*, int32_t,
                            nvinfer1::DimsExprs* out, int32_t outputs,
                            nvinfer1::IExprBuilder& builder) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const* out,
                    void const* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override;

  protected:
    bool check(const Shapes& in) const override;
    bool inputs_fit(int32_t inputs) const override { return inputs == norm() + 2; }
    bool is_int32(int32_t place, int32_t) const override { return place == 1 && bits_ != 0; }
    bool is_float32(int32_t place, int32_t) const override { return place >= norm(); }
    int64_t workspace(const Shapes& most) const override;
    std::vector<nvinfer1::PluginField> fields() const override;

  private:
    CoreLinear() : OpPlugin(kName, kVersion, 1) {}
    int32_t norm() const { return bits_ ? 3 : 2; }  // its place; the threshold's is the next
    int64_t outputs(const nvinfer1::Dims& w) const { return bits_ ? w.d[1] * 32 / bits_ : w.d[1]; }
    FfnSizes sizes(const Shapes& in, int32_t bytes) const;

    int32_t by_inputs_ = 1;
    int32_t bits_ = 0;
    int32_t group_ = 0;
    int32_t grid_blocks_ = 0;
};

}  // namespace cm
