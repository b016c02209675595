// What an op of ours needs of ONNX Runtime: its inputs, outputs and attributes, errors that name the op, and, of the CPU ops,
// threads. The kernels for a GPU are described with it, too (../ort/ops.cpp).
#pragma once

#include <algorithm>
#include <exception>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#endif

#include "ort.h"

namespace cm {

// ---------------------------------------------------------------- errors and inputs

struct Error {
    std::string what;
};

inline void check(ort::Status* status) {
    // Only calls that cannot fail on the arguments given here come through this; the runtime's own message would be lost.
    if (status == nullptr) return;
    ort::Api::release_status(status);
    throw Error{"ONNX Runtime refused a call of its C interface"};
}

[[noreturn]] inline void fail(const std::string& op, const std::string& what) { throw Error{op + ": " + what}; }

inline std::string text_of(const std::vector<int64_t>& shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? "," : "") + std::to_string(shape[i]);
    return text + "]";
}

struct Tensor {
    void* data = nullptr;
    int type = 0;
    std::vector<int64_t> shape;

    int64_t count() const {
        int64_t product = 1;
        for (int64_t size : shape) product *= size;
        return product;
    }
};

inline Tensor read_shape_and_data(ort::Value* value) {
    Tensor tensor;
    ort::ShapeInfo* info = nullptr;
    check(ort::Api::shape_info(value, &info));
    const std::unique_ptr<ort::ShapeInfo, void (*)(ort::ShapeInfo*)> owner(info, ort::Api::release_shape_info);
    size_t rank = 0;
    check(ort::Api::element_type(info, &tensor.type));
    check(ort::Api::rank(info, &rank));
    tensor.shape.resize(rank);
    check(ort::Api::dimensions(info, tensor.shape.data(), rank));
    check(ort::Api::tensor_data(value, &tensor.data));
    return tensor;
}

// An optional input that a node does not have: no data, no shape.
inline Tensor input(const ort::Context* context, size_t index) {
    ort::Value* value = nullptr;
    check(ort::Api::input(context, index, &value));
    return value == nullptr ? Tensor{} : read_shape_and_data(value);
}

// The same, while the kernel is made: false for an input that may be another one in each call.
inline bool constant(const ort::Info* info, size_t index, Tensor& tensor) {
    int is_constant = 0;
    ort::Value* value = nullptr;
    check(ort::Api::constant_input(info, index, &is_constant, &value));
    if (!is_constant || value == nullptr) return false;
    return tensor = read_shape_and_data(value), true;
}

// An input that is looked at once where it is a constant: to ask for its shape at each step takes a third of a microsecond.
class MaybeConstant {
public:
    MaybeConstant(const ort::Info* info, size_t index) : index_(index), is_known_(constant(info, index, known_)) {}

    // `read` holds it where it is none.
    const Tensor& of(const ort::Context* context, Tensor& read) const { return is_known_ ? known_ : read = input(context, index_); }

private:
    size_t index_;
    Tensor known_;
    bool is_known_;
};

template <class T = float>
T* output(ort::Context* context, const std::vector<int64_t>& shape, size_t index = 0) {
    ort::Value* value = nullptr;
    void* data = nullptr;
    check(ort::Api::output(context, index, shape.data(), shape.size(), &value));
    check(ort::Api::tensor_data(value, &data));
    return static_cast<T*>(data);
}

// Of an attribute: without it the node is refused.
inline void need(ort::Status* status, const char* op, const char* name, const char* kind) {
    if (status == nullptr) return;
    ort::Api::release_status(status);
    fail(op, std::string("the attribute ") + name + " (" + kind + ") is missing");
}

inline int64_t integer(const ort::Info* info, const char* op, const char* name) {
    int64_t value = 0;
    need(ort::Api::int_attribute(info, name, &value), op, name, "an integer");
    return value;
}

inline float number(const ort::Info* info, const char* op, const char* name) {
    float value = 0;
    need(ort::Api::float_attribute(info, name, &value), op, name, "a float");
    return value;
}

inline std::string text(const ort::Info* info, const char* op, const char* name) {
    char value[64] = {};
    size_t size = sizeof value;
    need(ort::Api::string_attribute(info, name, value, &size), op, name, "a short string");
    return value;
}

// ---------------------------------------------------------------- the description of an op

// No exception may leave the library: each becomes a status that ONNX Runtime reports.
template <class Function>
ort::Status* as_status(Function function) {
    try {
        function();
        return nullptr;
    } catch (const Error& error) {
        return ort::Api::create_status(ort::kInvalidArgument, error.what.c_str());
    } catch (const std::exception& error) {  // no memory
        return ort::Api::create_status(ort::kFail, error.what());
    }
}

// What ONNX Runtime is told of an op: a class with kName, kProvider (null: the CPU's), kTypes of its inputs, how many of them are
// kRequired, kOutputs (types). Ops of one name with other types are one op: ONNX Runtime takes the one that fits.
template <class Op>
const ort::CustomOp* described() {
    static const ort::CustomOp op = [] {
        ort::CustomOp o{};
        o.version = 17;
        o.CreateKernel = [](const ort::CustomOp*, const void*, const ort::Info*) -> void* { return nullptr; };
        o.GetName = [](const ort::CustomOp*) { return Op::kName; };
        o.GetExecutionProviderType = [](const ort::CustomOp*) { return Op::kProvider; };
        o.GetInputType = [](const ort::CustomOp*, size_t i) { return Op::kTypes[i]; };
        o.GetInputTypeCount = [](const ort::CustomOp*) { return std::size(Op::kTypes); };
        o.GetOutputType = [](const ort::CustomOp*, size_t i) { return Op::kOutputs[i]; };
        o.GetOutputTypeCount = [](const ort::CustomOp*) { return std::size(Op::kOutputs); };
        o.KernelCompute = [](void*, ort::Context*) {};
        o.KernelDestroy = [](void* kernel) { delete static_cast<Op*>(kernel); };
        o.GetInputCharacteristic = [](const ort::CustomOp*, size_t i) { return i < Op::kRequired ? 0 : 1; };
        o.GetOutputCharacteristic = o.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return 0; };
        o.GetVariadicInputMinArity = o.GetVariadicOutputMinArity = o.GetStartVersion = [](const ort::CustomOp*) { return 1; };
        o.GetVariadicInputHomogeneity = o.GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 1; };
        o.CreateKernelV2 = [](const ort::CustomOp*, const void*, const ort::Info* info, void** kernel) {
            return as_status([&] { *kernel = new Op(info); });
        };
        o.KernelComputeV2 = [](void* kernel, ort::Context* context) {
            return as_status([&] { static_cast<Op*>(kernel)->compute(context); });
        };
        o.GetEndVersion = [](const ort::CustomOp*) { return 0x7fffffff; };
        return o;
    }();
    return &op;
}

// What RegisterCustomOps of a library does. `what`: its ops, for the error.
inline ort::Status* register_ops(ort::SessionOptions* options, const ort::ApiBase* base, const char* domain_name,
                                 const char* what, std::initializer_list<const ort::CustomOp*> ops) {
    const void* table = base->GetApi(ort::kApiVersion);
    if (table == nullptr) {
        // Slot 0, CreateStatus, is the same in every version since the first.
        ort::Api::table = static_cast<void* const*>(base->GetApi(1));
        const std::string text = std::string(what) + " of cm_export need ONNX Runtime 1.20 or newer, this one is " +
                                 base->GetVersionString();
        return ort::Api::create_status(ort::kFail, text.c_str());
    }
    ort::Api::table = static_cast<void* const*>(table);
    ort::Domain* domain = nullptr;  // lives as long as the process: sessions keep pointing to it
    if (ort::Status* status = ort::Api::create_domain(domain_name, &domain)) return status;
    for (const ort::CustomOp* op : ops)
        if (ort::Status* status = ort::Api::add_op(domain, op)) return status;
    return ort::Api::add_domain(options, domain);
}

}  // namespace cm

namespace cm::cpu {

struct Kernels;

const Kernels& kernels();                 // those in use
void count_read(uint64_t read, uint64_t dense);  // of weights
const ort::CustomOp* cached_attention();  // attention.cpp
const ort::CustomOp* cached_attention_in_halves();
const ort::CustomOp* cached_attention_in_bytes();
const ort::CustomOp* prompt_attention();  // prompt.cpp
const ort::CustomOp* residual_norm();     // norm.cpp
const ort::CustomOp* refine_logits();     // refine.cpp

// ---------------------------------------------------------------- threads of the CPU ops

// Processors that this process may use. ONNX Runtime does not tell how many threads a session has.
inline int processors() {
    static const int count = [] {
#if defined(__linux__)
        cpu_set_t set;
        if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
        return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    }();
    return count;
}

// Numbers for a task to work in, which its thread keeps for the next one.
inline float* working(size_t count) {
    static thread_local std::vector<float> buffer;
    if (buffer.size() < count) buffer.resize(count);
    return buffer.data();
}

// Calls function(0 .. total - 1) on the session's threads.
template <class Function>
void in_parallel(const ort::Context* context, size_t total, Function& function) {
    if (total == 1) return function(0);
    const auto call = [](void* data, size_t i) { (*static_cast<Function*>(data))(i); };
    check(ort::Api::parallel_for(context, call, total, &function));
}

}  // namespace cm::cpu
