// Logits of a head that is stored twice in 4 bits: as rows of its inputs, which all outputs are computed with, and what these leave
// out (the remainder) as rows of its outputs. Only outputs that may be chosen are computed to the end, so a step reads half of a head.
//
//     RefineLogits(logits [B,S,N], x [B,S,K], remainder [N,w][, norm [K], threshold [B,1]]) -> y [B,S,N]
//
//     y = logits + x remainder    where logits >= the largest of their row - margin; elsewhere y = logits
//
//     margin       16 times what a remainder adds, root mean square over 32 outputs from all over the row: no output that stays as it
//                  was can have been the largest, and all that stay have little of the probability together (docs/precision.md)
//     remainder    uint8, w = 18 bytes for every 32 inputs, the last filled up (rows.h: remainder)
//     |x| norm < threshold of the request: x counts as 0, as in the product that made the logits
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"
#include "selection.h"

namespace cm::cpu {
namespace {

constexpr float kTimes = 16.0f;
constexpr int64_t kSample = 32;     // outputs whose remainders tell how much they add
constexpr int64_t kStretch = 8192;  // outputs that a thread looks through at a time
constexpr int64_t kBlock = 64;      // of them, whose largest is kept
constexpr size_t kAtOnce = 32;      // outputs that a thread computes to the end at a time
constexpr size_t kAhead = 3;        // of them are asked for before they are read

// Some rows of x with their logits.
class Refined {
public:
    Refined(const ort::Context* context, const Tensor& remainder, const float* logits, int64_t rows, float* y)
        : context_(context),
          remainder_(static_cast<const uint8_t*>(remainder.data)),
          outputs_(remainder.shape[0]),
          width_(static_cast<size_t>(remainder.shape[1])),
          groups_(remainder.shape[1] / kRemainderBytes),
          blocks_of_row_((outputs_ + kBlock - 1) / kBlock),
          logits_(logits),
          y_(y),
          rows_(static_cast<size_t>(rows)) {
        margins_.resize(rows_), blocks_.resize(rows_ * blocks_of_row_);
        x_.resize(rows_ * groups_ * kRemainder), eights_.resize(rows_ * groups_);
        bits_.resize((groups_ * kRemainder + 63) / 64);
    }

    void run(const float* x, int64_t inputs, const Selection& kept) {
        for (size_t row = 0; row < rows_; ++row) take(x + row * inputs, inputs, kept, row);
        copy_and_sample();
        list();
        refine();
    }

private:
    struct Output {
        size_t row, number;
    };

    // x where it counts, filled up, and 8 times the sums of its groups.
    void take(const float* x, int64_t inputs, const Selection& kept, size_t row) {
        float* taken = x_.data() + row * groups_ * kRemainder;
        kernels().keep(x, kept.norm, kept.of(row), inputs, bits_.data());
        for (int64_t k = 0; k < inputs; ++k) taken[k] = bits_[k / 64] >> (k % 64) & 1 ? x[k] : 0.0f;
        for (int64_t g = 0; g < groups_; ++g) {
            float sum = 0.0f;
            for (int i = 0; i < kRemainder; ++i) sum += taken[g * kRemainder + i];
            eights_[row * groups_ + g] = 8.0f * sum;
        }
    }

    // y = logits, the largest of each block, and the margin of each row.
    void copy_and_sample() {
        const size_t stretches = static_cast<size_t>((outputs_ + kStretch - 1) / kStretch), tasks = stretches + 1;
        auto one = [&](size_t i) {
            const size_t row = i / tasks, first = row * outputs_;
            if (i % tasks == stretches) return void(margins_[row] = margin(row));
            const int64_t begin = i % tasks * kStretch, end = std::min(begin + kStretch, outputs_);
            for (int64_t at = begin; at < end; at += kBlock)
                blocks_[row * blocks_of_row_ + at / kBlock] = largest(logits_ + first + at, std::min(kBlock, end - at));
            std::memcpy(y_ + first + begin, logits_ + first + begin, (end - begin) * sizeof(float));
        };
        in_parallel(context_, rows_ * tasks, one);
    }

    float margin(size_t row) const {
        const int64_t count = std::min(kSample, outputs_);
        float squares = 0.0f;
        for (int64_t i = 0; i < count; ++i) ask_for(outputs_ * i / count);
        for (int64_t i = 0; i < count; ++i) {
            const float change = left_out(row, outputs_ * i / count);
            squares += change * change;
        }
        return kTimes * std::sqrt(squares / static_cast<float>(count));
    }

    float left_out(size_t row, size_t output) const {
        const size_t at = row * groups_;
        return kernels().remainder(remainder_ + output * width_, x_.data() + at * kRemainder, eights_.data() + at, groups_);
    }

    static float largest(const float* values, int64_t count) {
        float most[kStep], all = -std::numeric_limits<float>::infinity();
        std::fill(most, most + kStep, all);
        int64_t n = 0;
        for (; n + kStep <= count; n += kStep)
            for (int j = 0; j < kStep; ++j) most[j] = values[n + j] > most[j] ? values[n + j] : most[j];
        for (; n < count; ++n) most[0] = std::max(most[0], values[n]);
        for (float value : most) all = std::max(all, value);
        return all;
    }

    // Outputs within the margins; with a margin that is no number, all of them, so that it is seen.
    void list() {
        for (size_t row = 0; row < rows_; ++row) {
            const float *blocks = blocks_.data() + row * blocks_of_row_, *logits = logits_ + row * outputs_;
            const float limit = *std::max_element(blocks, blocks + blocks_of_row_) - margins_[row];
            for (int64_t block = 0; block < blocks_of_row_; ++block) {
                if (blocks[block] < limit) continue;
                for (int64_t n = block * kBlock; n < std::min((block + 1) * kBlock, outputs_); ++n)
                    if (!(logits[n] < limit)) listed_.push_back({row, static_cast<size_t>(n)});
            }
        }
    }

    void refine() {
        auto some = [&](size_t task) {
            const size_t begin = task * kAtOnce, end = std::min(begin + kAtOnce, listed_.size());
            for (size_t i = begin; i < std::min(begin + kAhead, end); ++i) ask_for(listed_[i].number);
            for (size_t i = begin; i < end; ++i) {
                if (i + kAhead < end) ask_for(listed_[i + kAhead].number);
                y_[listed_[i].row * outputs_ + listed_[i].number] += left_out(listed_[i].row, listed_[i].number);
            }
        };
        if (!listed_.empty()) in_parallel(context_, (listed_.size() + kAtOnce - 1) / kAtOnce, some);
        const uint64_t read = (listed_.size() + rows_ * std::min(kSample, outputs_)) * width_;
        count_read(read, read);
    }

    // They lie anywhere: nobody reads ahead but this.
    void ask_for(size_t output) const {
        for (size_t byte = 0; byte < width_; byte += 64) __builtin_prefetch(remainder_ + output * width_ + byte);
    }

    const ort::Context* context_;
    const uint8_t* remainder_;
    int64_t outputs_;
    size_t width_;
    int64_t groups_, blocks_of_row_;
    const float* logits_;
    float* y_;
    size_t rows_;
    std::vector<float> margins_, blocks_, x_, eights_;  // [rows], [rows, blocks], [rows, inputs filled up], [rows, groups]
    std::vector<uint64_t> bits_;  // of the inputs that a row keeps
    std::vector<Output> listed_;
};

struct RefineLogits {
    static constexpr const char* kName = "RefineLogits";
    static constexpr const char* kProvider = nullptr;
    static constexpr size_t kRequired = 5;
    static constexpr ort::ElementType kOutputs[] = {ort::kFloat};
    static constexpr ort::ElementType kTypes[] = {ort::kFloat, ort::kFloat, ort::kUint8, ort::kFloat, ort::kFloat};
    MaybeConstant of_remainder;
    Selecting selecting;

    explicit RefineLogits(const ort::Info* info) : of_remainder(info, 2), selecting(info, kName, 3, 4) {}

    void compute(ort::Context* context) {
        Tensor read;
        const Tensor logits = input(context, 0), x = input(context, 1), &remainder = of_remainder.of(context, read);
        const Shape shape = shape_of_x(x, kName);
        const int64_t width = (shape.columns + kRemainder - 1) / kRemainder * kRemainderBytes;
        if (remainder.shape.size() != 2 || remainder.shape[0] < 1 || remainder.shape[1] != width)
            fail(kName, "the remainder is " + text_of(remainder.shape) + " for x " + text_of(x.shape));
        std::vector<int64_t> expected = x.shape;
        expected.back() = remainder.shape[0];
        if (logits.shape != expected) fail(kName, "the logits are " + text_of(logits.shape) + ", expected " + text_of(expected));
        const Selection kept = selecting.of(context, shape.columns, shape.requests, shape.rows_of_a_request);
        float* y = output(context, expected);
        Refined refined(context, remainder, static_cast<const float*>(logits.data), shape.rows(), y);
        refined.run(static_cast<const float*>(x.data), shape.columns, kept);
    }
};

}  // namespace

const ort::CustomOp* refine_logits() { return described<RefineLogits>(); }

}  // namespace cm::cpu
