#include "plugin.h"

#include <memory>

namespace cm {

using namespace nvinfer1;

CoreAttention* CoreAttention::create(const Fields& fields) {
    std::unique_ptr<CoreAttention> plugin(new CoreAttention());
    if (!fields.read("scale", &plugin->scale_) || !read_grid_blocks(fields, &plugin->grid_blocks_)) return nullptr;
    if (plugin->grid_blocks_ < 1) {
        refuse(kName, "grid_blocks = " + std::to_string(plugin->grid_blocks_) + ": give at least 1");
        return nullptr;
    }
    return plugin.release();
}

std::vector<PluginField> CoreAttention::attributes() { return {{"scale", nullptr, PluginFieldType::kFLOAT32, 1}}; }

std::vector<PluginField> CoreAttention::fields() const {
    return {
        {"scale", &scale_, PluginFieldType::kFLOAT32, 1},
        {kGridBlocks, &grid_blocks_, PluginFieldType::kINT32, 1},
    };
}

IPluginV3* CoreAttention::clone() noexcept {
    try {
        return new CoreAttention(*this);
    } catch (const std::exception& error) {
        refuse(kName, error.what());
        return nullptr;
    }
}

bool CoreAttention::check(const Shapes& in) const {
    const Dims &q = in[0], &k = in[1], &v = in[2], &mask = in[3];
    for (int i = 0; i < 4; ++i) {
        if (in[i].nbDims != 4) {
            return refuse(kName, "input " + std::to_string(i) + " is " + text_of(in[i]) + ", not of four dimensions");
        }
    }
    const int64_t columns = q.d[3];
    if (columns < 1 || columns > kMostColumns) {
        return refuse(kName, "q is " + text_of(q) + ": heads must be fixed, 1 to " + std::to_string(kMostColumns));
    }
    bool same = agree(k.d[0], q.d[0]) && k.d[3] == columns;
    for (int i = 0; i < 4; ++i) same = same && agree(k.d[i], v.d[i]);
    if (!same) {
        const std::string both = "k " + text_of(k) + " and v " + text_of(v);
        return refuse(kName, both + " are not both [B,Hk,P,d] for q " + text_of(q));
    }
    if (q.d[1] < 1 || k.d[1] < 1 || q.d[1] % k.d[1] != 0) {
        return refuse(kName, "the heads of q " + text_of(q) + " are not a multiple of those of k " + text_of(k));
    }
    const bool per_batch = agree(mask.d[0], 1) || agree(mask.d[0], q.d[0]);
    if (!per_batch || mask.d[1] != 1 || !agree(mask.d[2], q.d[2]) || !agree(mask.d[3], k.d[2])) {
        const std::string both = "q " + text_of(q) + " and k " + text_of(k);
        return refuse(kName, "mask is " + text_of(mask) + ", not [B|1,1,S,P] for " + both);
    }
    if (k.d[2] == 0) return refuse(kName, "k is " + text_of(k) + ": a softmax over nothing");
    if (in.size() == 5) {
        const Dims& ids = in[4];
        if (ids.nbDims != 2 || !agree(ids.d[0], q.d[0]) || ids.d[1] == 0) {
            return refuse(kName, "core_tokens is " + text_of(ids) + ", not [B,M] for q " + text_of(q));
        }
    }
    return true;
}

namespace {

AttentionSizes sizes(const Shapes& in) {
    const Dims &q = in[0], &k = in[1];
    const auto narrow = [](int64_t v) { return static_cast<int32_t>(v); };
    AttentionSizes s{narrow(q.d[0]), narrow(q.d[1]), narrow(k.d[1]), narrow(q.d[2]),
                     narrow(k.d[2]), narrow(k.d[2]), narrow(q.d[3])};
    if (in.size() == 5) s.listed = narrow(in[4].d[1]);
    return s;
}

}  // namespace

int32_t CoreAttention::getOutputShapes(DimsExprs const* in, int32_t inputs, DimsExprs const*, int32_t, DimsExprs* out,
                                       int32_t outputs, IExprBuilder&) noexcept {
    if (!inputs_fit(inputs) || outputs != 1) return -1;
    out[0] = in[0];
    return 0;
}

int64_t CoreAttention::workspace(const Shapes& most) const { return attention_workspace(sizes(most), grid_blocks_); }

int32_t CoreAttention::enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
                               void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
    if (shown_inputs() == 0) return status(cudaErrorNotReady);
    const Shapes shapes = shapes_of(in, shown_inputs());
    AttentionCall call{};
    call.sizes = sizes(shapes);
    call.mask_batch = static_cast<int32_t>(shapes[3].d[0]);
    call.grid_blocks = grid_blocks_;
    call.scale = scale_;
    call.q = inputs[0];
    call.k = inputs[1];
    call.v = inputs[2];
    call.mask = inputs[3];
    call.ids = shapes.size() == 5 ? static_cast<const int32_t*>(inputs[4]) : nullptr;
    call.y = outputs[0];
    call.workspace = static_cast<float*>(workspace);
    if (call.sizes.rows() == 0) return 0;
    switch (in[0].type) {
        case DataType::kFLOAT: return status(run_attention<float>(call, stream));
        case DataType::kHALF: return status(run_attention<__half>(call, stream));
        case DataType::kBF16: return status(run_attention<__nv_bfloat16>(call, stream));
        default: return status(cudaErrorInvalidValue);
    }
}

}  // namespace cm
