// Attention over a cache as one op: what stands between the products of q, k and v and the product of their mix.
//
//     CachedAttention(q, k, v, past_key, past_value, slots, mask[, cos, sin, q_bias, k_bias, v_bias, q_norm, k_norm])
//         -> y [B,N,H d], present_key, present_value [B,Hk,C,d]
//
//     q, k, v    float32 [B,N,any] or [B,N,heads,d]: the heads begin at number q_first, k_first, v_first of a token's numbers,
//                so that a product which gives all three is read where it lies
//     past_*     [B,Hk,C,d]; if present_* is the same memory nothing is copied
//     slots      int64 [B,Hk,N,3]: request, head and row into which a new row is written
//     mask       [B|1,1,N,C], added to the scores. Rows at the least float32 or below are not read: their share would be 0
//     cos, sin   [B|1,N,w] (or [B|1,1,N,w]), w = rotary / 2, or rotary with both halves of their own; none: nothing is turned
//     *_bias     [heads d] added first      *_norm [d]: RMS norm over a head, with `epsilon`, before it is turned
//
// Heads, Hk, d, rotary (the first numbers of a head that are turned, even), scale and epsilon are attributes.
#include <atomic>
#include <cstring>
#include <limits>

#include "op.h"

namespace cm::cpu {
namespace {

constexpr int64_t kWorthSharing = 1 << 15;  // products of numbers: less is computed by the thread that asks

enum Input : size_t { kQ, kK, kV, kPastKey, kPastValue, kSlots, kMask, kCos, kSin, kQBias, kKBias, kVBias, kQNorm, kKNorm };

// Buffers of a call, those of its thread.
struct Scratch {
    std::vector<float> q, added;  // [B,N,H,apart]; [B,N,C filled up]
    std::vector<int32_t> rows;    // [B,N,C]
    std::vector<int64_t> seen;    // [B,N]
};

Scratch& scratch() {
    static thread_local Scratch buffers;
    return buffers;
}

float* working(size_t count) {
    static thread_local std::vector<float> buffer;
    if (buffer.size() < count) buffer.resize(count);
    return buffer.data();
}

struct CachedAttention {
    static constexpr const char* kName = "CachedAttention";
    static constexpr ort::ElementType kTypes[] = {ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat,
                                                  ort::kInt64, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat,
                                                  ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat};
    static constexpr size_t kRequired = 7, kOutputs = 3;
    int64_t heads, kv_heads, width, rotary, first[3];
    float scale, epsilon;

    explicit CachedAttention(const ort::Info* info)
        : heads(integer(info, kName, "heads")),
          kv_heads(integer(info, kName, "kv_heads")),
          width(integer(info, kName, "d")),
          rotary(integer(info, kName, "rotary")),
          first{integer(info, kName, "q_first"), integer(info, kName, "k_first"), integer(info, kName, "v_first")},
          scale(number(info, kName, "scale")),
          epsilon(number(info, kName, "epsilon")) {
        if (kv_heads < 1 || heads < 1 || heads % kv_heads)
            fail(kName, std::to_string(heads) + " heads of queries, " + std::to_string(kv_heads) + " of keys");
        if (width < 1 || width > kMaxHead) fail(kName, "d is " + std::to_string(width) + ", not 1 to " + std::to_string(kMaxHead));
        if (rotary < 0 || rotary > width || rotary % 2) fail(kName, "rotary is " + std::to_string(rotary));
    }

    // One of q, k and v: where a token's heads begin.
    struct Source {
        const float* data = nullptr;
        int64_t tokens = 0;  // of a request
        size_t stride = 0;   // floats from a token to the next
    };

    // Sizes of a call.
    struct Sizes {
        int64_t batch = 0, tokens = 0, capacity = 0;
        size_t apart = 0;
        int64_t all() const { return batch * tokens; }
    };

    [[noreturn]] static void wrong(size_t index, const std::vector<int64_t>& shape, const std::string& expected) {
        fail(kName, "input " + std::to_string(index) + " is " + text_of(shape) + ", expected " + expected);
    }

    Source source(const ort::Context* context, size_t index, Sizes& sizes, int64_t heads_of_it) const {
        const Tensor x = input(context, index);
        if (x.shape.size() < 3) wrong(index, x.shape, "[B,N,heads d]");
        if (index == kQ) sizes.batch = x.shape[0], sizes.tokens = x.shape[1];
        int64_t stride = 1;
        for (size_t i = 2; i < x.shape.size(); ++i) stride *= x.shape[i];
        if (x.shape[0] != sizes.batch || x.shape[1] != sizes.tokens || first[index] < 0 || first[index] + heads_of_it * width > stride)
            wrong(index, x.shape, text_of({sizes.batch, sizes.tokens, first[index] + heads_of_it * width}) + " or wider");
        return {static_cast<const float*>(x.data) + first[index], sizes.tokens, static_cast<size_t>(stride)};
    }

    // Its numbers; null where the node does not have this input.
    static const float* vector(const ort::Context* context, size_t index, int64_t count) {
        const Tensor x = input(context, index);
        if (x.data != nullptr && x.count() != count) wrong(index, x.shape, text_of({count}));
        return static_cast<const float*>(x.data);
    }

    // The memory that holds the cache afterwards, with what `past` holds.
    float* cache(ort::Context* context, size_t index, Sizes& sizes, size_t of_output) const {
        const Tensor past = input(context, index);
        if (index == kPastKey && past.shape.size() == 4) sizes.capacity = past.shape[2];
        const std::vector<int64_t> expected{sizes.batch, kv_heads, sizes.capacity, width};
        if (past.shape != expected) wrong(index, past.shape, text_of(expected));
        float* present = output(context, past.shape, of_output);
        if (present != past.data) std::memcpy(present, past.data, static_cast<size_t>(past.count()) * sizeof(float));
        return present;
    }

    // cos and sin of the first token, and how far those of the next token and of a head's second half are.
    struct Angles {
        const float *cos = nullptr, *sin = nullptr;
        size_t stride = 0, second = 0;
        bool each_request = false;
    };

    Angles angles(const ort::Context* context, const Sizes& sizes) const {
        if (rotary == 0) return {};
        const Tensor cos = input(context, kCos), sin = input(context, kSin);
        const int64_t last = cos.shape.empty() ? 0 : cos.shape.back();
        const bool both = last == rotary, each = cos.count() == sizes.all() * last;
        if ((!both && last != rotary / 2) || (!each && cos.count() != sizes.tokens * last) || cos.shape != sin.shape)
            wrong(kCos, cos.shape, text_of({sizes.batch, sizes.tokens, rotary / 2}) + ", and sin the same");
        return {static_cast<const float*>(cos.data), static_cast<const float*>(sin.data), static_cast<size_t>(last),
                both ? static_cast<size_t>(rotary / 2) : 0, each};
    }

    // Which rows a token sees, and what the mask adds to their scores.
    static void list(const float* mask, int64_t capacity, int32_t* rows, float* added, int64_t* seen) {
        int64_t count = 0;
        for (int64_t row = 0; row < capacity; ++row) {
            rows[count] = static_cast<int32_t>(row), added[count] = mask[row];
            count += !(mask[row] <= std::numeric_limits<float>::lowest());
        }
        for (int64_t i = count; i < count + kStep; ++i) added[i] = 0.0f;
        *seen = count;
    }

    void compute(ort::Context* context) {
        Sizes sizes;
        const Source q = source(context, kQ, sizes, heads);
        const Source k = source(context, kK, sizes, kv_heads), v = source(context, kV, sizes, kv_heads);
        float* keys = cache(context, kPastKey, sizes, 1);
        float* values = cache(context, kPastValue, sizes, 2);
        const Tensor slots = input(context, kSlots), mask = input(context, kMask);
        const std::vector<int64_t> of_slots{sizes.batch, kv_heads, sizes.tokens, 3};
        std::vector<int64_t> of_mask{sizes.batch, 1, sizes.tokens, sizes.capacity};
        if (slots.shape != of_slots) wrong(kSlots, slots.shape, text_of(of_slots));
        if (!mask.shape.empty() && mask.shape[0] == 1) of_mask[0] = 1;
        if (mask.shape != of_mask) wrong(kMask, mask.shape, text_of(of_mask));
        check_slots(static_cast<const int64_t*>(slots.data), sizes);
        sizes.apart = static_cast<size_t>((width + kStep - 1) / kStep * kStep);
        float* y = output(context, {sizes.batch, sizes.tokens, heads * width});
        if (sizes.all() == 0) return;

        const Angles turned = angles(context, sizes);
        Turn of_q{vector(context, kQBias, heads * width), vector(context, kQNorm, width)};
        Turn of_k{vector(context, kKBias, kv_heads * width), vector(context, kKNorm, width)};
        Turn of_v{vector(context, kVBias, kv_heads * width)};
        for (Turn* one : {&of_q, &of_k, &of_v}) {
            one->width = static_cast<int>(width), one->epsilon = epsilon;
            one->rotary = static_cast<int>(one == &of_v ? 0 : rotary), one->second = turned.second;
        }
        of_q.factor = scale;
        const Kernels& kernel = kernels();
        Scratch& buffers = scratch();
        const int64_t row_of_added = sizes.capacity + kStep;
        buffers.q.assign(static_cast<size_t>(sizes.all() * heads) * sizes.apart, 0.0f);
        buffers.rows.resize(static_cast<size_t>(sizes.all() * sizes.capacity) + 1);
        buffers.added.resize(static_cast<size_t>(sizes.all() * row_of_added));
        buffers.seen.resize(static_cast<size_t>(sizes.all()));
        // First every token's query is made ready and its key and value are written: the tokens behind it read them.
        auto write = [&](size_t token) {
            const int64_t b = static_cast<int64_t>(token) / sizes.tokens, n = static_cast<int64_t>(token) % sizes.tokens;
            const size_t angle = (turned.each_request ? token : n) * turned.stride;
            const auto all_heads = [&](Turn turn, const Source& from, int64_t count, auto&& to) {
                if (turn.rotary) turn.cos = turned.cos + angle, turn.sin = turned.sin + angle;
                const float* bias = turn.bias;
                for (int64_t h = 0; h < count; ++h) {
                    if (bias != nullptr) turn.bias = bias + h * width;
                    kernel.turn(turn, from.data + token * from.stride + h * width, to(h));
                }
            };
            const auto row = [&](float* memory) {
                return [=, &sizes, &slots](int64_t h) {
                    const int64_t* slot = static_cast<const int64_t*>(slots.data) + ((b * kv_heads + h) * sizes.tokens + n) * 3;
                    return memory + ((b * kv_heads + h) * sizes.capacity + slot[2]) * width;
                };
            };
            all_heads(of_q, q, heads, [&](int64_t h) { return buffers.q.data() + (token * heads + h) * sizes.apart; });
            all_heads(of_k, k, kv_heads, row(keys));
            all_heads(of_v, v, kv_heads, row(values));
            const int64_t of_mask_row = (mask.shape[0] == 1 ? n : static_cast<int64_t>(token)) * sizes.capacity;
            list(static_cast<const float*>(mask.data) + of_mask_row, sizes.capacity,
                 buffers.rows.data() + token * sizes.capacity, buffers.added.data() + token * row_of_added, &buffers.seen[token]);
        };
        share(context, sizes, static_cast<size_t>(sizes.all()), sizes.all() * (heads + 2 * kv_heads) * width, write);

        // Query heads that share keys are a task, or less of them where that leaves threads without one.
        const int64_t group = heads / kv_heads, tasks = sizes.all() * kv_heads;
        const int64_t parts = std::min(group, std::max((group + kMaxHeads - 1) / kMaxHeads, (processors() + tasks - 1) / tasks));
        auto attend = [&](size_t task) {
            const int64_t part = static_cast<int64_t>(task) % parts, token = static_cast<int64_t>(task) / parts % sizes.all();
            const int64_t kv = static_cast<int64_t>(task) / parts / sizes.all(), b = token / sizes.tokens;
            const int64_t begin = group * part / parts, end = group * (part + 1) / parts, head = kv * group + begin;
            const size_t in_cache = static_cast<size_t>((b * kv_heads + kv) * sizes.capacity * width);
            Attention a;
            a.heads = static_cast<int>(end - begin), a.width = static_cast<int>(width), a.apart = sizes.apart;
            a.q = buffers.q.data() + (token * heads + head) * sizes.apart;
            a.keys = keys + in_cache, a.values = values + in_cache;
            a.rows = buffers.rows.data() + token * sizes.capacity, a.added = buffers.added.data() + token * row_of_added;
            a.seen = buffers.seen[token];
            a.y = working(a.heads * (sizes.apart + static_cast<size_t>(a.seen) + kStep));
            a.scores = a.y + a.heads * sizes.apart;
            kernel.attend(a);
            float* out = y + (token * heads + head) * width;
            for (int h = 0; h < a.heads; ++h) std::memcpy(out + h * width, a.y + h * sizes.apart, width * sizeof(float));
        };
        share(context, sizes, static_cast<size_t>(tasks * parts), 2 * sizes.all() * heads * width * sizes.capacity, attend);
    }

    // In the session's threads, where there is enough to do.
    template <class Function>
    static void share(const ort::Context* context, const Sizes&, size_t tasks, int64_t products, Function& function) {
        if (products >= kWorthSharing) return in_parallel(context, tasks, function);
        for (size_t i = 0; i < tasks; ++i) function(i);
    }

    void check_slots(const int64_t* slot, const Sizes& sizes) const {
        for (int64_t b = 0; b < sizes.batch; ++b)
            for (int64_t h = 0; h < kv_heads; ++h)
                for (int64_t n = 0; n < sizes.tokens; ++n, slot += 3)
                    if (slot[0] != b || slot[1] != h || slot[2] < 0 || slot[2] >= sizes.capacity)
                        fail(kName, "slot " + text_of({slot[0], slot[1], slot[2]}) + " of request " + std::to_string(b) + ", head " +
                                        std::to_string(h) + " does not lie in its cache of " + std::to_string(sizes.capacity) + " rows");
    }
};

}  // namespace

const ort::CustomOp* cached_attention() { return described<CachedAttention>(); }

}  // namespace cm::cpu
