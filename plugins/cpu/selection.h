// What several rows of x are, and which of their numbers count.
#pragma once

#include "op.h"

namespace cm::cpu {

struct Shape {
    int64_t requests, rows_of_a_request, columns;
    int64_t rows() const { return requests * rows_of_a_request; }
};

inline Shape shape_of_x(const Tensor& x, const char* op) {
    if (x.shape.size() == 2) return {1, x.shape[0], x.shape[1]};
    if (x.shape.size() != 3) fail(op, "x is " + text_of(x.shape) + ", expected [B,S,K] or [S,K]");
    return {x.shape[0], x.shape[1], x.shape[2]};
}

// Which k count: a norm for each k (none: all), a threshold for each request.
struct Selection {
    const float* norm = nullptr;
    const float* threshold = nullptr;
    int64_t rows_of_a_request = 1;

    float of(int64_t row) const { return threshold == nullptr ? 0.0f : threshold[row / rows_of_a_request]; }
};

// The norms of a node and its thresholds. Norms that are a constant are looked at once, too.
class Selecting {
public:
    Selecting(const ort::Info* info, const char* op, size_t norm_index, size_t threshold_index)
        : op_(op), norm_index_(norm_index), threshold_index_(threshold_index), norm_(info, norm_index) {}

    Selection of(const ort::Context* context, int64_t inputs, int64_t requests, int64_t rows_of_a_request) const {
        Selection s;
        s.rows_of_a_request = rows_of_a_request;
        Tensor read;
        const Tensor& norm = norm_.of(context, read);
        if (norm.count() == 0) return s;
        const Tensor threshold = input(context, threshold_index_);
        if (norm.count() != inputs)
            fail(op_, "input " + std::to_string(norm_index_) + " (norm) is " + text_of(norm.shape) + ", expected " +
                          text_of({inputs}) + " or [0]");
        if (threshold.count() != requests)
            fail(op_, "input " + std::to_string(threshold_index_) + " (threshold) is " + text_of(threshold.shape) + " for " +
                          std::to_string(requests) + " requests");
        s.norm = static_cast<const float*>(norm.data), s.threshold = static_cast<const float*>(threshold.data);
        return s;
    }

private:
    const char* op_;
    size_t norm_index_, threshold_index_;
    MaybeConstant norm_;
};

}  // namespace cm::cpu
