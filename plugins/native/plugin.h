// What both plugins share of TensorRT's IPluginV3: names, capabilities, types, serialisation.
//
// An op gives its inputs' types and shapes by form (the number of inputs names the form), its workspace and its run.
// Only IPluginV3 and IPluginV3One* as of TensorRT 10.3 are used; the later additions have defaults.
#pragma once

#include <NvInferRuntime.h>
#include <NvInferRuntimePlugin.h>

#include <cstdint>
#include <string>
#include <vector>

#include "log.h"

namespace cm {

constexpr const char* kNamespace = "cm_export";

// Dimensions of the inputs; -1 where a dimension is not known yet.
using Shapes = std::vector<nvinfer1::Dims>;

// "[2,-1,64]"
std::string text_of(const nvinfer1::Dims& dims);

// Whether two dimensions may be the same: one that is not known yet agrees with everything.
inline bool agree(int64_t a, int64_t b) { return a == b || a < 0 || b < 0; }

// The attributes of a node or of a serialised plugin by name. A missing or mistyped one is refused with its name.
class Fields {
  public:
    Fields(const char* plugin, const nvinfer1::PluginFieldCollection* given) : plugin_(plugin), given_(given) {}
    bool read(const char* name, int32_t* out) const;
    bool read(const char* name, float* out) const;
    bool read(const char* name, std::string* out) const;
    bool has(const char* name) const { return find(name) != nullptr; }

  private:
    const nvinfer1::PluginField* find(const char* name) const;
    const nvinfer1::PluginField* typed(const char* name, nvinfer1::PluginFieldType type) const;

    const char* plugin_;
    const nvinfer1::PluginFieldCollection* given_;
};

// Blocks for which the work is cut: of the device on which the engine is built, carried by the engine, so that its
// workspace stays large enough and its results stay the same on another one.
constexpr const char* kGridBlocks = "grid_blocks";
bool read_grid_blocks(const Fields& fields, int32_t* out);

class OpPlugin : public nvinfer1::IPluginV3,
                 public nvinfer1::IPluginV3OneCore,
                 public nvinfer1::IPluginV3OneBuild,
                 public nvinfer1::IPluginV3OneRuntime {
  public:
    OpPlugin(const char* name, const char* version, int32_t outputs)
        : name_(name), version_(version), outputs_(outputs) {}

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::AsciiChar const* getPluginName() const noexcept override { return name_; }
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return version_; }
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t getNbOutputs() const noexcept override { return outputs_; }
    int32_t getOutputDataTypes(nvinfer1::DataType* types, int32_t outputs, nvinfer1::DataType const* in,
                               int32_t inputs) const noexcept override;
    bool supportsFormatCombination(int32_t place, nvinfer1::DynamicPluginTensorDesc const* tensors, int32_t inputs,
                                   int32_t outputs) noexcept override;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t inputs,
                            nvinfer1::DynamicPluginTensorDesc const* out, int32_t outputs) noexcept override;
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t inputs, nvinfer1::PluginTensorDesc const* out,
                          int32_t outputs) noexcept override;
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* in, int32_t inputs,
                            nvinfer1::DynamicPluginTensorDesc const* out, int32_t outputs) const noexcept override;

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

  protected:
    // Whether `in` are the shapes of a call; says why not. Some dimensions may be -1.
    virtual bool check(const Shapes& in) const = 0;
    virtual bool inputs_fit(int32_t inputs) const = 0;
    // Whether input `place` is int32, or float32 whatever the others are; all others have the type of input 0.
    virtual bool is_int32(int32_t place, int32_t inputs) const = 0;
    virtual bool is_float32(int32_t, int32_t) const { return false; }
    virtual int64_t workspace(const Shapes& most) const = 0;
    // The fields from which createPlugin makes this plugin again; what they point to lives as long as the plugin.
    virtual std::vector<nvinfer1::PluginField> fields() const = 0;

    // The number of inputs of the last onShapeChange; 0 before it. enqueue is not told which form it runs.
    int32_t shown_inputs() const { return shown_inputs_; }
    // 0 if `error` is none; otherwise logs it. What enqueue returns.
    int32_t status(cudaError_t error) const;

    const char* const name_;

  private:
    const char* const version_;
    const int32_t outputs_;
    int32_t shown_inputs_ = 0;
    std::vector<nvinfer1::PluginField> serialized_;
    nvinfer1::PluginFieldCollection collection_{};
};

Shapes shapes_of(nvinfer1::PluginTensorDesc const* tensors, int32_t count);

// A creator of Plugin, which has kName, kVersion, attributes() and create(fields).
template <class Plugin>
class Creator : public nvinfer1::IPluginCreatorV3One {
  public:
    nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const*, nvinfer1::PluginFieldCollection const* given,
                                      nvinfer1::TensorRTPhase) noexcept override {
        try {
            return Plugin::create(Fields(Plugin::kName, given));
        } catch (const std::exception& error) {
            refuse(Plugin::kName, error.what());
            return nullptr;
        }
    }
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &names_; }
    nvinfer1::AsciiChar const* getPluginName() const noexcept override { return Plugin::kName; }
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return Plugin::kVersion; }
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

  private:
    std::vector<nvinfer1::PluginField> attributes_ = Plugin::attributes();
    nvinfer1::PluginFieldCollection names_{static_cast<int32_t>(attributes_.size()), attributes_.data()};
};

}  // namespace cm
