// The kernels of CoreLinear, CoreFFN and CoreAttention as ops of ONNX Runtime, on the stream of its CUDA provider.
//
//     CoreLinear(x [B,S,D], w [D,N], norm [D], threshold [B,1]; by_inputs, bits, group)               -> y [B,S,N], workspace
//     CoreFFN(x [B,S,D], w_gate, w_up, w_down_t [F,D][, core_neurons]; activation, block, bits, group) -> y, z, workspace
//     CoreAttention(q [B,H,S,d], k, v [B,Hk,P,d], mask [B|1,1,S,P][, core_tokens]; scale)              -> y, workspace
//
// Each call goes through the op's TensorRT plugin, which says what it refuses and how work is cut; of TensorRT itself nothing
// runs. Numbers are float32 or float16, norms and thresholds float32, lists int32; weights in words (bits) are for engines. All
// inputs stay on the device and no shape depends on a number in them, so a call can be recorded in a CUDA graph. What kernels
// keep between their launches is an output that nobody reads: from the provider's arena, and free again behind the node.
//
// The emulator's library registers the same ops for the CPU's provider.
#include <memory>

#include "../core_attention/plugin.h"
#include "../core_ffn/plugin.h"
#include "../core_linear/plugin.h"
#include "../cpu/op.h"

namespace cm {
namespace {

using namespace nvinfer1;

constexpr const char* kDomain = "com.cm_export.cuda";
#ifdef CM_EMULATE
constexpr const char* kOnProvider = "CPUExecutionProvider";
#else
constexpr const char* kOnProvider = "CUDAExecutionProvider";
#endif

using Sizes = std::vector<int64_t>;
using Inputs = std::vector<Tensor>;

template <ort::ElementType kNumber>
struct Linear {
    using Plugin = CoreLinear;
    static constexpr size_t kRequired = 4;
    static constexpr ort::ElementType kTypes[] = {kNumber, kNumber, ort::kFloat, ort::kFloat};
    static constexpr ort::ElementType kOutputs[] = {kNumber, ort::kFloat};

    static std::vector<Sizes> shapes(const Inputs& in, int64_t) { return {{in[0].shape[0], in[0].shape[1], in[1].shape[1]}}; }
};

template <ort::ElementType kNumber>
struct Ffn {
    using Plugin = CoreFfn;
    static constexpr size_t kRequired = 4;
    static constexpr ort::ElementType kTypes[] = {kNumber, kNumber, kNumber, kNumber, ort::kInt32};
    static constexpr ort::ElementType kOutputs[] = {kNumber, kNumber, ort::kFloat};

    static std::vector<Sizes> shapes(const Inputs& in, int64_t block) {
        const int64_t neurons = in.size() == 4 ? in[1].shape[0] : in[4].shape.back() * block;
        return {in[0].shape, {in[0].shape[0], in[0].shape[1], neurons}};
    }
};

template <ort::ElementType kNumber>
struct Attention {
    using Plugin = CoreAttention;
    static constexpr size_t kRequired = 4;
    static constexpr ort::ElementType kTypes[] = {kNumber, kNumber, kNumber, kNumber, ort::kInt32};
    static constexpr ort::ElementType kOutputs[] = {kNumber, ort::kFloat};

    static std::vector<Sizes> shapes(const Inputs& in, int64_t) { return {in[0].shape}; }
};

DataType type_of(ort::ElementType type) {
    return type == ort::kFloat16 ? DataType::kHALF : type == ort::kInt32 ? DataType::kINT32 : DataType::kFLOAT;
}

template <class Form>
class Op : public Form {
  public:
    using Plugin = typename Form::Plugin;
    static constexpr const char* kName = Plugin::kName;
    static constexpr const char* kProvider = kOnProvider;

    explicit Op(const ort::Info* info) {
        std::vector<PluginField> fields = Plugin::attributes();
        std::vector<int32_t> integers(fields.size());
        std::vector<float> numbers(fields.size());
        std::vector<std::string> texts(fields.size());
        for (size_t i = 0; i < fields.size(); ++i) {
            PluginField& field = fields[i];
            field.length = 1;
            if (field.type == PluginFieldType::kINT32) {
                field.data = &(integers[i] = static_cast<int32_t>(integer(info, kName, field.name)));
                if (std::string(field.name) == "block") block_ = integers[i];
                if (std::string(field.name) == "bits" && integers[i] != 0) {
                    fail(kName, "bits = " + std::to_string(integers[i]) + ": ONNX Runtime has it with weights of its numbers' type");
                }
            } else if (field.type == PluginFieldType::kFLOAT32) {
                field.data = &(numbers[i] = number(info, kName, field.name));
            } else {
                field.data = (texts[i] = text(info, kName, field.name)).data();
                field.length = static_cast<int32_t>(texts[i].size());
            }
        }
        const PluginFieldCollection given{static_cast<int32_t>(fields.size()), fields.data()};
        const Refusals refusals;
        plugin_.reset(Plugin::create(Fields(kName, &given)));
        if (plugin_ == nullptr) throw Error{refusals.text};
    }

    void compute(ort::Context* context) {
        Inputs in;
        std::vector<PluginTensorDesc> described;
        std::vector<DynamicPluginTensorDesc> bounds;
        std::vector<const void*> sources;
        for (size_t i = 0; i < std::size(Form::kTypes); ++i) {
            const Tensor tensor = input(context, i);
            if (tensor.type == 0) break;  // the list that this form does not have
            in.push_back(tensor);
            described.push_back(description(tensor.shape, Form::kTypes[i], i));
            bounds.push_back({described[i], described[i].dims, described[i].dims, described[i].dims});
            sources.push_back(tensor.data);
        }
        const int32_t count = static_cast<int32_t>(in.size());
        const Refusals refusals;
        // A copy for this call: sessions run several at once, and a plugin keeps what it was shown last.
        const std::unique_ptr<IPluginV3> copy(plugin_->clone());
        Plugin* plugin = static_cast<Plugin*>(copy.get());
        const int32_t results = plugin == nullptr ? 0 : plugin->getNbOutputs();
        if (plugin == nullptr || plugin->onShapeChange(described.data(), count, nullptr, results) != 0) throw Error{refusals.text};

        std::vector<void*> targets;
        std::vector<Sizes> shapes = Form::shapes(in, block_);
        for (const Sizes& shape : shapes) targets.push_back(output<void>(context, shape, targets.size()));
        const size_t bytes = plugin->getWorkspaceSize(bounds.data(), count, nullptr, results);
        void* workspace = output<void>(context, {static_cast<int64_t>(bytes / sizeof(float))}, targets.size());
        void* stream = nullptr;
        check(ort::Api::gpu_stream(context, &stream));
        if (plugin->enqueue(described.data(), nullptr, sources.data(), targets.data(), workspace,
                            static_cast<cudaStream_t>(stream)) != 0) {
            throw Error{refusals.text};
        }
    }

  private:
    static PluginTensorDesc description(const Sizes& shape, ort::ElementType type, size_t index) {
        PluginTensorDesc of{};
        if (shape.size() > Dims::MAX_DIMS) fail(kName, "input " + std::to_string(index) + " is " + text_of(shape));
        of.dims.nbDims = static_cast<int32_t>(shape.size());
        std::copy(shape.begin(), shape.end(), of.dims.d);
        of.type = type_of(type);
        of.format = TensorFormat::kLINEAR;
        return of;
    }

    std::unique_ptr<Plugin> plugin_;
    int64_t block_ = 1;
};

}  // namespace
}  // namespace cm

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                  const ort::ApiBase* base) {
    using namespace cm;
    return register_ops(options, base, kDomain, "the CUDA ops",
                        {described<Op<Linear<ort::kFloat>>>(), described<Op<Linear<ort::kFloat16>>>(),
                         described<Op<Ffn<ort::kFloat>>>(), described<Op<Ffn<ort::kFloat16>>>(),
                         described<Op<Attention<ort::kFloat>>>(), described<Op<Attention<ort::kFloat16>>>()});
}
