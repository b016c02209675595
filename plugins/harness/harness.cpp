// Calls a plugin library as TensorRT would, without TensorRT: a C interface for ctypes (library.py).
//
// Tensors come as flat arrays: types[i], ranks[i], and dims with eight numbers per tensor. A call that fails returns a
// negative number; texts (log lines, the reason) are kept until the next call.
#include <NvInferRuntime.h>
#include <NvInferRuntimePlugin.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

std::string log_text;

class Logger : public ILogger {
    void log(Severity, AsciiChar const* message) noexcept override { log_text += std::string(message) + "\n"; }
};

class Finder : public ILoggerFinder {
    ILogger* findLogger() override {
        static Logger logger;
        return &logger;
    }
};

// ------------------------------------------------------------------- dimensions as TensorRT's builder knows them
class Value : public apiv::VDimensionExpr {
  public:
    explicit Value(int64_t value) : value_(value) {}
    bool isConstant() const noexcept override { return true; }
    int64_t getConstantValue() const noexcept override { return value_; }
    bool isSizeTensor() const noexcept override { return false; }

  private:
    int64_t value_;
};

class Expression : public IDimensionExpr {
  public:
    explicit Expression(int64_t value) : own_(value) { mImpl = &own_; }
    ~Expression() noexcept override = default;

  private:
    Value own_;
};

class Arithmetic : public apiv::VExprBuilder {
  public:
    IDimensionExpr const* constant(int64_t value) noexcept override {
        made_.push_back(std::make_unique<Expression>(value));
        return made_.back().get();
    }
    IDimensionExpr const* operation(DimensionOperation op, IDimensionExpr const& first,
                                    IDimensionExpr const& second) noexcept override {
        const int64_t a = first.getConstantValue(), b = second.getConstantValue();
        switch (op) {
            case DimensionOperation::kSUM: return constant(a + b);
            case DimensionOperation::kPROD: return constant(a * b);
            case DimensionOperation::kMAX: return constant(a > b ? a : b);
            case DimensionOperation::kMIN: return constant(a < b ? a : b);
            case DimensionOperation::kSUB: return constant(a - b);
            case DimensionOperation::kEQUAL: return constant(a == b);
            case DimensionOperation::kLESS: return constant(a < b);
            case DimensionOperation::kFLOOR_DIV: return constant(a / b);
            case DimensionOperation::kCEIL_DIV: return constant((a + b - 1) / b);
        }
        return nullptr;
    }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
        return nullptr;
    }

  private:
    std::vector<std::unique_ptr<Expression>> made_;
};

class Builder : public IExprBuilder {
  public:
    Builder() { mImpl = &own_; }
    ~Builder() noexcept override = default;

  private:
    Arithmetic own_;
};

// -------------------------------------------------------------------------------------------------- tensors
constexpr int kRank = 8;

PluginTensorDesc described(int32_t type, int32_t format, int32_t rank, int64_t const* dims) {
    PluginTensorDesc tensor{};
    tensor.type = static_cast<DataType>(type);
    tensor.format = static_cast<TensorFormat>(format);
    tensor.scale = 1.0f;
    tensor.dims.nbDims = rank;
    for (int i = 0; i < rank; ++i) tensor.dims.d[i] = dims[i];
    return tensor;
}

std::vector<PluginTensorDesc> all_described(int32_t count, int32_t const* types, int32_t const* ranks,
                                            int64_t const* dims) {
    std::vector<PluginTensorDesc> tensors;
    for (int i = 0; i < count; ++i) tensors.push_back(described(types[i], 0, ranks[i], dims + kRank * i));
    return tensors;
}

std::vector<DynamicPluginTensorDesc> dynamic(std::vector<PluginTensorDesc> const& most) {
    std::vector<DynamicPluginTensorDesc> tensors;
    for (PluginTensorDesc const& t : most) tensors.push_back(DynamicPluginTensorDesc{t, t.dims, t.dims, t.dims});
    return tensors;
}

template <class Capability>
Capability* capability(void* plugin, PluginCapabilityType type) {
    return static_cast<Capability*>(static_cast<IPluginV3*>(plugin)->getCapabilityInterface(type));
}

IPluginV3OneBuild* build(void* plugin) { return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD); }
IPluginV3OneRuntime* runtime(void* plugin) {
    return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

}  // namespace

extern "C" {

// The log since the last call of this function.
char const* harness_log() {
    static std::string given;
    given.swap(log_text);
    log_text.clear();
    return given.c_str();
}

int32_t harness_tensorrt_version() { return NV_TENSORRT_VERSION; }

// Opens a plugin library; null and a log line if it cannot be.
void* harness_open(char const* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        log_text += std::string(dlerror()) + "\n";
        return nullptr;
    }
    static Finder finder;
    auto set = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    if (set == nullptr || dlsym(library, "getCreators") == nullptr) {
        log_text += "no getCreators or no setLoggerFinder\n";
        return nullptr;
    }
    set(&finder);
    return library;
}

// Creator number `i`, or null past the last one.
void* harness_creator(void* library, int32_t i) {
    auto list = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    int32_t count = 0;
    IPluginCreatorInterface* const* creators = list(count);
    return i < count ? static_cast<IPluginCreatorV3One*>(creators[i]) : nullptr;
}

// "name|namespace|version|kind|field:type,field:type"
char const* harness_describe(void* creator) {
    static std::string text;
    auto* c = static_cast<IPluginCreatorV3One*>(creator);
    text = std::string(c->getPluginName()) + "|" + c->getPluginNamespace() + "|" + c->getPluginVersion() + "|" +
           c->getInterfaceInfo().kind + "|";
    PluginFieldCollection const* names = c->getFieldNames();
    for (int i = 0; i < names->nbFields; ++i) {
        text += std::string(i > 0 ? "," : "") + names->fields[i].name + ":" +
                std::to_string(static_cast<int32_t>(names->fields[i].type));
    }
    return text.c_str();
}

void* harness_create(void* creator, int32_t count, char const* const* names, int32_t const* types,
                     void const* const* data, int32_t const* lengths, int32_t phase) {
    std::vector<PluginField> fields;
    for (int i = 0; i < count; ++i) {
        fields.emplace_back(names[i], data[i], static_cast<PluginFieldType>(types[i]), lengths[i]);
    }
    PluginFieldCollection const collection{count, fields.data()};
    const auto when = static_cast<TensorRTPhase>(phase);
    return static_cast<IPluginCreatorV3One*>(creator)->createPlugin("node", &collection, when);
}

// What an engine does: the fields of `plugin` are copied away as bytes and given to the creator again.
void* harness_round_trip(void* creator, void* plugin) {
    PluginFieldCollection const* given = runtime(plugin)->getFieldsToSerialize();
    std::vector<std::string> bytes;
    std::vector<std::string> names;
    for (int i = 0; i < given->nbFields; ++i) {
        PluginField const& f = given->fields[i];
        const size_t each = f.type == PluginFieldType::kCHAR ? 1 : 4;
        bytes.emplace_back(static_cast<char const*>(f.data), each * f.length);
        names.emplace_back(f.name);
    }
    std::vector<PluginField> fields;
    for (int i = 0; i < given->nbFields; ++i) {
        fields.emplace_back(names[i].c_str(), bytes[i].data(), given->fields[i].type, given->fields[i].length);
    }
    PluginFieldCollection const collection{given->nbFields, fields.data()};
    return static_cast<IPluginCreatorV3One*>(creator)->createPlugin("node", &collection, TensorRTPhase::kRUNTIME);
}

void* harness_clone(void* plugin) { return static_cast<IPluginV3*>(plugin)->clone(); }
void* harness_attach(void* plugin) { return runtime(plugin)->attachToContext(nullptr); }
void harness_destroy(void* plugin) { delete static_cast<IPluginV3*>(plugin); }

int32_t harness_outputs(void* plugin) { return build(plugin)->getNbOutputs(); }

int32_t harness_output_types(void* plugin, int32_t inputs, int32_t const* types, int32_t* out) {
    std::vector<DataType> in(inputs), result(harness_outputs(plugin));
    for (int i = 0; i < inputs; ++i) in[i] = static_cast<DataType>(types[i]);
    const int32_t count = static_cast<int32_t>(result.size());
    const int32_t error = build(plugin)->getOutputDataTypes(result.data(), count, in.data(), inputs);
    for (int i = 0; i < count; ++i) out[i] = static_cast<int32_t>(result[i]);
    return error;
}

int32_t harness_output_shapes(void* plugin, int32_t inputs, int32_t const* ranks, int64_t const* dims,
                              int32_t* out_ranks, int64_t* out_dims) {
    Builder builder;
    std::vector<DimsExprs> in(inputs), out(harness_outputs(plugin));
    for (int i = 0; i < inputs; ++i) {
        in[i].nbDims = ranks[i];
        for (int j = 0; j < ranks[i]; ++j) in[i].d[j] = builder.constant(dims[kRank * i + j]);
    }
    const int32_t count = static_cast<int32_t>(out.size());
    const int32_t error = build(plugin)->getOutputShapes(in.data(), inputs, nullptr, 0, out.data(), count, builder);
    for (int i = 0; error == 0 && i < count; ++i) {
        out_ranks[i] = out[i].nbDims;
        for (int j = 0; j < out[i].nbDims; ++j) out_dims[kRank * i + j] = out[i].d[j]->getConstantValue();
    }
    return error;
}

// Whether tensor `place` of inputs and outputs may have its type and format (0: linear).
int32_t harness_supports(void* plugin, int32_t place, int32_t inputs, int32_t outputs, int32_t const* types,
                         int32_t const* formats) {
    std::vector<PluginTensorDesc> tensors;
    const int64_t dims[kRank] = {1, 1, 1, 1};
    for (int i = 0; i < inputs + outputs; ++i) tensors.push_back(described(types[i], formats[i], 3, dims));
    return build(plugin)->supportsFormatCombination(place, dynamic(tensors).data(), inputs, outputs);
}

// Bytes of workspace for shapes up to these, after configurePlugin; -1 if it refuses.
int64_t harness_workspace(void* plugin, int32_t inputs, int32_t outputs, int32_t const* types, int32_t const* ranks,
                          int64_t const* dims) {
    const auto tensors = dynamic(all_described(inputs + outputs, types, ranks, dims));
    const DynamicPluginTensorDesc *in = tensors.data(), *out = in + inputs;
    if (build(plugin)->configurePlugin(in, inputs, out, outputs) != 0) return -1;
    return static_cast<int64_t>(build(plugin)->getWorkspaceSize(in, inputs, out, outputs));
}

// configurePlugin with dims of -1 where a dimension is dynamic.
int32_t harness_configure(void* plugin, int32_t inputs, int32_t outputs, int32_t const* types, int32_t const* ranks,
                          int64_t const* dims) {
    const auto tensors = dynamic(all_described(inputs + outputs, types, ranks, dims));
    return build(plugin)->configurePlugin(tensors.data(), inputs, tensors.data() + inputs, outputs);
}

int32_t harness_shapes(void* plugin, int32_t inputs, int32_t outputs, int32_t const* types, int32_t const* ranks,
                       int64_t const* dims) {
    const auto tensors = all_described(inputs + outputs, types, ranks, dims);
    return runtime(plugin)->onShapeChange(tensors.data(), inputs, tensors.data() + inputs, outputs);
}

int32_t harness_enqueue(void* plugin, int32_t inputs, int32_t outputs, int32_t const* types, int32_t const* ranks,
                        int64_t const* dims, void const* const* in, void* const* out, void* workspace, void* stream) {
    const auto tensors = all_described(inputs + outputs, types, ranks, dims);
    return runtime(plugin)->enqueue(tensors.data(), tensors.data() + inputs, in, out, workspace,
                                    static_cast<cudaStream_t>(stream));
}

}  // extern "C"
