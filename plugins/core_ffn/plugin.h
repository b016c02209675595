// CoreFFN as a TensorRT plugin. Inputs: x, w_gate, w_up, w_down_t[, gate_scale, up_scale, down_scale][, core_neurons].
// Outputs: y, z. Attributes: activation, block, bits, group (op.py says what they mean).
#pragma once

#include "../native/plugin.h"
#include "run.h"

namespace cm {

class CoreFfn final : public OpPlugin {
  public:
    static constexpr const char* kName = "CoreFFN";
    static constexpr const char* kVersion = "1";

    static CoreFfn* create(const Fields& fields);
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
    bool inputs_fit(int32_t inputs) const override;
    bool is_int32(int32_t place, int32_t inputs) const override;
    int64_t workspace(const Shapes& most) const override;
    std::vector<nvinfer1::PluginField> fields() const override;

  private:
    CoreFfn() : OpPlugin(kName, kVersion, 2) {}
    int32_t weights_and_scales() const { return bits_ ? 6 : 3; }
    bool indexed(int32_t inputs) const { return inputs == 2 + weights_and_scales(); }
    FfnSizes sizes(const Shapes& in, int32_t bytes) const;

    std::string activation_;
    Activation which_{};
    int32_t block_ = 1;
    int32_t bits_ = 0;
    int32_t group_ = 0;
    int32_t grid_blocks_ = 0;
};

}  // namespace cm
