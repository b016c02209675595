// Attention over a cache as one op: what stands between the products of q, k and v and the product of their mix.
//
//     CachedAttention(q, k, v, past_key, past_value, slots, mask[, cos, sin, q_bias, k_bias, v_bias, q_norm, k_norm, listed])
//         -> y [B,N,H d], present_key, present_value [B,Hk,C,d]
//
//     q, k, v    float32 [B,N,any] or [B,N,heads,d]: the heads begin at number q_first, k_first, v_first of a token's numbers,
//                so that a product which gives all three is read where it lies
//     past_*     [B,Hk,C,d]; if present_* is the same memory nothing is copied
//     slots      int64 [B,Hk,N,3]: request, head and row into which a new row is written
//     mask       [B|1,1,N,C], added to the scores. Rows at the least float32 or below are not read: their share would be 0
//     cos, sin   [B|1,N,w] (or [B|1,1,N,w]), w = rotary / 2, or rotary with both halves of their own; none: nothing is turned
//     *_bias     [heads d] added first      *_norm [d]: RMS norm over a head, with `epsilon`, before it is turned
//     listed     int32 [B,M]: only these rows are read, in this order; one that is listed twice counts twice; none: all rows
//
//     past_* and present_* may be float16 [B,Hk,C,d] or uint8 [B,Hk,C,w] (rows of bytes, kernels.h) instead: a new row is rounded,
//     and read as it was rounded, by its own token as well
//
// Heads, Hk, d, rotary (the first numbers of a head that are turned, even), scale and epsilon are attributes.
#include <cstring>
#include <limits>

#include "kernels.h"
#include "op.h"

namespace cm::cpu {
namespace {

constexpr int64_t kWorthSharing = 1 << 15;  // products of numbers: less is computed by the thread that asks

enum Input : size_t { kQ, kK, kV, kPastKey, kPastValue, kSlots, kMask, kCos, kSin, kQBias, kKBias, kVBias, kQNorm, kKNorm, kListed };

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

template <Cells cells>
struct CachedAttention {
    static constexpr const char* kName = "CachedAttention";
    static constexpr ort::ElementType kOfCache =
        cells == Cells::kFloat ? ort::kFloat : cells == Cells::kHalf ? ort::kFloat16 : ort::kUint8;
    static constexpr ort::ElementType kTypes[] = {ort::kFloat, ort::kFloat, ort::kFloat, kOfCache,    kOfCache,
                                                  ort::kInt64, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat,
                                                  ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kInt32};
    static constexpr const char* kProvider = nullptr;
    static constexpr ort::ElementType kOutputs[] = {ort::kFloat, kOfCache, kOfCache};
    static constexpr size_t kRequired = 7;
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

    // One of q, k and v: where a token's heads begin, and how they are turned.
    struct Source {
        const float* data = nullptr;
        size_t stride = 0;  // floats from a token to the next
        Turn turn;
    };

    // A call: its sizes, and where everything lies. All that depends on a token is [B,N] of it.
    struct Call {
        int64_t batch = 0, tokens = 0, capacity = 0;
        size_t apart = 0;  // of a head, filled up
        Source q, k, v;
        uint8_t *keys = nullptr, *values = nullptr;
        float* y = nullptr;
        const int64_t* slots = nullptr;
        const int32_t* listed = nullptr;  // [B, those]; null: every row of the capacity
        int64_t those = 0;
        const float *mask = nullptr, *cos = nullptr, *sin = nullptr;
        size_t angles = 0;  // floats of cos for a token
        bool mask_of_each = false, angles_of_each = false;
        Scratch* scratch = nullptr;

        int64_t all() const { return batch * tokens; }
        int64_t row_of_added() const { return those + kStep; }
    };

    [[noreturn]] static void wrong(size_t index, const std::vector<int64_t>& shape, const std::string& expected) {
        fail(kName, "input " + std::to_string(index) + " is " + text_of(shape) + ", expected " + expected);
    }

    // ---------------------------------------------------------------- inputs
    Source source(const ort::Context* context, size_t index, Call& call, int64_t heads_of_it) const {
        const Tensor x = input(context, index);
        if (x.shape.size() < 3) wrong(index, x.shape, "[B,N,heads d]");
        if (index == kQ) call.batch = x.shape[0], call.tokens = x.shape[1];
        int64_t stride = 1;
        for (size_t i = 2; i < x.shape.size(); ++i) stride *= x.shape[i];
        const int64_t end = first[index] + heads_of_it * width;
        if (x.shape[0] != call.batch || x.shape[1] != call.tokens || first[index] < 0 || end > stride)
            wrong(index, x.shape, text_of({call.batch, call.tokens, end}) + " or wider");
        Source found{static_cast<const float*>(x.data) + first[index], static_cast<size_t>(stride), {}};
        found.turn.width = static_cast<int>(width), found.turn.epsilon = epsilon;
        found.turn.bias = vector(context, kQBias + index, heads_of_it * width);
        if (index == kV) return found;
        found.turn.rotary = static_cast<int>(rotary);
        found.turn.norm = vector(context, kQNorm + index, width);
        return found;
    }

    // Its numbers; null where the node does not have this input.
    static const float* vector(const ort::Context* context, size_t index, int64_t count) {
        const Tensor x = input(context, index);
        if (x.data != nullptr && x.count() != count) wrong(index, x.shape, text_of({count}));
        return static_cast<const float*>(x.data);
    }

    size_t row_size() const { return bytes_of_row(cells, width); }

    // The memory that holds the cache afterwards, with what `past` holds.
    uint8_t* cache(ort::Context* context, size_t index, Call& call, size_t of_output) const {
        const Tensor past = input(context, index);
        if (index == kPastKey && past.shape.size() == 4) call.capacity = past.shape[2];
        const std::vector<int64_t> expected{call.batch, kv_heads, call.capacity, cells_of_row(cells, width)};
        if (past.shape != expected) wrong(index, past.shape, text_of(expected));
        auto* present = output<uint8_t>(context, past.shape, of_output);
        const size_t size = static_cast<size_t>(call.batch * kv_heads * call.capacity) * row_size();
        if (present != past.data && size != 0) std::memcpy(present, past.data, size);
        return present;
    }

    void read_slots_and_mask(const ort::Context* context, Call& call) const {
        const Tensor slots = input(context, kSlots), mask = input(context, kMask);
        const std::vector<int64_t> of_slots{call.batch, kv_heads, call.tokens, 3};
        if (slots.shape != of_slots) wrong(kSlots, slots.shape, text_of(of_slots));
        call.slots = static_cast<const int64_t*>(slots.data);
        check_slots(call.slots, call);
        call.mask_of_each = mask.shape.empty() || mask.shape[0] != 1;
        const std::vector<int64_t> of_mask{call.mask_of_each ? call.batch : 1, 1, call.tokens, call.capacity};
        if (mask.shape != of_mask) wrong(kMask, mask.shape, text_of(of_mask));
        call.mask = static_cast<const float*>(mask.data);
    }

    void read_list(const ort::Context* context, Call& call) const {
        const Tensor listed = input(context, kListed);
        call.those = call.capacity;
        if (listed.data == nullptr) return;
        if (listed.shape.size() != 2 || listed.shape[0] != call.batch) wrong(kListed, listed.shape, "[B,M]");
        call.listed = static_cast<const int32_t*>(listed.data), call.those = listed.shape[1];
        for (int64_t i = 0; i < listed.count(); ++i)
            if (call.listed[i] < 0 || call.listed[i] >= call.capacity)
                fail(kName, "row " + std::to_string(call.listed[i]) + " is listed of a cache of " + std::to_string(call.capacity));
    }

    void read_angles(const ort::Context* context, Call& call) const {
        if (rotary == 0) return;
        const Tensor cos = input(context, kCos), sin = input(context, kSin);
        const int64_t last = cos.shape.empty() ? 0 : cos.shape.back();
        const bool both = last == rotary;
        call.angles_of_each = cos.count() == call.all() * last;
        if ((!both && last != rotary / 2) || (!call.angles_of_each && cos.count() != call.tokens * last) || cos.shape != sin.shape)
            wrong(kCos, cos.shape, text_of({call.batch, call.tokens, rotary / 2}) + ", and sin the same");
        call.cos = static_cast<const float*>(cos.data), call.sin = static_cast<const float*>(sin.data);
        call.angles = static_cast<size_t>(last);
        call.q.turn.second = call.k.turn.second = both ? static_cast<size_t>(rotary / 2) : 0;
    }

    void compute(ort::Context* context) {
        Call call;
        call.q = source(context, kQ, call, heads);
        call.k = source(context, kK, call, kv_heads), call.v = source(context, kV, call, kv_heads);
        call.keys = cache(context, kPastKey, call, 1), call.values = cache(context, kPastValue, call, 2);
        read_slots_and_mask(context, call);
        read_list(context, call);
        read_angles(context, call);
        call.q.turn.factor = scale;
        call.y = output(context, {call.batch, call.tokens, heads * width});
        if (call.all() == 0) return;

        Scratch& buffers = *(call.scratch = &scratch());
        call.apart = static_cast<size_t>((width + kStep - 1) / kStep * kStep);
        buffers.q.assign(static_cast<size_t>(call.all() * heads) * call.apart, 0.0f);
        buffers.rows.resize(static_cast<size_t>(call.all() * call.those));
        buffers.added.resize(static_cast<size_t>(call.all() * call.row_of_added()));
        buffers.seen.resize(static_cast<size_t>(call.all()));
        // Every token is written before any is attended to: those behind it read its row.
        const Kernels& kernel = kernels();
        auto write_one = [&](size_t token) { write(call, kernel, static_cast<int64_t>(token)); };
        share(context, static_cast<size_t>(call.all()), call.all() * (heads + 2 * kv_heads) * width, write_one);
        // Query heads that share keys are a task, or less of them where that leaves threads without one.
        const int64_t group = heads / kv_heads, tasks = call.all() * kv_heads;
        const int64_t parts = std::min(group, std::max((group + kMaxHeads - 1) / kMaxHeads, (processors() + tasks - 1) / tasks));
        auto attend_one = [&](size_t task) { attend(call, kernel, static_cast<int64_t>(task), parts); };
        share(context, static_cast<size_t>(tasks * parts), 2 * call.all() * heads * width * call.those, attend_one);
    }

    // In the session's threads, where there is enough to do.
    template <class Function>
    static void share(const ort::Context* context, size_t tasks, int64_t products, Function& function) {
        if (products >= kWorthSharing) return in_parallel(context, tasks, function);
        for (size_t i = 0; i < tasks; ++i) function(i);
    }

    // ---------------------------------------------------------------- a token
    // Which rows it sees, and what the mask adds to their scores.
    static void list(const Call& call, int64_t token) {
        const int64_t b = token / call.tokens, n = token % call.tokens;
        const float* mask = call.mask + (call.mask_of_each ? token : n) * call.capacity;
        int32_t* rows = call.scratch->rows.data() + token * call.those;
        float* added = call.scratch->added.data() + token * call.row_of_added();
        int64_t count = 0;
        const auto each = [&](int64_t row) {
            rows[count] = static_cast<int32_t>(row), added[count] = mask[row];
            count += !(mask[row] <= std::numeric_limits<float>::lowest());
        };
        for (int64_t i = 0; i < call.those; ++i) each(call.listed == nullptr ? i : call.listed[b * call.those + i]);
        for (int64_t i = count; i < count + kStep; ++i) added[i] = 0.0f;
        call.scratch->seen[static_cast<size_t>(token)] = count;
    }

    // Makes its query ready, writes its key and its value.
    void write(const Call& call, const Kernels& kernel, int64_t token) const {
        const int64_t b = token / call.tokens, n = token % call.tokens;
        const size_t angle = static_cast<size_t>(call.angles_of_each ? token : n) * call.angles;
        const auto each_head = [&](const Source& from, int64_t count, auto&& to) {
            Turn turn = from.turn;
            if (turn.rotary) turn.cos = call.cos + angle, turn.sin = call.sin + angle;
            const float* x = from.data + token * from.stride;
            for (int64_t h = 0; h < count; ++h, x += width) {
                if (from.turn.bias != nullptr) turn.bias = from.turn.bias + h * width;
                kernel.turn(turn, x, to(h));
            }
        };
        const auto row_of = [&](uint8_t* memory, int64_t h) {
            const int64_t head = b * kv_heads + h, row = call.slots[(head * call.tokens + n) * 3 + 2];
            return memory + (head * call.capacity + row) * row_size();
        };
        const auto write_heads = [&](const Source& from, uint8_t* memory) {
            if constexpr (cells != Cells::kFloat) {
                float* made = working(kv_heads * width);
                each_head(from, kv_heads, [&](int64_t h) { return made + h * width; });
                for (int64_t h = 0; h < kv_heads; ++h) kernel.round(cells, made + h * width, static_cast<int>(width), row_of(memory, h));
            } else {
                each_head(from, kv_heads, [&](int64_t h) { return reinterpret_cast<float*>(row_of(memory, h)); });
            }
        };
        each_head(call.q, heads, [&](int64_t h) { return call.scratch->q.data() + (token * heads + h) * call.apart; });
        write_heads(call.k, call.keys);
        write_heads(call.v, call.values);
        list(call, token);
    }

    // Tokens that follow each other in one cache are neighbours: what one has read, the next finds near.
    void attend(const Call& call, const Kernels& kernel, int64_t task, int64_t parts) const {
        const int64_t group = heads / kv_heads, token = task / parts % call.all(), kv = task / parts / call.all();
        const int64_t begin = group * (task % parts) / parts, end = group * (task % parts + 1) / parts, head = kv * group + begin;
        const size_t in_cache = static_cast<size_t>((token / call.tokens * kv_heads + kv) * call.capacity) * row_size();
        Attention a;
        a.heads = static_cast<int>(end - begin), a.width = static_cast<int>(width), a.apart = call.apart;
        a.q = call.scratch->q.data() + (token * heads + head) * call.apart;
        a.keys = call.keys + in_cache, a.values = call.values + in_cache, a.cells = cells, a.row = row_size();
        a.rows = call.scratch->rows.data() + token * call.those;
        a.added = call.scratch->added.data() + token * call.row_of_added();
        a.seen = call.scratch->seen[static_cast<size_t>(token)];
        a.y = working(a.heads * (call.apart + static_cast<size_t>(a.seen) + kStep));
        a.scores = a.y + a.heads * call.apart;
        kernel.attend(a);
        float* out = call.y + (token * heads + head) * width;
        for (int h = 0; h < a.heads; ++h) std::memcpy(out + h * width, a.y + h * call.apart, width * sizeof(float));
    }

    void check_slots(const int64_t* slot, const Call& call) const {
        for (int64_t b = 0; b < call.batch; ++b)
            for (int64_t h = 0; h < kv_heads; ++h)
                for (int64_t n = 0; n < call.tokens; ++n, slot += 3)
                    if (slot[0] != b || slot[1] != h || slot[2] < 0 || slot[2] >= call.capacity)
                        fail(kName, "slot " + text_of({slot[0], slot[1], slot[2]}) + " of request " + std::to_string(b) + ", head " +
                                        std::to_string(h) + " does not lie in its cache of " + std::to_string(call.capacity) + " rows");
    }
};

}  // namespace

const ort::CustomOp* cached_attention() { return described<CachedAttention<Cells::kFloat>>(); }
const ort::CustomOp* cached_attention_in_halves() { return described<CachedAttention<Cells::kHalf>>(); }
const ort::CustomOp* cached_attention_in_bytes() { return described<CachedAttention<Cells::kByte>>(); }

}  // namespace cm::cpu
