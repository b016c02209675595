#include "plugin.h"

#include <cstring>

namespace cm {

using namespace nvinfer1;

std::string text_of(const Dims& dims) {
    std::string text = "[";
    for (int32_t i = 0; i < dims.nbDims; ++i) text += (i > 0 ? "," : "") + std::to_string(dims.d[i]);
    return text + "]";
}

Shapes shapes_of(PluginTensorDesc const* tensors, int32_t count) {
    Shapes shapes;
    for (int32_t i = 0; i < count; ++i) shapes.push_back(tensors[i].dims);
    return shapes;
}

// ---------------------------------------------------------------------------------------------------- fields
const PluginField* Fields::find(const char* name) const {
    for (int32_t i = 0; given_ != nullptr && i < given_->nbFields; ++i) {
        if (given_->fields[i].name != nullptr && strcmp(given_->fields[i].name, name) == 0) return &given_->fields[i];
    }
    return nullptr;
}

const PluginField* Fields::typed(const char* name, PluginFieldType type) const {
    const PluginField* field = find(name);
    if (field == nullptr) {
        refuse(plugin_, std::string("the attribute ") + name + " is missing");
        return nullptr;
    }
    if (field->type != type || field->data == nullptr || field->length < 1) {
        refuse(plugin_, std::string("the attribute ") + name + " has another type");
        return nullptr;
    }
    return field;
}

bool Fields::read(const char* name, int32_t* out) const {
    const PluginField* field = typed(name, PluginFieldType::kINT32);
    if (field != nullptr) memcpy(out, field->data, sizeof(*out));
    return field != nullptr;
}

bool Fields::read(const char* name, float* out) const {
    const PluginField* field = typed(name, PluginFieldType::kFLOAT32);
    if (field != nullptr) memcpy(out, field->data, sizeof(*out));
    return field != nullptr;
}

bool Fields::read(const char* name, std::string* out) const {
    const PluginField* field = typed(name, PluginFieldType::kCHAR);
    if (field == nullptr) return false;
    out->assign(static_cast<const char*>(field->data), field->length);
    while (!out->empty() && out->back() == '\0') out->pop_back();  // some callers count the end of the string
    return true;
}

// ---------------------------------------------------------------------------------------------------- plugin
IPluginCapability* OpPlugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

int32_t OpPlugin::getOutputDataTypes(DataType* types, int32_t outputs, DataType const* in,
                                     int32_t inputs) const noexcept {
    if (!inputs_fit(inputs) || outputs != outputs_) {
        refuse(name_, std::to_string(inputs) + " inputs and " + std::to_string(outputs) + " outputs fit no form");
        return -1;
    }
    for (int32_t i = 0; i < outputs; ++i) types[i] = in[0];
    return 0;
}

bool OpPlugin::supportsFormatCombination(int32_t place, DynamicPluginTensorDesc const* tensors, int32_t inputs,
                                         int32_t outputs) noexcept {
    if (!inputs_fit(inputs) || outputs != outputs_ || place < 0 || place >= inputs + outputs) return false;
    const PluginTensorDesc& tensor = tensors[place].desc;
    if (tensor.format != TensorFormat::kLINEAR) return false;
    if (place < inputs && is_int32(place, inputs)) return tensor.type == DataType::kINT32;
    if (place < inputs && is_float32(place, inputs)) return tensor.type == DataType::kFLOAT;
    if (place > 0) return tensor.type == tensors[0].desc.type;
    return tensor.type == DataType::kFLOAT || tensor.type == DataType::kHALF || tensor.type == DataType::kBF16;
}

int32_t OpPlugin::configurePlugin(DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const*,
                                  int32_t outputs) noexcept {
    if (!inputs_fit(inputs) || outputs != outputs_) {
        refuse(name_, std::to_string(inputs) + " inputs and " + std::to_string(outputs) + " outputs fit no form");
        return -1;
    }
    Shapes shapes;
    for (int32_t i = 0; i < inputs; ++i) shapes.push_back(in[i].desc.dims);
    return check(shapes) ? 0 : -1;
}

int32_t OpPlugin::onShapeChange(PluginTensorDesc const* in, int32_t inputs, PluginTensorDesc const*,
                                int32_t outputs) noexcept {
    if (!inputs_fit(inputs) || outputs != outputs_) {
        refuse(name_, std::to_string(inputs) + " inputs and " + std::to_string(outputs) + " outputs fit no form");
        return -1;
    }
    if (!check(shapes_of(in, inputs))) return -1;
    shown_inputs_ = inputs;
    return 0;
}

size_t OpPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const*,
                                  int32_t) const noexcept {
    if (!inputs_fit(inputs)) return 0;
    Shapes most;
    for (int32_t i = 0; i < inputs; ++i) most.push_back(in[i].max);
    return static_cast<size_t>(workspace(most));
}

PluginFieldCollection const* OpPlugin::getFieldsToSerialize() noexcept {
    serialized_ = fields();
    collection_ = PluginFieldCollection{static_cast<int32_t>(serialized_.size()), serialized_.data()};
    return &collection_;
}

}  // namespace cm
