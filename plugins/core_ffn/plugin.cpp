#include "plugin.h"

#include <memory>

#include "activations.h"

namespace cm {

using namespace nvinfer1;

CoreFfn* CoreFfn::create(const Fields& fields) {
    std::unique_ptr<CoreFfn> plugin(new CoreFfn());
    if (!fields.read("activation", &plugin->activation_) || !fields.read("block", &plugin->block_) ||
        !fields.read("bits", &plugin->bits_) || !fields.read("group", &plugin->group_) ||
        !read_grid_blocks(fields, &plugin->grid_blocks_)) {
        return nullptr;
    }
    const NamedActivation* found = nullptr;
    std::string known;
    for (const NamedActivation& a : kActivations) {
        known += std::string(known.empty() ? "" : ", ") + a.name;
        if (plugin->activation_ == a.name) found = &a;
    }
    if (found == nullptr) {
        refuse(kName, "unknown activation \"" + plugin->activation_ + "\"; known: " + known);
        return nullptr;
    }
    plugin->which_ = found->activation;
    const int32_t bits = plugin->bits_, group = plugin->group_;
    const bool packs = bits == 0 ? group == 0 : (bits == 4 || bits == 8) && group > 0;
    if (!packs || plugin->block_ < 1 || plugin->grid_blocks_ < 1) {
        const std::string given = "block = " + std::to_string(plugin->block_) + ", bits = " + std::to_string(bits) +
                                  ", group = " + std::to_string(group);
        refuse(kName, given + ": give block >= 1 and bits 0 with group 0, or bits 4 or 8 and a group");
        return nullptr;
    }
    return plugin.release();
}

std::vector<PluginField> CoreFfn::attributes() {
    return {
        {"activation", nullptr, PluginFieldType::kCHAR, 0},
        {"block", nullptr, PluginFieldType::kINT32, 1},
        {"bits", nullptr, PluginFieldType::kINT32, 1},
        {"group", nullptr, PluginFieldType::kINT32, 1},
    };
}

std::vector<PluginField> CoreFfn::fields() const {
    return {
        {"activation", activation_.data(), PluginFieldType::kCHAR, static_cast<int32_t>(activation_.size())},
        {"block", &block_, PluginFieldType::kINT32, 1},
        {"bits", &bits_, PluginFieldType::kINT32, 1},
        {"group", &group_, PluginFieldType::kINT32, 1},
        {kGridBlocks, &grid_blocks_, PluginFieldType::kINT32, 1},
    };
}

IPluginV3* CoreFfn::clone() noexcept {
    try {
        return new CoreFfn(*this);
    } catch (const std::exception& error) {
        refuse(kName, error.what());
        return nullptr;
    }
}

bool CoreFfn::inputs_fit(int32_t inputs) const {
    return inputs == 1 + weights_and_scales() || inputs == 2 + weights_and_scales();
}

bool CoreFfn::is_int32(int32_t place, int32_t inputs) const {
    const bool weight = place >= 1 && place <= 3;
    return (weight && bits_ != 0) || (indexed(inputs) && place == inputs - 1);
}

bool CoreFfn::check(const Shapes& in) const {
    const Dims &x = in[0], &gate = in[1];
    if (x.nbDims != 3) return refuse(kName, "x is " + text_of(x) + ", not [B,S,D]");
    const int64_t columns = x.d[2];
    if (columns < 0) return refuse(kName, "the last dimension of x " + text_of(x) + " must be fixed");
    const int64_t words = bits_ ? columns * bits_ / 32 : columns;
    if (bits_ && (words * 32 != columns * bits_ || columns % group_ != 0)) {
        return refuse(kName, "rows of " + std::to_string(columns) + " are not whole words of " + std::to_string(bits_) +
                                 " bits and whole groups of " + std::to_string(group_));
    }
    for (int i = 1; i <= weights_and_scales(); ++i) {
        const Dims& w = in[i];
        const int64_t wanted = i <= 3 ? words : columns / group_;
        if (w.nbDims != 2 || !agree(w.d[0], gate.d[0]) || w.d[1] != wanted) {
            const std::string shape = "[F," + std::to_string(wanted) + "] with the F of " + text_of(gate);
            return refuse(kName, "input " + std::to_string(i) + " is " + text_of(w) + ", not " + shape +
                                     " and the D of " + text_of(x));
        }
    }
    if (!indexed(static_cast<int32_t>(in.size()))) return true;
    if (gate.d[0] > 0 && gate.d[0] % block_ != 0) {
        return refuse(kName, std::to_string(gate.d[0]) + " neurons are not whole blocks of " + std::to_string(block_));
    }
    const Dims& ids = in.back();
    const bool request = ids.nbDims == 2 && agree(ids.d[0], x.d[0]);
    const bool token = ids.nbDims == 3 && agree(ids.d[0], x.d[0]) && agree(ids.d[1], x.d[1]);
    if ((!request && !token) || ids.d[ids.nbDims - 1] == 0) {
        return refuse(kName, "core_neurons is " + text_of(ids) + ", not [B,K] or [B,S,K] for x " + text_of(x));
    }
    return true;
}

FfnSizes CoreFfn::sizes(const Shapes& in, int32_t bytes) const {
    const Dims& x = in[0];
    const int64_t batch = x.d[0], tokens = x.d[1], rows = batch * tokens;
    const auto narrow = [](int64_t v) { return static_cast<int32_t>(v); };
    FfnSizes s{1, narrow(rows), narrow(x.d[2]), narrow(in[1].d[0]), bits_, bytes};
    if (indexed(static_cast<int32_t>(in.size()))) {
        const Dims& ids = in.back();
        const bool token = ids.nbDims == 3;
        s.groups = narrow(token ? rows : batch);
        s.rows_per_group = narrow(token ? 1 : tokens);
        s.neurons = narrow(ids.d[ids.nbDims - 1] * block_);
    }
    return s;
}

int32_t CoreFfn::getOutputShapes(DimsExprs const* in, int32_t inputs, DimsExprs const*, int32_t, DimsExprs* out,
                                 int32_t outputs, IExprBuilder& builder) noexcept {
    if (!inputs_fit(inputs) || outputs != 2 || in[0].nbDims != 3) return -1;
    out[0] = in[0];
    out[1] = in[0];
    out[1].d[2] = in[1].d[0];
    if (indexed(inputs)) {
        const DimsExprs& ids = in[inputs - 1];
        if (ids.nbDims != 2 && ids.nbDims != 3) return -1;
        out[1].d[2] = builder.operation(DimensionOperation::kPROD, *ids.d[ids.nbDims - 1], *builder.constant(block_));
    }
    return 0;
}

int64_t CoreFfn::workspace(const Shapes& most) const {
    // The columns that a block handles depend on the type, which is not known here: the most of both.
    return std::max(ffn_workspace(sizes(most, 2), grid_blocks_), ffn_workspace(sizes(most, 4), grid_blocks_));
}

int32_t CoreFfn::enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
                         void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
    if (shown_inputs() == 0) return status(cudaErrorNotReady);
    const Shapes shapes = shapes_of(in, shown_inputs());
    const DataType type = in[0].type;
    FfnCall call{};
    call.sizes = sizes(shapes, type == DataType::kFLOAT ? 4 : 2);
    call.in_weights = static_cast<int32_t>(shapes[1].d[0]);
    call.block = block_;
    call.group = group_;
    call.grid_blocks = grid_blocks_;
    call.activation = which_;
    call.x = inputs[0];
    for (int i = 0; i < 3; ++i) {
        call.weights[i] = inputs[1 + i];
        call.scales[i] = bits_ ? inputs[4 + i] : nullptr;
    }
    if (indexed(shown_inputs())) {
        call.ids = static_cast<const int32_t*>(inputs[shown_inputs() - 1]);
        call.listed = call.sizes.neurons / block_;
    }
    call.y = outputs[0];
    call.z = outputs[1];
    call.workspace = static_cast<float*>(workspace);
    if (call.sizes.rows() == 0) return 0;
    if (call.z == nullptr) {
        refuse(kName, "there is no memory for z, which y is made from");
        return status(cudaErrorInvalidDevicePointer);
    }
    switch (type) {
        case DataType::kFLOAT: return status(run_ffn<float>(call, stream));
        case DataType::kHALF: return status(run_ffn<__half>(call, stream));
        case DataType::kBF16: return status(run_ffn<__nv_bfloat16>(call, stream));
        default: return status(cudaErrorInvalidValue);
    }
}

}  // namespace cm
