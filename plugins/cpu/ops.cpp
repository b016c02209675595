// The products of the domain "com.cm_export.native" for ONNX Runtime, and what the library tells about itself.
//
//     PackedMatMul(x, codes, scale, zero, norm, threshold) -> y = x W
//     PackedFFN(x, gate_up codes/scale/zero, down codes/scale/zero, x_norm, z_norm, x_threshold, z_threshold) -> y
//
// A call with several rows of x is cut into blocks of rows, and the outputs of a block into spans for the session's threads.
// Each output is computed by one of them, in one order, so the number of threads changes nothing.

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels.h"
#include "selection.h"
#include "team.h"

#define CM_EXPORT extern "C" __attribute__((visibility("default")))

namespace cm::cpu {
namespace {

constexpr const char* kDomain = "com.cm_export.native";
constexpr const char* kVersion = "1";
constexpr int64_t kCacheBytes = 256 << 10;  // of outputs, in one span
constexpr size_t kShortRow = 20 << 10;      // bytes of a row of W up to which threads share the inputs
constexpr int kBlockRows = 64;              // of x, at least, for which a panel of W is unpacked
constexpr int64_t kParts = 4, kMinGroups = 4;
constexpr int64_t kGatePanels = 8;          // whose gates a thread computes at a time
constexpr int64_t kTilePanels = 4;          // of a span where x comes in tiles: long pieces of rows of W, and the second cache holds them

std::atomic<uint64_t> bytes_read{0}, bytes_dense{0};
std::atomic<const Kernels*> in_use{nullptr};

const Kernels* best() {
    const Kernels* const* kernels = all_kernels();
    while (!(*kernels)->usable()) ++kernels;  // the last is always usable
    return *kernels;
}

}  // namespace

const Kernels& kernels() {
    const Kernels* chosen = in_use.load(std::memory_order_relaxed);
    if (chosen == nullptr) in_use.store(chosen = best(), std::memory_order_relaxed);
    return *chosen;
}

void count_read(uint64_t read, uint64_t dense) { bytes_read += read, bytes_dense += dense; }

namespace {

// The three tensors of a packed weight, from input `index` on, as a matrix of `inputs` by panels of outputs.
Matrix matrix(const Tensor& codes, const Tensor& scale, const Tensor& zero, const std::string& op, size_t index, int bits, int group,
              int64_t inputs, int64_t panels) {
    Matrix m;
    m.bits = bits, m.group = bits == 32 ? 32 : group, m.inputs = inputs, m.panels = panels;
    const int64_t padded = bits == 32 ? inputs : m.groups() * group;
    const int64_t columns = bits == 32 ? panels * kPanel : static_cast<int64_t>(m.row_bytes());
    const std::string place = "input " + std::to_string(index) + " (codes)";
    if (codes.type != (bits == 32 ? ort::kFloat : ort::kUint8))
        fail(op, place + " must be " + (bits == 32 ? "float32" : "uint8") + " with bits " + std::to_string(bits));
    if (codes.shape != std::vector<int64_t>{padded, columns})
        fail(op, place + " is " + text_of(codes.shape) + ", expected " + text_of({padded, columns}));
    m.codes = static_cast<const uint8_t*>(codes.data);
    if (bits == 32) return m;
    const std::vector<int64_t> expected{padded / group, panels * kPanel};
    if (scale.shape != expected)
        fail(op, "input " + std::to_string(index + 1) + " (scale) is " + text_of(scale.shape) + ", expected " + text_of(expected));
    if (zero.count() != 0 && zero.shape != expected)
        fail(op, "input " + std::to_string(index + 2) + " (zero) is " + text_of(zero.shape) + ", expected " + text_of(expected) +
                     " or no elements");
    m.scale = static_cast<const uint16_t*>(scale.data);
    m.zero = zero.count() ? static_cast<const uint8_t*>(zero.data) : nullptr;
    return m;
}

// Bytes to which numbers of x are rounded; weights of 4 bits are multiplied with one byte of x all the same. 0, for prompts and
// pictures: one, or bfloat16 where this processor multiplies tiles of it.
int64_t x_bytes_of(const ort::Info* info, const char* op) {
    const int64_t bytes = integer(info, op, "x_bytes");
    if (bytes < 0 || bytes > 2) fail(op, "x_bytes are " + std::to_string(bytes) + ", not 0, 1 or 2");
    return bytes;
}

void check_form(const char* op, int64_t bits, int64_t group) {
    if (bits != 4 && bits != 8 && bits != 32) fail(op, "bits are " + std::to_string(bits) + ", not 4, 8 or 32");
    if (bits != 32 && group != 32 && group != 64 && group != 128) fail(op, "a group of " + std::to_string(group) + ", not 32, 64 or 128");
}

// A packed weight of a node. Where it is a constant, its shapes are looked at once, when the kernel is made: to ask for them at each
// step takes a microsecond for every matrix.
class Weight {
public:
    Weight(const ort::Info* info, const char* op, size_t index, int64_t bits, int64_t group, int64_t panels)
        : op_(op), index_(index), bits_(static_cast<int>(bits)), group_(static_cast<int>(group)), panels_(panels) {
        check_form(op, bits, group);
        Tensor codes, scale, zero;
        if (!constant(info, index, codes) || !constant(info, index + 1, scale) || !constant(info, index + 2, zero)) return;
        if (codes.shape.size() != 2) return;  // what is wrong with it is said when it is used
        try {
            known_ = matrix(codes, scale, zero, op, index, bits_, group_, codes.shape[0], panels);
        } catch (const Error&) {
        }
    }

    Matrix of(const ort::Context* context, int64_t inputs) const {
        const int64_t rows = bits_ == 32 ? inputs : (inputs + group_ - 1) / group_ * group_;
        if (known_.codes == nullptr || known_.inputs != rows)
            return matrix(input(context, index_), input(context, index_ + 1), input(context, index_ + 2), op_, index_, bits_, group_,
                          inputs, panels_);
        Matrix m = known_;
        m.inputs = inputs;
        return m;
    }

private:
    const char* op_;
    size_t index_;
    int bits_, group_;
    int64_t panels_;
    Matrix known_;  // with as many inputs as there are rows; no codes: it is no constant
};

// ---------------------------------------------------------------- products

// For each byte, the places of its bits that are set, and how many they are.
struct Places {
    uint8_t of[256][8] = {};
    uint8_t count[256] = {};
    constexpr Places() {
        for (int byte = 0; byte < 256; ++byte)
            for (int bit = 0; bit < 8; ++bit)
                if (byte >> bit & 1) of[byte][count[byte]++] = static_cast<uint8_t>(bit);
    }
};
constexpr Places kPlaces;

// ids and first from the bits of all rows.
void list(Rows& rows, const Matrix& m) {
    rows.first.assign(rows.groups + 1, 0);
    rows.ids.resize(static_cast<size_t>(rows.groups) * m.group + 8);  // eight are written at once
    rows.kept = rows.all_of = 0;
    int32_t *const all = rows.ids.data(), *end = all;
    for (int64_t g = 0; g < rows.groups; ++g) {
        const int32_t* begin = end;
        for (int64_t at = g * m.group; at < (g + 1) * m.group && at < m.inputs; at += 32) {
            uint32_t any = 0;  // a group begins at a multiple of 32
            for (int row = 0; row < rows.count; ++row)
                any |= static_cast<uint32_t>(rows.keep[row * rows.words + at / 64] >> (at % 64));
            for (int byte = 0; byte < 32; byte += 8) {
                const uint32_t bits = any >> byte & 255;
                for (int i = 0; i < 8; ++i) end[i] = static_cast<int32_t>(at) + byte + kPlaces.of[bits][i];
                end += kPlaces.count[bits];
            }
        }
        rows.kept += end - begin;
        const int32_t* last = begin + (end - begin) / kQuad * kQuad;
        while ((end - begin) % kQuad) *end++ = *last;
        rows.first[g + 1] = static_cast<int32_t>((end - all) / kQuad);
    }
    rows.ids.resize(static_cast<size_t>(end - all));
}

// The same where every k is listed.
void list_all(Rows& rows, const Matrix& m) {
    const int64_t quads = (m.inputs + kQuad - 1) / kQuad;
    rows.kept = m.inputs;
    if (rows.all_of == m.inputs && rows.in == m.group) return;  // they are there since the last call
    rows.all_of = m.inputs, rows.in = m.group;
    rows.ids.resize(static_cast<size_t>(quads * kQuad));
    for (int64_t k = 0; k < quads * kQuad; ++k) rows.ids[k] = static_cast<int32_t>(k < m.inputs ? k : (quads - 1) * kQuad);
    rows.first.resize(rows.groups + 1);
    for (int64_t g = 0; g <= rows.groups; ++g) rows.first[g] = static_cast<int32_t>(std::min(g * m.group / kQuad, quads));
}

void count_bytes(const Rows& rows, const Matrix& m) {
    int64_t groups = rows.groups;
    for (int64_t g = 0; g < rows.groups && !rows.tiles; ++g) groups -= rows.first[g] == rows.first[g + 1];
    const uint64_t scales = m.bits == 32 ? 0 : static_cast<uint64_t>(m.panels) * kPanel * (m.zero ? 3 : 2);
    count_read(static_cast<uint64_t>(rows.kept) * m.row_bytes() + groups * scales,
               static_cast<uint64_t>(m.inputs) * m.row_bytes() + rows.groups * scales);
}

// Whether x comes in tiles.
bool in_tiles(const Kernels& k, const Matrix& m, int64_t x_bytes, const Selection& selection) {
    return x_bytes == 0 && k.widen != nullptr && m.bits != 32 && selection.norm == nullptr;
}

// Some rows of x, `stride` floats apart, on their way into Rows.
struct Source {
    const float* x;
    size_t stride;
    int64_t first_row;  // of the call
    Selection selection;
};

// What comes first.
void begin(Rows& rows, int count, const Matrix& m, int64_t x_bytes) {
    rows.count = count;
    rows.groups = m.groups();
    rows.tiles = nullptr;
    rows.bytes = m.bits == 8 && x_bytes == 2 ? 2 : 1;
    rows.words = static_cast<size_t>(m.inputs + 63) / 64;
    rows.keep.resize(count * rows.words);
    rows.scale.resize(count * rows.groups);
    rows.sum.resize(count * rows.bytes * rows.groups);
}

// Which k from `first` to `last` a row keeps; `first` is a multiple of 64.
void keep(const Kernels& k, const Source& from, const Matrix& m, Rows& rows, int row, int64_t first, int64_t last) {
    const float* norm = from.selection.norm;
    k.keep(from.x + row * from.stride + first, norm == nullptr ? nullptr : norm + first, from.selection.of(from.first_row + row),
           std::min(last, m.inputs) - first, rows.keep.data() + row * rows.words + first / 64);
}

// What all rows keep together, and room for their codes.
void list(const Source& from, const Matrix& m, Rows& rows) {
    from.selection.norm == nullptr ? list_all(rows, m) : list(rows, m);
    m.bits == 32 ? rows.values.resize(rows.count * rows.ids.size()) : rows.reserve_codes();
    count_bytes(rows, m);
}

// Makes a block of `count` rows of x ready to be multiplied with `m`.
void prepare(const ort::Context* context, const Kernels& k, Rows& rows, const Source& from, int count, const Matrix& m, int64_t x_bytes) {
    if (in_tiles(k, m, x_bytes, from.selection)) {
        rows.count = count, rows.groups = m.groups(), rows.kept = m.inputs;
        rows.reserve_tiles(m.steps());
        auto widen = [&](size_t block) { k.widen(from.x, from.stride, m, rows, static_cast<int>(block)); };
        in_parallel(context, static_cast<size_t>(rows.blocks()), widen);
        return count_bytes(rows, m);
    }
    begin(rows, count, m, x_bytes);
    const size_t tasks = count <= kFewRows ? 1 : 4 * processors();
    const auto each_row = [&](size_t task, auto&& function) {
        for (size_t row = count * task / tasks; row < count * (task + 1) / tasks; ++row) function(static_cast<int>(row));
    };
    auto keep_all = [&](size_t task) { each_row(task, [&](int row) { keep(k, from, m, rows, row, 0, m.inputs); }); };
    in_parallel(context, tasks, keep_all);
    list(from, m, rows);
    auto quantise = [&](size_t task) {
        each_row(task, [&](int row) { k.quantise(from.x + row * from.stride, m, rows, row, 0, rows.groups); });
    };
    in_parallel(context, tasks, quantise);
}

// Whether reading W decides the time of a product, not arithmetic.
bool are_few(const Rows& rows) { return rows.count <= kFewRows && rows.tiles == nullptr; }

// How many spans the panels are cut into for so many threads. Few rows: long ones, so that each row of W is read in long
// stretches, but with outputs that fit into the second cache, since every group of inputs adds to all of them.
size_t spans_of(int64_t panels, const Rows& rows, int64_t threads) {
    const int64_t for_the_cache = panels * rows.count * kPanel * static_cast<int64_t>(sizeof(float)) / kCacheBytes;
    int64_t wanted = are_few(rows) ? std::max(threads, for_the_cache) : panels;
    if (rows.tiles) wanted = std::max(2 * threads, (panels + kTilePanels - 1) / kTilePanels);
    return static_cast<size_t>(std::max<int64_t>(1, std::min(panels, wanted)));
}

// Into how many blocks the rows of x are cut besides: where panels are few, some threads would have one more than others.
size_t blocks_of(const Rows& rows, const Matrix& m, size_t spans) {
    if (are_few(rows) || m.bits == 32) return 1;
    const size_t for_the_threads = (4 * processors() + spans - 1) / spans, most = rows.count / kBlockRows;
    return std::max<size_t>(1, std::min(for_the_threads, most));
}

// The first row of the i-th of them: the first of a tile.
int row_of(const Rows& rows, size_t i, size_t blocks) {
    return std::min(rows.count, static_cast<int>(rows.blocks() * i / blocks) * kRowsOfTile);
}

// How many of `total` rows are taken at once.
int at_once(int64_t total) {
    const int64_t times = (total + kManyRows - 1) / kManyRows;
    return static_cast<int>((total + times - 1) / std::max<int64_t>(times, 1));
}

// The i-th of them, less where its outputs go.
Span span_of(int64_t panels, size_t i, size_t spans) {
    return {static_cast<int64_t>(panels * i / spans), static_cast<int64_t>(panels * (i + 1) / spans)};
}

// Into how many parts the inputs are cut. Memory is read fastest from one end to the other, so threads share the inputs, each
// reads whole rows of W, and what each part adds is summed; long rows may as well be shared. It follows from the sizes alone:
// y is the same whoever computes it.
int64_t parts_of(const Matrix& m, const Rows& rows) {
    if (rows.tiles) return 1;
    return m.bits != 32 && m.row_bytes() <= kShortRow && m.groups() >= kParts * kMinGroups ? kParts : 1;
}

Groups groups_of(const Matrix& m, int64_t part, int64_t parts, bool add) {
    return {m.groups() * part / parts, m.groups() * (part + 1) / parts, add};
}

// What all parts add, one after the other; several of them only with many rows.
void multiply_all(const Kernels& k, const Matrix& m, const Rows& rows, const Span* spans, int count) {
    const int64_t parts = parts_of(m, rows);
    for (int64_t part = 0; part < parts; ++part) k.multiply(m, rows, groups_of(m, part, parts, part > 0), spans, count);
}

// Outputs of a span of panels, all parts of the inputs one after the other, in y [count, outputs].
void multiply_span(const Kernels& k, const Matrix& m, const Rows& rows, Span span, float* y, int64_t outputs) {
    const int64_t first = span.begin * kPanel, width = (span.end - span.begin) * kPanel;
    const int last = span.end_row ? span.end_row : rows.count;
    const bool fits = first + width <= outputs;  // the last panel may be wider than y
    span.y = fits ? y + first : working(static_cast<size_t>(rows.count * width));
    span.stride = static_cast<size_t>(fits ? outputs : width);
    multiply_all(k, m, rows, &span, 1);
    for (int row = span.first_row; row < last && !fits; ++row)
        std::memcpy(y + row * outputs + first, span.y + row * width, (outputs - first) * sizeof(float));
}

// A product with few rows, whose parts are computed side by side: in units of a part and a span each.
class FewRows {
public:
    void begin(const Matrix& m, const Rows& rows) {
        m_ = &m, rows_ = &rows, parts_ = parts_of(m, rows), spans_ = spans_of(m.panels, rows, processors() / parts_);
        if (parts_ > 1) partial_.resize(std::max(partial_.size(), parts_ * whole()));
    }

    bool in_parts() const { return parts_ > 1; }
    size_t units() const { return parts_ * spans_; }

    // A unit of one part becomes y, others are left to `sum`.
    void multiply(const Team& team, const Kernels& k, size_t unit, float* y, int64_t outputs) {
        Span span = span_of(m_->panels, unit % spans_, spans_);
        if (!in_parts()) return multiply_span(k, *m_, *rows_, span, y, outputs);
        const int64_t part = static_cast<int64_t>(unit / spans_), next = static_cast<int64_t>(team.last_of_home(unit, units()) / spans_) + 1;
        span.y = partial_.data() + part * whole() + span.begin * kPanel, span.stride = stride();
        Groups groups = groups_of(*m_, part, parts_, false);
        groups.follow = groups_of(*m_, next, parts_, false).begin;
        k.multiply(*m_, *rows_, groups, &span, 1);
    }

    // What all parts have added, when all units are done, to `width` outputs of a row from number `first` on.
    void sum(const Kernels& k, int row, int64_t first, int64_t width, float* y) const {
        k.add_parts(partial_.data() + row * stride() + first, parts_, whole(), width, y);
    }

    void sum_all(const Kernels& k, float* y, int64_t outputs) const {
        for (int row = 0; row < rows_->count && in_parts(); ++row) sum(k, row, 0, outputs, y + row * outputs);
    }

private:
    size_t stride() const { return static_cast<size_t>(m_->panels * kPanel); }
    size_t whole() const { return rows_->count * stride(); }

    const Matrix* m_ = nullptr;
    const Rows* rows_ = nullptr;
    int64_t parts_ = 1;
    size_t spans_ = 1;
    std::vector<float> partial_;  // [parts, rows, panels * 128]
};

// Buffers of a call.
struct Scratch {
    Rows x, z;
    FewRows of_x, of_z;
    std::vector<float> activated;
};

class Pool {
public:
    std::unique_ptr<Scratch> take() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (free_.empty()) return std::make_unique<Scratch>();
        std::unique_ptr<Scratch> scratch = std::move(free_.back());
        free_.pop_back();
        return scratch;
    }
    void give_back(std::unique_ptr<Scratch> scratch) {
        const std::lock_guard<std::mutex> lock(mutex_);
        free_.push_back(std::move(scratch));
    }

private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<Scratch>> free_;
};

// A call borrows a set of its own, since others run at the same time; all nodes take from one pool, or each would keep what
// its largest call needed: a prompt of hundreds of tokens needs ten megabytes a layer.
struct Loan {
    ~Loan() { pool().give_back(std::move(scratch)); }
    std::unique_ptr<Scratch> scratch = pool().take();

private:
    static Pool& pool() {
        static Pool* const of_all = new Pool;  // never deleted: threads may still compute when the process ends
        return *of_all;
    }
};

// y [count, outputs] = rows W
void product(const ort::Context* context, const Kernels& k, const Matrix& m, const Rows& rows, float* y, int64_t outputs, FewRows& few) {
    if (are_few(rows)) {
        few.begin(m, rows);
        Team::run(context, few.units(), [&](Team& team) {
            team.each(few.units(), [&](size_t i) { few.multiply(team, k, i, y, outputs); });
        });
        return few.sum_all(k, y, outputs);
    }
    // With many rows of x arithmetic decides, and a task computes all parts of its outputs.
    const size_t spans = spans_of(m.panels, rows, processors()), blocks = blocks_of(rows, m, spans);
    auto task = [&](size_t i) {
        Span span = span_of(m.panels, i / blocks, spans);
        span.first_row = row_of(rows, i % blocks, blocks), span.end_row = row_of(rows, i % blocks + 1, blocks);
        multiply_span(k, m, rows, span, y, outputs);
    };
    in_parallel(context, spans * blocks, task);
}

// z = activation(x W_gate) * (x W_up), where the first half of the panels are gates.
struct Gates {
    const Kernels& k;
    const Matrix& m;
    const Rows& rows;
    Activation activation;
    float* z;  // [count, half of the panels * 128]

    int64_t half() const { return m.panels / 2; }

    // Panels from `begin` to `end`; fill(gate, up, width) computes x W of them.
    template <class Fill>
    void compute(int64_t begin, int64_t end, Fill fill) const {
        const int64_t width = (end - begin) * kPanel, size = rows.count * width;
        float *gate = working(static_cast<size_t>(2 * size)), *up = gate + size;
        fill(gate, up, width);
        for (int row = 0; row < rows.count; ++row)
            k.gate(activation, gate + row * width, up + row * width, z + (row * half() + begin) * kPanel, width);
    }

    // With all parts of the inputs, one after the other.
    void multiply(const Span& span) const {
        const int64_t begin = span.begin, end = span.end;
        compute(begin, end, [&](float* gate, float* up, size_t width) {
            const Span both[] = {{begin, end, gate, width}, {half() + begin, half() + end, up, width}};
            multiply_all(k, m, rows, both, 2);
        });
    }

    // With what the parts have added.
    void sum(const FewRows& x, int64_t begin, int64_t end) const {
        compute(begin, end, [&](float* gate, float* up, int64_t width) {
            for (int row = 0; row < rows.count; ++row) {
                x.sum(k, row, begin * kPanel, width, gate + row * width);
                x.sum(k, row, (half() + begin) * kPanel, width, up + row * width);
            }
        });
    }
};

// An FFN with few rows. A thread that has computed some of z makes it ready for the product with `down`, too: it lies in its cache.
struct FewRowsOfFFN {
    const Gates& gates;
    FewRows& of_x;
    const Source& from_z;
    const Matrix& down;
    Rows& z;
    FewRows& of_z;
    float* y;
    int64_t columns;

    void run(const ort::Context* context, int64_t x_bytes) const {
        begin(z, gates.rows.count, down, x_bytes);
        of_x.begin(gates.m, gates.rows), of_z.begin(down, z);
        Team::run(context, std::max(of_x.units(), of_z.units()), [&](Team& team) { take_part(team); });
        of_z.sum_all(gates.k, y, columns);
    }

    void take_part(Team& team) const {
        const Kernels& k = gates.k;
        const size_t spans = spans_of(gates.half(), gates.rows, processors());
        if (of_x.in_parts()) {
            team.each(of_x.units(), [&](size_t i) { of_x.multiply(team, k, i, nullptr, 0); });
        } else {
            team.each(spans, [&](size_t i) { gates.multiply(span_of(gates.half(), i, spans)); });
        }
        each_stretch(team, [&](int64_t begin, int64_t end) {
            if (of_x.in_parts()) gates.sum(of_x, begin, end);
            for (int row = 0; row < z.count; ++row) keep(k, from_z, down, z, row, begin * kPanel, end * kPanel);
        });
        team.once([&] { list(from_z, down, z); });
        each_stretch(team, [&](int64_t begin, int64_t end) {
            const int64_t first = begin * kPanel / down.group, last = std::min(z.groups, end * kPanel / down.group);
            for (int row = 0; row < z.count; ++row) k.quantise(gates.z + row * from_z.stride, down, z, row, first, last);
        });
        team.each(of_z.units(), [&](size_t i) { of_z.multiply(team, k, i, y, columns); });
    }

    // Calls function(first, last panel of z), the same thread for the same panels where it can.
    template <class Function>
    void each_stretch(Team& team, Function function) const {
        team.each(static_cast<size_t>((gates.half() + kGatePanels - 1) / kGatePanels), [&](size_t i) {
            const int64_t begin = static_cast<int64_t>(i) * kGatePanels;
            function(begin, std::min(gates.half(), begin + kGatePanels));
        });
    }
};

// ---------------------------------------------------------------- ops

int64_t panels_of(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

struct PackedMatMul {
    static constexpr const char* kName = "PackedMatMul";
    static constexpr const char* kProvider = nullptr;
    static constexpr size_t kRequired = 6;
    static constexpr ort::ElementType kOutputs[] = {ort::kFloat};
    static constexpr ort::ElementType kTypes[] = {ort::kFloat, ort::kAny,   ort::kFloat16,
                                                  ort::kUint8, ort::kFloat, ort::kFloat};
    int64_t bits, group, outputs, x_bytes;
    Weight weight;
    Selecting selecting;

    explicit PackedMatMul(const ort::Info* info)
        : bits(integer(info, kName, "bits")),
          group(integer(info, kName, "group")),
          outputs(integer(info, kName, "N")),
          x_bytes(x_bytes_of(info, kName)),
          weight(info, kName, 1, bits, group, panels_of(outputs)),
          selecting(info, kName, 4, 5) {
        if (outputs < 1) fail(kName, "N is " + std::to_string(outputs));
    }

    void compute(ort::Context* context) {
        const Tensor x = input(context, 0);
        const Shape shape = shape_of_x(x, kName);
        const Matrix m = weight.of(context, shape.columns);
        const Selection kept = selecting.of(context, shape.columns, shape.requests, shape.rows_of_a_request);
        std::vector<int64_t> of_y = x.shape;
        of_y.back() = outputs;
        float* y = output(context, of_y);
        const Loan loan;
        const Kernels& k = kernels();
        for (int64_t row = 0, most = at_once(shape.rows()); row < shape.rows(); row += most) {
            const int count = static_cast<int>(std::min(most, shape.rows() - row));
            const float* from = static_cast<const float*>(x.data) + row * shape.columns;
            prepare(context, k, loan.scratch->x, {from, static_cast<size_t>(shape.columns), row, kept}, count, m, x_bytes);
            product(context, k, m, loan.scratch->x, y + row * outputs, outputs, loan.scratch->of_x);
        }
    }
};

Activation activation_of(const char* op, const std::string& name) {
    for (const NamedActivation& known : kActivations)
        if (name == known.name) return known.activation;
    fail(op, "the activation '" + name + "' is not known");
}

struct PackedFFN {
    static constexpr const char* kName = "PackedFFN";
    static constexpr const char* kProvider = nullptr;
    static constexpr size_t kRequired = 11;
    static constexpr ort::ElementType kOutputs[] = {ort::kFloat};
    static constexpr ort::ElementType kTypes[] = {ort::kFloat, ort::kAny,   ort::kFloat16, ort::kUint8, ort::kAny,  ort::kFloat16,
                                                  ort::kUint8, ort::kFloat, ort::kFloat,   ort::kFloat, ort::kFloat};
    int64_t bits_in, group_in, bits_out, group_out, columns, neurons, x_bytes;
    Activation activation;
    Weight weight_in, weight_out;
    Selecting of_x, of_z;

    explicit PackedFFN(const ort::Info* info)
        : bits_in(integer(info, kName, "bits_in")),
          group_in(integer(info, kName, "group_in")),
          bits_out(integer(info, kName, "bits_out")),
          group_out(integer(info, kName, "group_out")),
          columns(integer(info, kName, "D")),
          neurons(integer(info, kName, "F")),
          x_bytes(x_bytes_of(info, kName)),
          activation(activation_of(kName, text(info, kName, "activation"))),
          weight_in(info, kName, 1, bits_in, group_in, 2 * panels_of(neurons)),
          weight_out(info, kName, 4, bits_out, group_out, panels_of(columns)),
          of_x(info, kName, 7, 9),
          of_z(info, kName, 8, 10) {
        if (columns < 1 || neurons < 1) fail(kName, "D is " + std::to_string(columns) + ", F is " + std::to_string(neurons));
    }

    void compute(ort::Context* context) {
        const Tensor x = input(context, 0);
        const Shape shape = shape_of_x(x, kName);
        if (shape.columns != columns)
            fail(kName, "x is " + text_of(x.shape) + ", its last dimension should be D = " + std::to_string(columns));
        const int64_t panels = panels_of(neurons), stride = panels * kPanel;
        const Matrix gate_up = weight_in.of(context, columns), down = weight_out.of(context, neurons);
        const Selection x_kept = of_x.of(context, columns, shape.requests, shape.rows_of_a_request);
        const Selection z_kept = of_z.of(context, neurons, shape.requests, shape.rows_of_a_request);
        float* y = output(context, x.shape);
        const Loan loan;
        Scratch& scratch = *loan.scratch;
        const Kernels& k = kernels();
        for (int64_t row = 0, most = at_once(shape.rows()); row < shape.rows(); row += most) {
            const int count = static_cast<int>(std::min(most, shape.rows() - row));
            scratch.activated.resize(static_cast<size_t>(count * stride));
            const float* from = static_cast<const float*>(x.data) + row * columns;
            float *z = scratch.activated.data(), *to = y + row * columns;
            const Source from_z{z, static_cast<size_t>(stride), row, z_kept};
            prepare(context, k, scratch.x, {from, static_cast<size_t>(columns), row, x_kept}, count, gate_up, x_bytes);
            const Gates gates{k, gate_up, scratch.x, activation, z};
            if (are_few(scratch.x) && !in_tiles(k, down, x_bytes, z_kept)) {
                FewRowsOfFFN{gates, scratch.of_x, from_z, down, scratch.z, scratch.of_z, to, columns}.run(context, x_bytes);
                continue;
            }
            const size_t spans = spans_of(panels, scratch.x, processors());
            auto task = [&](size_t i) { gates.multiply(span_of(panels, i, spans)); };
            in_parallel(context, spans, task);
            prepare(context, k, scratch.z, from_z, count, down, x_bytes);
            product(context, k, down, scratch.z, to, columns, scratch.of_z);
        }
    }
};

}  // namespace
}  // namespace cm::cpu

// ---------------------------------------------------------------- exports

CM_EXPORT ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
    using namespace cm;
    using namespace cm::cpu;
    return register_ops(options, base, kDomain, "the CPU ops",
                        {described<PackedMatMul>(), described<PackedFFN>(), cached_attention(), cached_attention_in_halves(),
                         cached_attention_in_bytes(), prompt_attention(), residual_norm(), refine_logits()});
}

// Bytes of weights that products read, and that they would have read with every k listed; since the last reset.
CM_EXPORT void cm_native_counts(uint64_t out[2]) {
    out[0] = cm::cpu::bytes_read, out[1] = cm::cpu::bytes_dense;
}

CM_EXPORT void cm_native_reset() { cm::cpu::bytes_read = cm::cpu::bytes_dense = 0; }

// Rows of a cache, `count` of them, from numbers to halves (`bytes` 0) or bytes (kernels.h) and back.
CM_EXPORT void cm_native_round(int bytes, const float* x, int64_t count, int64_t width, uint8_t* rows) {
    const cm::cpu::Cells cells = bytes ? cm::cpu::Cells::kByte : cm::cpu::Cells::kHalf;
    const size_t size = cm::cpu::bytes_of_row(cells, width);
    for (int64_t i = 0; i < count; ++i) cm::cpu::kernels().round(cells, x + i * width, static_cast<int>(width), rows + i * size);
}

CM_EXPORT void cm_native_widen(int bytes, const uint8_t* rows, int64_t count, int64_t width, float* x) {
    const cm::cpu::Cells cells = bytes ? cm::cpu::Cells::kByte : cm::cpu::Cells::kHalf;
    const size_t size = cm::cpu::bytes_of_row(cells, width);
    for (int64_t i = 0; i < count; ++i) cm::cpu::kernels().widen_row(cells, rows + i * size, static_cast<int>(width), x + i * width);
}

// JSON: which instructions are used, which could be.
CM_EXPORT const char* cm_native_info() {
    static thread_local std::string text;
    text = std::string("{\"version\": ") + cm::cpu::kVersion + ", \"instructions\": \"" + cm::cpu::kernels().name +
           "\", \"usable\": [";
    const char* comma = "";
    for (const cm::cpu::Kernels* const* k = cm::cpu::all_kernels(); *k; ++k)
        if ((*k)->usable()) text += std::string(comma) + "\"" + (*k)->name + "\"", comma = ", ";
    return (text += "]}").c_str();
}

// For tests: use the kernels of this name, or the best with ""; 1 if this processor has them.
CM_EXPORT int cm_native_use(const char* name) {
    using namespace cm::cpu;
    if (*name == 0) return in_use = best(), 1;
    for (const Kernels* const* k = all_kernels(); *k; ++k)
        if (std::strcmp((*k)->name, name) == 0 && (*k)->usable()) return in_use = *k, 1;
    return 0;
}
