// Attention of a prompt's tokens, or of a picture's patches, to each other.
//
//     PromptAttention(q [B,H,N,d], k, v [B,Hk,M,d][, mask]) -> y [B,H,N,d]
//
//     mask   float32, added to the scores, or bool, what is seen; any shape that stretches to [B,H,N,M]; none: everything is seen.
//            At the least float32 or below a key is not seen. A query that sees none gets numbers that mean nothing, but no NaN
//
// Head h reads keys h / (H / Hk); `scale` is an attribute. Queries of one head are attended to together (attention.h), and
// of the keys only those from the first to the last that one of them sees: half of them in a prompt.
#include <cstring>
#include <limits>
#include <numeric>

#include "kernels.h"
#include "op.h"

namespace cm::cpu {
namespace {

struct PromptAttention {
    static constexpr const char* kName = "PromptAttention";
    static constexpr ort::ElementType kTypes[] = {ort::kFloat, ort::kFloat, ort::kFloat, ort::kAny};
    static constexpr const char* kProvider = nullptr;
    static constexpr size_t kRequired = 3;
    static constexpr ort::ElementType kOutputs[] = {ort::kFloat};
    float scale;

    explicit PromptAttention(const ort::Info* info) : scale(number(info, kName, "scale")) {}

    // What each query sees of the keys.
    struct Mask {
        const float* added = nullptr;
        const bool* seen = nullptr;
        size_t apart[4] = {};  // from a request, a head, a query, a key to the next; 0: the same for all

        bool any() const { return added != nullptr || seen != nullptr; }
        bool shows(size_t at) const { return seen != nullptr ? seen[at] : !(added[at] <= std::numeric_limits<float>::lowest()); }
        float of(size_t at) const {
            return seen == nullptr ? added[at] : (seen[at] ? 0.0f : -std::numeric_limits<float>::infinity());
        }
    };

    // Keys from the first to the last that some queries see.
    struct Range {
        int64_t begin, end;
    };

    struct Call {
        int64_t batch, heads, kv_heads, queries, keys, width;
        const float *q, *k, *v;
        float* y;
        Mask mask;
        const int32_t* rows;  // 0 .. keys - 1
        // Keys once more, so that a register holds the same number of several: [B,Hk, M filled up / kStep, d, kStep]; where
        // there are tiles those of keys and values in their place.
        float* turned;
        uint16_t* tiles;
        int64_t filled;        // M, filled up to a multiple of kInputsOfTile

        const float* turned_of(int64_t kv) const { return turned + kv * filled * width; }
        uint16_t* tiles_of(int64_t kv, int64_t key) const { return tiles + (kv * filled + key) / kInputsOfTile * tiles_of_keys(width); }
    };

    static void sizes(const ort::Context* context, Call& call) {
        const Tensor q = input(context, 0), k = input(context, 1), v = input(context, 2);
        for (const Tensor* x : {&q, &k, &v})
            if (x->shape.size() != 4) fail(kName, "an input is " + text_of(x->shape) + ", expected [B,heads,tokens,d]");
        call.batch = q.shape[0], call.heads = q.shape[1], call.queries = q.shape[2], call.width = q.shape[3];
        call.kv_heads = k.shape[1], call.keys = k.shape[2];
        const std::vector<int64_t> expected{call.batch, call.kv_heads, call.keys, call.width};
        if (k.shape != expected || v.shape != expected)
            fail(kName, "keys are " + text_of(k.shape) + " and values " + text_of(v.shape) + " for queries " + text_of(q.shape));
        if (call.kv_heads < 1 || call.heads % call.kv_heads)
            fail(kName, std::to_string(call.heads) + " heads of queries, " + std::to_string(call.kv_heads) + " of keys");
        if (call.width < 1 || call.width > kMaxHead)
            fail(kName, "d is " + std::to_string(call.width) + ", not 1 to " + std::to_string(kMaxHead));
        call.q = static_cast<const float*>(q.data), call.k = static_cast<const float*>(k.data);
        call.v = static_cast<const float*>(v.data);
    }

    static void read_mask(const ort::Context* context, Call& call) {
        const Tensor mask = input(context, 3);
        if (mask.data == nullptr && mask.shape.empty()) return;
        const int64_t whole[] = {call.batch, call.heads, call.queries, call.keys};
        const size_t rank = mask.shape.size();
        size_t apart = 1;
        for (size_t i = 4; i-- > 0;) {
            const int64_t size = i + rank >= 4 ? mask.shape[i + rank - 4] : 1;
            if (rank > 4 || (size != 1 && size != whole[i]))
                fail(kName, "the mask is " + text_of(mask.shape) + ", expected " + text_of({whole, whole + 4}) + " or 1 for any of them");
            call.mask.apart[i] = size == 1 ? 0 : apart;
            apart *= static_cast<size_t>(size);
        }
        if (mask.type == ort::kBool) {
            call.mask.seen = static_cast<const bool*>(mask.data);
        } else if (mask.type == ort::kFloat) {
            call.mask.added = static_cast<const float*>(mask.data);
        } else {
            fail(kName, "the mask is of element type " + std::to_string(mask.type) + ", expected float32 or bool");
        }
    }

    void compute(ort::Context* context) {
        Call call{};
        sizes(context, call);
        read_mask(context, call);
        call.y = output(context, {call.batch, call.heads, call.queries, call.width});
        if (call.batch * call.queries == 0) return;
        static thread_local std::vector<int32_t> rows;
        if (static_cast<int64_t>(rows.size()) < call.keys) {
            rows.resize(static_cast<size_t>(call.keys));
            std::iota(rows.begin(), rows.end(), 0);
        }
        call.rows = rows.data();
        const Kernels& kernel = kernels();
        const bool in_tiles = kernel.attend_tiles != nullptr;
        const int64_t heads_of_keys = call.batch * call.kv_heads;
        call.filled = steps_of(call.keys) * kInputsOfTile;
        Aligned memory;  // not kept: it grows with the prompt
        if (in_tiles) {
            call.tiles = memory.of<uint16_t>(heads_of_keys * call.filled / kInputsOfTile * tiles_of_keys(call.width));
        } else {
            call.turned = memory.of<float>(static_cast<size_t>(heads_of_keys * call.filled * call.width));
        }
        auto make_ready = [&](size_t i) {
            const int64_t kv = static_cast<int64_t>(i), first = kv * call.keys * call.width;
            if (in_tiles) return kernel.tile_head(call.k + first, call.v + first, call.keys, call.width, call.tiles_of(kv, 0));
            turn(call, kv);
        };
        in_parallel(context, static_cast<size_t>(heads_of_keys), make_ready);
        const int64_t blocks = (call.queries + kMaxHeads - 1) / kMaxHeads;
        const int64_t masks = (call.mask.apart[0] ? call.batch : 1) * (call.mask.apart[1] ? call.heads : 1);
        std::vector<Range> seen(static_cast<size_t>(masks * blocks));
        auto see = [&](size_t i) {
            const int64_t mask = static_cast<int64_t>(i) / blocks, heads = call.mask.apart[1] ? call.heads : 1;
            seen[i] = seen_by(call, mask / heads, mask % heads, static_cast<int64_t>(i) % blocks * kMaxHeads);
        };
        in_parallel(context, seen.size(), see);
        auto attend_block = [&](size_t task) {
            const int64_t block = static_cast<int64_t>(task) % blocks, head = static_cast<int64_t>(task) / blocks;
            const int64_t b = head / call.heads, h = head % call.heads;
            const int64_t mask = (call.mask.apart[0] ? b : 0) * (call.mask.apart[1] ? call.heads : 1) + (call.mask.apart[1] ? h : 0);
            attend(call, kernel, b, h, block * kMaxHeads, seen[static_cast<size_t>(mask * blocks + block)]);
        };
        in_parallel(context, static_cast<size_t>(call.batch * call.heads * blocks), attend_block);
    }

    static void turn(const Call& call, int64_t kv) {
        const float* from = call.k + kv * call.keys * call.width;
        float* to = call.turned + kv * call.filled * call.width;
        for (int64_t key = 0; key < call.filled; ++key) {
            float* of_key = to + key / kStep * kStep * call.width + key % kStep;
            for (int64_t i = 0; i < call.width; ++i) of_key[i * kStep] = key < call.keys ? from[key * call.width + i] : 0.0f;
        }
    }

    static size_t mask_at(const Call& call, int64_t b, int64_t head, int64_t query) {
        return b * call.mask.apart[0] + head * call.mask.apart[1] + query * call.mask.apart[2];
    }

    static Range seen_by(const Call& call, int64_t b, int64_t head, int64_t first) {
        if (!call.mask.any()) return {0, call.keys};
        Range seen{call.keys, 0};
        for (int64_t query = first; query < std::min(first + kMaxHeads, call.queries); ++query) {
            const auto shows = [&](int64_t key) { return call.mask.shows(mask_at(call, b, head, query) + key * call.mask.apart[3]); };
            for (int64_t key = 0; key < seen.begin; ++key)
                if (shows(key)) seen.begin = key;
            for (int64_t key = call.keys; key > std::max(seen.end, seen.begin); --key)
                if (shows(key - 1)) seen.end = key;
        }
        return {seen.begin / kInputsOfTile * kInputsOfTile, seen.end};
    }

    // Queries from `first` on of one head.
    void attend(const Call& call, const Kernels& kernel, int64_t b, int64_t head, int64_t first, Range seen) const {
        const int64_t count = std::min<int64_t>(kMaxHeads, call.queries - first), keys = seen.end - seen.begin;
        const size_t of_query = static_cast<size_t>(((b * call.heads + head) * call.queries + first) * call.width);
        float* y = call.y + of_query;
        if (seen.end == 0) return void(std::memset(y, 0, count * call.width * sizeof(float)));

        const size_t filled = static_cast<size_t>(keys + kStep - 1) / kStep * kStep;
        const int64_t kv = b * call.kv_heads + head / (call.heads / call.kv_heads);
        Attention a;
        a.heads = static_cast<int>(count), a.width = static_cast<int>(call.width), a.seen = keys;
        a.apart = static_cast<size_t>(call.width + kStep - 1) / kStep * kStep;
        const int64_t of_head = kv * call.keys * call.width;
        a.keys = reinterpret_cast<const uint8_t*>(call.k + of_head), a.values = reinterpret_cast<const uint8_t*>(call.v + of_head);
        a.row = static_cast<size_t>(call.width) * sizeof(float);
        a.rows = call.rows + seen.begin;
        if (call.tiles) a.tiles = call.tiles_of(kv, seen.begin);
        if (call.turned) a.turned = call.turned_of(kv) + seen.begin * call.width;
        const bool in_place = call.mask.added != nullptr && call.mask.apart[3] == 1;
        float* space = working(count * (2 * a.apart + 2 * filled) + filled);
        float *q = space, *added = space + 2 * count * a.apart + count * filled;
        a.q = q, a.y = space + count * a.apart, a.scores = space + 2 * count * a.apart;
        for (int64_t i = 0; i < count; ++i) {
            const float* from = call.q + of_query + i * call.width;
            float* to = q + i * a.apart;
            for (int64_t n = 0; n < call.width; ++n) to[n] = from[n] * scale;
            for (size_t n = call.width; n < a.apart; ++n) to[n] = 0.0f;
        }
        if (in_place) {
            a.added = call.mask.added + mask_at(call, b, head, first) + seen.begin, a.added_apart = call.mask.apart[2];
        } else {
            a.added = added, a.added_apart = call.mask.any() ? filled : 0;
            for (int64_t i = 0; i < (call.mask.any() ? count : 1); ++i)
                for (int64_t key = 0; key < keys; ++key)
                    added[i * filled + key] =
                        call.mask.any() ? call.mask.of(mask_at(call, b, head, first + i) + (seen.begin + key) * call.mask.apart[3]) : 0.0f;
        }
        (call.tiles ? kernel.attend_tiles : kernel.attend)(a);
        for (int64_t i = 0; i < count; ++i) std::memcpy(y + i * call.width, a.y + i * a.apart, call.width * sizeof(float));
    }
};

}  // namespace

const ort::CustomOp* prompt_attention() { return described<PromptAttention>(); }

}  // namespace cm::cpu
