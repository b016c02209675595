// The part of ONNX Runtime's C interface that the ops use, written out because no package carries the header.
//
// OrtApiBase hands out a table of function pointers. The table only ever grows at its end, so a function stays in its
// slot; the numbers below are those of version 20 (ONNX Runtime 1.20) and every later one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kApiVersion = 20;

struct Status;          // null: all is well
struct Info;            // of a node, while its kernel is made
struct Context;         // of one call
struct Value;           // a tensor
struct ShapeInfo;
struct Domain;
struct SessionOptions;
struct CustomOp;

struct ApiBase {
    const void* (*GetApi)(uint32_t version);  // null if the runtime is older than that
    const char* (*GetVersionString)();
};

enum ElementType : int { kAny = 0, kFloat = 1, kUint8 = 2, kInt32 = 6, kInt64 = 7, kBool = 9, kFloat16 = 10 };
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kInvalidGraph = 10 };

// What ONNX Runtime calls; as of version 17, without the callbacks that came later.
struct CustomOp {
    uint32_t version;
    void* (*CreateKernel)(const CustomOp*, const void* api, const Info*);  // not called: CreateKernelV2 is there
    const char* (*GetName)(const CustomOp*);
    const char* (*GetExecutionProviderType)(const CustomOp*);  // null: the CPU
    ElementType (*GetInputType)(const CustomOp*, size_t);
    size_t (*GetInputTypeCount)(const CustomOp*);
    ElementType (*GetOutputType)(const CustomOp*, size_t);
    size_t (*GetOutputTypeCount)(const CustomOp*);
    void (*KernelCompute)(void* kernel, Context*);  // not called: KernelComputeV2 is there
    void (*KernelDestroy)(void* kernel);
    int (*GetInputCharacteristic)(const CustomOp*, size_t);  // 0: required, 1: optional
    int (*GetOutputCharacteristic)(const CustomOp*, size_t);
    int (*GetInputMemoryType)(const CustomOp*, size_t);  // 0: where the op runs
    int (*GetVariadicInputMinArity)(const CustomOp*);
    int (*GetVariadicInputHomogeneity)(const CustomOp*);
    int (*GetVariadicOutputMinArity)(const CustomOp*);
    int (*GetVariadicOutputHomogeneity)(const CustomOp*);
    Status* (*CreateKernelV2)(const CustomOp*, const void* api, const Info*, void** kernel);
    Status* (*KernelComputeV2)(void* kernel, Context*);
    Status* (*InferOutputShape)(const CustomOp*, void*);  // null: shapes are known when the op runs
    int (*GetStartVersion)(const CustomOp*);
    int (*GetEndVersion)(const CustomOp*);
};

// The table of functions, by slot. `table` is set once, when the library is registered.
struct Api {
    static inline void* const* table = nullptr;

    template <class Function>
    static Function at(int slot) {
        return reinterpret_cast<Function>(table[slot]);
    }
    static Status* create_status(ErrorCode code, const char* message) {
        return at<Status* (*)(int, const char*)>(0)(code, message);
    }
    static Status* create_domain(const char* name, Domain** out) {
        return at<Status* (*)(const char*, Domain**)>(26)(name, out);
    }
    static Status* add_op(Domain* domain, const CustomOp* op) {
        return at<Status* (*)(Domain*, const CustomOp*)>(27)(domain, op);
    }
    static Status* add_domain(SessionOptions* options, Domain* domain) {
        return at<Status* (*)(SessionOptions*, Domain*)>(28)(options, domain);
    }
    static Status* tensor_data(Value* value, void** out) { return at<Status* (*)(Value*, void**)>(51)(value, out); }
    static Status* element_type(const ShapeInfo* info, int* out) {
        return at<Status* (*)(const ShapeInfo*, int*)>(60)(info, out);
    }
    static Status* rank(const ShapeInfo* info, size_t* out) {
        return at<Status* (*)(const ShapeInfo*, size_t*)>(61)(info, out);
    }
    static Status* dimensions(const ShapeInfo* info, int64_t* out, size_t count) {
        return at<Status* (*)(const ShapeInfo*, int64_t*, size_t)>(62)(info, out, count);
    }
    static Status* shape_info(const Value* value, ShapeInfo** out) {
        return at<Status* (*)(const Value*, ShapeInfo**)>(65)(value, out);
    }
    static Status* float_attribute(const Info* info, const char* name, float* out) {
        return at<Status* (*)(const Info*, const char*, float*)>(85)(info, name, out);
    }
    static Status* int_attribute(const Info* info, const char* name, int64_t* out) {
        return at<Status* (*)(const Info*, const char*, int64_t*)>(86)(info, name, out);
    }
    static Status* string_attribute(const Info* info, const char* name, char* out, size_t* size) {
        return at<Status* (*)(const Info*, const char*, char*, size_t*)>(87)(info, name, out, size);
    }
    static Status* input(const Context* context, size_t index, Value** out) {
        return at<Status* (*)(const Context*, size_t, Value**)>(90)(context, index, out);
    }
    static Status* output(Context* context, size_t index, const int64_t* shape, size_t rank, Value** out) {
        return at<Status* (*)(Context*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, shape, rank, out);
    }
    static void release_status(Status* status) { at<void (*)(Status*)>(93)(status); }
    static void release_shape_info(ShapeInfo* info) { at<void (*)(ShapeInfo*)>(99)(info); }
    // The cudaStream_t on which the CUDA provider works; null from the CPU's.
    static Status* gpu_stream(const Context* context, void** out) {
        return at<Status* (*)(const Context*, void**)>(193)(context, out);
    }
    // While a kernel is made: an input that is a constant of the graph, which stays where it is; null for any other.
    static Status* constant_input(const Info* info, size_t index, int* is_constant, Value** out) {
        return at<Status* (*)(const Info*, size_t, int*, Value**)>(249)(info, index, is_constant, out);
    }
    // Calls task(data, 0 .. total - 1) on the threads of the session.
    static Status* parallel_for(const Context* context, void (*task)(void*, size_t), size_t total, void* data) {
        return at<Status* (*)(const Context*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(context, task, total, 0,
                                                                                                 data);
    }
};

}  // namespace ort
