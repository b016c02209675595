// CoreAttention as a TensorRT plugin. Inputs: q, k, v, mask[, core_tokens]. Output: y. Attribute: scale.
#pragma once

#include "../native/plugin.h"
#include "run.h"

namespace cm {

class CoreAttention final : public OpPlugin {
  public:
    static constexpr const char* kName = "CoreAttention";
    static constexpr const char* kVersion = "1";

    static CoreAttention* create(const Fields& fields);
    static std::vector<nvinfer1::PluginField> attributes();

    nvinfer1::IPluginV3* clone() noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* in, int32_t inputs, nvinfer1::DimsExprs const*, int32_t,
                            nvinfer1::DimsExprs* out, int32_t outputs, nvinfer1::IExprBuilder&) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const* out,
                    void const* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override;

  protected:
    bool check(const Shapes& in) const override;
    bool inputs_fit(int32_t inputs) const override { return inputs == 4 || inputs == 5; }
    bool is_int32(int32_t place, int32_t) const override { return place == 4; }
    int64_t workspace(const Shapes& most) const override;
    std::vector<nvinfer1::PluginField> fields() const override;

  private:
    CoreAttention() : OpPlugin(kName, kVersion, 1) {}

    float scale_ = 0.0f;
    int32_t grid_blocks_ = 0;
};

}  // namespace cm
