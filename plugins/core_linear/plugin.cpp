#include "plugin.h"

#include <memory>

namespace cm {

using namespace nvinfer1;

CoreLinear* CoreLinear::create(const Fields& fields) {
    std::unique_ptr<CoreLinear> plugin(new CoreLinear());
    if (!fields.read("by_inputs", &plugin->by_inputs_) || !fields.read("bits", &plugin->bits_) ||
        !fields.read("group", &plugin->group_) || !read_grid_blocks(fields, &plugin->grid_blocks_)) {
        return nullptr;
    }
    const int32_t bits = plugin->bits_, group = plugin->group_;
    const bool packs = bits == 0 ? group == 0 : (bits == 4 || bits == 8) && group > 0;
    if (!packs || plugin->by_inputs_ != 1 || plugin->grid_blocks_ < 1) {
        const std::string given = "by_inputs = " + std::to_string(plugin->by_inputs_) + ", bits = " +
                                  std::to_string(bits) + ", group = " + std::to_string(group);
        refuse(kName, given + ": give by_inputs 1 and bits 0 with group 0, or bits 4 or 8 and a group");
        return nullptr;
    }
    return plugin.release();
}

std::vector<PluginField> CoreLinear::attributes() {
    return {
        {"by_inputs", nullptr, PluginFieldType::kINT32, 1},
        {"bits", nullptr, PluginFieldType::kINT32, 1},
        {"group", nullptr, PluginFieldType::kINT32, 1},
    };
}

std::vector<PluginField> CoreLinear::fields() const {
    return {
        {"by_inputs", &by_inputs_, PluginFieldType::kINT32, 1},
        {"bits", &bits_, PluginFieldType::kINT32, 1},
        {"group", &group_, PluginFieldType::kINT32, 1},
        {kGridBlocks, &grid_blocks_, PluginFieldType::kINT32, 1},
    };
}

IPluginV3* CoreLinear::clone() noexcept {
    try {
        return new CoreLinear(*this);
    } catch (const std::exception& error) {
        refuse(kName, error.what());
        return nullptr;
    }
}

bool CoreLinear::check(const Shapes& in) const {
    const Dims &x = in[0], &w = in[1], &norm = in[this->norm()], &threshold = in.back();
    if (x.nbDims != 3) return refuse(kName, "x is " + text_of(x) + ", not [B,S,D]");
    if (w.nbDims != 2 || w.d[0] < 1 || w.d[1] < 1 || !agree(w.d[0], x.d[2])) {
        return refuse(kName, "w is " + text_of(w) + ", not [D,N] with the D of x " + text_of(x) + ", both fixed");
    }
    if (bits_) {
        const Dims& scale = in[2];
        const bool whole = outputs(w) % group_ == 0;
        if (!whole || scale.nbDims != 2 || scale.d[0] != w.d[0] || scale.d[1] != outputs(w) / group_) {
            return refuse(kName, "w_scale is " + text_of(scale) + ", not a scale for each " + std::to_string(group_) +
                                     " outputs of the words " + text_of(w));
        }
    }
    if (norm.nbDims != 1 || norm.d[0] != w.d[0]) {
        return refuse(kName, "norm is " + text_of(norm) + ", not [D] for w " + text_of(w));
    }
    if (threshold.nbDims != 2 || !agree(threshold.d[0], x.d[0]) || threshold.d[1] != 1) {
        return refuse(kName, "threshold is " + text_of(threshold) + ", not [B,1] for x " + text_of(x));
    }
    return true;
}

FfnSizes CoreLinear::sizes(const Shapes& in, int32_t bytes) const {
    const auto narrow = [](int64_t v) { return static_cast<int32_t>(v); };
    return {narrow(in[0].d[0]), narrow(in[0].d[1]), narrow(outputs(in[1])), narrow(in[1].d[0]), bits_, bytes};
}

int32_t CoreLinear::getOutputShapes(DimsExprs const* in, int32_t inputs, DimsExprs const*, int32_t, DimsExprs* out,
                                    int32_t outputs, IExprBuilder& builder) noexcept {
    if (!inputs_fit(inputs) || outputs != 1 || in[0].nbDims != 3 || in[1].nbDims != 2) return -1;
    out[0] = in[0];
    out[0].d[2] = in[1].d[1];
    if (bits_) out[0].d[2] = builder.operation(DimensionOperation::kPROD, *in[1].d[1], *builder.constant(32 / bits_));
    return 0;
}

int64_t CoreLinear::workspace(const Shapes& most) const {
    // The columns that a block handles depend on the type, which is not known here: the most of both.
    return std::max(ffn_workspace(sizes(most, 2), grid_blocks_), ffn_workspace(sizes(most, 4), grid_blocks_));
}

int32_t CoreLinear::enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
                            void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
    if (shown_inputs() == 0) return status(cudaErrorNotReady);
    const DataType type = in[0].type;
    LinearCall call{};
    call.sizes = sizes(shapes_of(in, shown_inputs()), type == DataType::kFLOAT ? 4 : 2);
    call.group = group_;
    call.grid_blocks = grid_blocks_;
    call.x = inputs[0];
    call.weights = inputs[1];
    call.scales = bits_ ? inputs[2] : nullptr;
    call.norm = static_cast<const float*>(inputs[norm()]);
    call.thresholds = static_cast<const float*>(inputs[norm() + 1]);
    call.y = outputs[0];
    call.workspace = static_cast<float*>(workspace);
    if (call.sizes.rows() == 0) return 0;
    switch (type) {
        case DataType::kFLOAT: return status(run_linear<float>(call, stream));
        case DataType::kHALF: return status(run_linear<__half>(call, stream));
        case DataType::kBF16: return status(run_linear<__nv_bfloat16>(call, stream));
        default: return status(cudaErrorInvalidValue);
    }
}

}  // namespace cm
