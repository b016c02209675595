// The plugins as ops of ONNX Runtime: a node's call goes to the plugin of its name, which checks shapes and runs the kernels.
//
//     CoreFFN_float16(x, weights.., ids)  ->  y, z, workspace        domain "com.cm_export.plugins"
//
// Names carry the type of the numbers, attributes and inputs are the plugin's; the last output is memory for the call. They
// run on the CUDA provider, in its stream; where the kernels are emulated, on the CPU provider.

#include <cstring>
#include <memory>
#include <mutex>

#include "../core_attention/plugin.h"
#include "../core_ffn/plugin.h"
#include "../core_linear/plugin.h"
#include "../cpu/ort.h"

#define CM_EXPORT extern "C" __attribute__((visibility("default")))

namespace cm {
namespace {

using namespace nvinfer1;

constexpr const char* kDomain = "com.cm_export.plugins";
constexpr int kInt32 = 6, kBfloat16 = 16;  // of ONNX, besides those in ort.h
// Slots of ONNX Runtime's table of functions, as in ort.h.
constexpr int kFloatAttribute = 85, kInputCount = 88, kStream = 193;

struct Error {
    std::string what;
};

void check(ort::Status* status) {
    if (status == nullptr) return;
    ort::Api::release_status(status);
    throw Error{"ONNX Runtime refused a call of its C interface"};
}

// An op of one plugin and one type of numbers.
struct Op : ort::CustomOp {
    std::string name;
    int number = 0;  // its type in ONNX
    size_t least_inputs = 0, most_inputs = 0, outputs = 0;
    std::vector<PluginField> attributes;
    OpPlugin* (*create)(const PluginFieldCollection*) = nullptr;
};

DataType type_of(int onnx) {
    switch (onnx) {
        case ort::kFloat: return DataType::kFLOAT;
        case ort::kFloat16: return DataType::kHALF;
        case kBfloat16: return DataType::kBF16;
        case kInt32: return DataType::kINT32;
        default: throw Error{"a tensor of ONNX type " + std::to_string(onnx) + ", which no kernel reads"};
    }
}

struct Tensor {
    PluginTensorDesc desc{};
    void* data = nullptr;
};

Tensor read(ort::Value* value) {
    Tensor out;
    ort::ShapeInfo* info = nullptr;
    check(ort::Api::shape_info(value, &info));
    const std::unique_ptr<ort::ShapeInfo, void (*)(ort::ShapeInfo*)> owner(info, ort::Api::release_shape_info);
    size_t rank = 0;
    int type = 0;
    check(ort::Api::element_type(info, &type));
    check(ort::Api::rank(info, &rank));
    if (rank > Dims::MAX_DIMS) throw Error{"a tensor of more than eight dimensions"};
    out.desc.dims.nbDims = static_cast<int32_t>(rank);
    check(ort::Api::dimensions(info, out.desc.dims.d, rank));
    out.desc.type = type_of(type);
    out.desc.format = TensorFormat::kLINEAR;
    check(ort::Api::tensor_data(value, &out.data));
    return out;
}

// A node: its plugin, and the attributes that decide the shapes of outputs.
struct Kernel {
    const Op* op;
    std::unique_ptr<OpPlugin> plugin;
    int32_t block = 1, bits = 0;
    std::mutex changing;

    Kernel(const Op* of, const ort::Info* info) : op(of) {
        std::vector<PluginField> fields = of->attributes;
        std::vector<std::unique_ptr<char[]>> held;
        for (PluginField& field : fields) {
            held.emplace_back(new char[64]());
            char* value = held.back().get();
            field.data = value;
            if (field.type == PluginFieldType::kCHAR) {
                size_t size = 64;
                check(ort::Api::string_attribute(info, field.name, value, &size));
                field.length = static_cast<int32_t>(strlen(value));
            } else if (field.type == PluginFieldType::kFLOAT32) {
                using Function = ort::Status* (*)(const ort::Info*, const char*, float*);
                check(ort::Api::at<Function>(kFloatAttribute)(info, field.name, reinterpret_cast<float*>(value)));
            } else {
                int64_t wide = 0;
                check(ort::Api::int_attribute(info, field.name, &wide));
                const int32_t number = static_cast<int32_t>(wide);
                memcpy(value, &number, sizeof number);
                if (strcmp(field.name, "block") == 0) block = number;
                if (strcmp(field.name, "bits") == 0) bits = number;
            }
        }
        const PluginFieldCollection all{static_cast<int32_t>(fields.size()), fields.data()};
        plugin.reset(of->create(&all));
        if (plugin == nullptr) throw Error{of->name + ": its attributes are refused (see stderr)"};
    }

    // Of the plugin's own outputs; the first is always as the first input, but for the columns of a product.
    std::vector<Dims> outputs(const std::vector<PluginTensorDesc>& in) const {
        Dims y = in[0].dims, z = in[0].dims;
        if (op->create == &make<CoreLinear>) y.d[2] = bits ? in[1].dims.d[1] * 32 / bits : in[1].dims.d[1];
        if (op->create != &make<CoreFfn>) return {y};
        const bool listed = in.size() == (bits ? 8u : 5u);
        const Dims& ids = in.back().dims;
        z.d[2] = listed ? ids.d[ids.nbDims - 1] * block : in[1].dims.d[0];
        return {y, z};
    }

    template <class Plugin>
    static OpPlugin* make(const PluginFieldCollection* fields) {
        return Plugin::create(Fields(Plugin::kName, fields));
    }

    void compute(ort::Context* context) {
        size_t count = 0;
        check(ort::Api::at<ort::Status* (*)(const ort::Context*, size_t*)>(kInputCount)(context, &count));
        std::vector<PluginTensorDesc> in;
        std::vector<const void*> sources;
        for (size_t i = 0; i < count; ++i) {
            ort::Value* value = nullptr;
            check(ort::Api::input(context, i, &value));
            if (value == nullptr) break;  // optional inputs that the node has not
            const Tensor tensor = read(value);
            in.push_back(tensor.desc);
            sources.push_back(tensor.data);
        }
        std::vector<DynamicPluginTensorDesc> most;
        for (const PluginTensorDesc& desc : in) most.push_back({desc, desc.dims, desc.dims, desc.dims});
        const int32_t inputs = static_cast<int32_t>(in.size()), own = plugin->getNbOutputs();
        {
            const std::lock_guard<std::mutex> lock(changing);
            if (plugin->onShapeChange(in.data(), inputs, nullptr, own) != 0) {
                throw Error{op->name + ": these shapes are refused (see stderr)"};
            }
        }
        const int64_t bytes = static_cast<int64_t>(plugin->getWorkspaceSize(most.data(), inputs, nullptr, own));
        std::vector<PluginTensorDesc> out;
        std::vector<void*> targets;
        for (const Dims& dims : outputs(in)) {
            targets.push_back(memory(context, targets.size(), dims));
            out.push_back({dims, in[0].type, TensorFormat::kLINEAR, 1.0f});
        }
        Dims scratch{};
        scratch.nbDims = 1;
        scratch.d[0] = (bytes + 3) / 4;
        void* workspace = memory(context, targets.size(), scratch);
        if (plugin->enqueue(in.data(), out.data(), sources.data(), targets.data(), workspace, stream(context)) != 0) {
            throw Error{op->name + " failed (see stderr)"};
        }
    }

    static void* memory(ort::Context* context, size_t index, const Dims& dims) {
        ort::Value* value = nullptr;
        void* data = nullptr;
        check(ort::Api::output(context, index, dims.d, static_cast<size_t>(dims.nbDims), &value));
        check(ort::Api::tensor_data(value, &data));
        return data;
    }

    static cudaStream_t stream(ort::Context* context) {
        void* found = nullptr;
#ifndef CM_EMULATE
        check(ort::Api::at<ort::Status* (*)(const ort::Context*, void**)>(kStream)(context, &found));
#else
        (void)context;
#endif
        return static_cast<cudaStream_t>(found);
    }
};

template <class Function>
ort::Status* as_status(Function work) {
    try {
        work();
        return nullptr;
    } catch (const Error& error) {
        return ort::Api::create_status(ort::kFail, error.what.c_str());
    } catch (const std::exception& error) {
        return ort::Api::create_status(ort::kFail, error.what());
    }
}

const Op* self(const ort::CustomOp* op) { return static_cast<const Op*>(op); }

template <class Plugin>
Op described(int number, const char* suffix, size_t least, size_t most, size_t outputs) {
    Op o;
    static_cast<ort::CustomOp&>(o) = ort::CustomOp{};
    o.name = std::string(Plugin::kName) + suffix;
    o.number = number;
    o.least_inputs = least;
    o.most_inputs = most;
    o.outputs = outputs + 1;
    o.attributes = Plugin::attributes();
    o.create = &Kernel::make<Plugin>;
    o.version = 17;
    o.CreateKernel = [](const ort::CustomOp*, const void*, const ort::Info*) -> void* { return nullptr; };
    o.GetName = [](const ort::CustomOp* op) { return self(op)->name.c_str(); };
#ifdef CM_EMULATE
    o.GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return nullptr; };
#else
    o.GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return "CUDAExecutionProvider"; };
#endif
    o.GetInputType = [](const ort::CustomOp* op, size_t i) {
        return i == 0 ? static_cast<ort::ElementType>(self(op)->number) : ort::kAny;
    };
    o.GetInputTypeCount = [](const ort::CustomOp* op) { return self(op)->most_inputs; };
    o.GetOutputType = [](const ort::CustomOp* op, size_t i) {
        return i + 1 == self(op)->outputs ? ort::kFloat : static_cast<ort::ElementType>(self(op)->number);
    };
    o.GetOutputTypeCount = [](const ort::CustomOp* op) { return self(op)->outputs; };
    o.KernelCompute = [](void*, ort::Context*) {};
    o.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    o.GetInputCharacteristic = [](const ort::CustomOp* op, size_t i) { return i < self(op)->least_inputs ? 0 : 1; };
    o.GetOutputCharacteristic = o.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return 0; };
    o.GetVariadicInputMinArity = o.GetVariadicOutputMinArity = o.GetStartVersion = [](const ort::CustomOp*) { return 1; };
    o.GetVariadicInputHomogeneity = o.GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 1; };
    o.CreateKernelV2 = [](const ort::CustomOp* op, const void*, const ort::Info* info, void** kernel) {
        return as_status([&] { *kernel = new Kernel(self(op), info); });
    };
    o.KernelComputeV2 = [](void* kernel, ort::Context* context) {
        return as_status([&] { static_cast<Kernel*>(kernel)->compute(context); });
    };
    o.GetEndVersion = [](const ort::CustomOp*) { return 0x7fffffff; };
    return o;
}

const std::vector<Op>& ops() {
    static const std::vector<Op> all = [] {
        std::vector<Op> out;
        const std::pair<int, const char*> types[] = {{ort::kFloat, "_float"}, {ort::kFloat16, "_float16"}};
        for (const auto& [number, suffix] : types) {
            out.push_back(described<CoreFfn>(number, suffix, 4, 8, 2));
            out.push_back(described<CoreAttention>(number, suffix, 4, 5, 1));
            out.push_back(described<CoreLinear>(number, suffix, 4, 5, 1));
        }
        return out;
    }();
    return all;
}

}  // namespace
}  // namespace cm

CM_EXPORT ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
    const void* table = base->GetApi(ort::kApiVersion);
    if (table == nullptr) {
        // Slot 0, CreateStatus, is the same in every version since the first.
        ort::Api::table = static_cast<void* const*>(base->GetApi(1));
        return ort::Api::create_status(ort::kFail, "the ops of cm_export need ONNX Runtime 1.20 or newer");
    }
    ort::Api::table = static_cast<void* const*>(table);
    ort::Domain* domain = nullptr;  // lives as long as the process: sessions keep pointing to it
    if (ort::Status* status = ort::Api::create_domain(cm::kDomain, &domain)) return status;
    for (const cm::Op& op : cm::ops())
        if (ort::Status* status = ort::Api::add_op(domain, &op)) return status;
    return ort::Api::add_domain(options, domain);
}
