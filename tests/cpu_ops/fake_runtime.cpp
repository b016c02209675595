// Runs the CPU ops without ONNX Runtime, for sanitizers and other processors: the slots of its table that the ops use.
//
//     fake_runtime CALLS ANSWERS THREADS AT_ONCE [INSTRUCTIONS]
//
// CALLS holds calls as test_cpu_native.py writes them. Each runs AT_ONCE times at the same time on one kernel, as sessions
// shared by several threads do; the answers must be the same to the byte. Every tensor is a heap block of exactly its size.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#endif

#include "ort.h"

extern "C" ort::Status* RegisterCustomOps(ort::SessionOptions*, const ort::ApiBase*);
extern "C" int cm_native_use(const char*);

static int threads = 1;

struct ort::Status {
    std::string text;
};
struct ort::ShapeInfo {
    int type;
    std::vector<int64_t> shape;
};
struct ort::Value {
    ShapeInfo info;
    std::unique_ptr<char[]> data;
    size_t bytes = 0;

    void allocate() {
        bytes = info.type == kAny ? 0 : info.type == kUint8 || info.type == kBool ? 1 : info.type == kFloat16 ? 2 : info.type == kInt64 ? 8 : 4;
        for (int64_t size : info.shape) bytes *= size;
        data.reset(new char[bytes]);
    }
};
struct ort::Info {
    std::map<std::string, std::string> attributes;
    std::vector<Value>* inputs = nullptr;
};
struct ort::Context {
    std::vector<Value>* inputs;
    Value outputs[3];
    int types[3];
};
struct ort::Domain {
    std::vector<const CustomOp*> ops;
};
struct ort::SessionOptions {
    Domain* domain;
};

using namespace ort;

static void* table[300];

template <class Function>
static void put(int slot, Function* function) {
    table[slot] = reinterpret_cast<void*>(function);
}

static void fill_table() {
    put(0, +[](int, const char* text) { return new Status{text}; });
    put(26, +[](const char*, Domain** out) -> Status* { return *out = new Domain, nullptr; });
    put(27, +[](Domain* domain, const CustomOp* op) -> Status* { return domain->ops.push_back(op), nullptr; });
    put(28, +[](SessionOptions* options, Domain* domain) -> Status* { return options->domain = domain, nullptr; });
    put(51, +[](Value* value, void** out) -> Status* { return *out = value->data.get(), nullptr; });
    put(60, +[](const ShapeInfo* info, int* out) -> Status* { return *out = info->type, nullptr; });
    put(61, +[](const ShapeInfo* info, size_t* out) -> Status* { return *out = info->shape.size(), nullptr; });
    put(62, +[](const ShapeInfo* info, int64_t* out, size_t count) -> Status* {
        std::memcpy(out, info->shape.data(), count * sizeof *out);
        return nullptr;
    });
    put(65, +[](const Value* value, ShapeInfo** out) -> Status* { return *out = new ShapeInfo(value->info), nullptr; });
    put(85, +[](const Info* info, const char* name, float* out) -> Status* {
        if (!info->attributes.count(name)) return new Status{"no such attribute"};
        return *out = std::strtof(info->attributes.at(name).c_str(), nullptr), nullptr;
    });
    put(86, +[](const Info* info, const char* name, int64_t* out) -> Status* {
        if (!info->attributes.count(name)) return new Status{"no such attribute"};
        return *out = std::atoll(info->attributes.at(name).c_str()), nullptr;
    });
    put(87, +[](const Info* info, const char* name, char* out, size_t* size) -> Status* {
        if (!info->attributes.count(name)) return new Status{"no such attribute"};
        const std::string& text = info->attributes.at(name);
        if (*size < text.size() + 1) return new Status{"too short"};
        return std::memcpy(out, text.c_str(), *size = text.size() + 1), nullptr;
    });
    put(90, +[](const Context* context, size_t i, Value** out) -> Status* {
        if (i >= context->inputs->size()) return *out = nullptr, nullptr;  // as ONNX Runtime has it
        Value& value = (*context->inputs)[i];
        return *out = value.info.type == kAny ? nullptr : &value, nullptr;  // one that a node leaves out
    });
    put(91, +[](Context* context, size_t i, const int64_t* shape, size_t rank, Value** out) -> Status* {
        context->outputs[i].info = {context->types[i], {shape, shape + rank}};
        context->outputs[i].allocate();
        return *out = &context->outputs[i], nullptr;
    });
    put(93, +[](Status* status) { delete status; });
    put(99, +[](ShapeInfo* info) { delete info; });
    put(249, +[](const Info* info, size_t i, int* is_constant, Value** out) -> Status* {  // all that a kernel asks about are
        *out = i < info->inputs->size() ? &(*info->inputs)[i] : nullptr;
        return *is_constant = *out != nullptr && (*out)->info.type != kAny, nullptr;
    });
    put(274, +[](const Context*, void (*task)(void*, size_t), size_t total, size_t, void* data) -> Status* {
        std::atomic<size_t> next{0};
        std::vector<std::thread> all;
        for (int i = 0; i < threads; ++i)
            all.emplace_back([&] {
                for (size_t n; (n = next++) < total;) task(data, n);
            });
        for (std::thread& one : all) one.join();
        return nullptr;
    });
}

static std::string compute(const CustomOp* op, void* kernel, std::vector<Value>& inputs) {
    Context context{};
    context.inputs = &inputs;
    for (size_t i = 0; i < op->GetOutputTypeCount(op); ++i) context.types[i] = op->GetOutputType(op, i);
    if (Status* status = op->KernelComputeV2(kernel, &context)) {
        const std::string text = "error " + status->text + "\n";
        delete status;
        return text;
    }
    std::string text = "ok", numbers;
    const size_t count = op->GetOutputTypeCount(op);
    for (const Value& one : context.outputs) {  // the shape of one, or how many numbers several have together
        if (count == 1 && &one == context.outputs)
            for (int64_t size : one.info.shape) text += " " + std::to_string(size);
        const size_t cell = one.info.type == kUint8 ? 1 : one.info.type == kFloat16 ? 2 : 4;
        if (cell == 4) numbers.append(one.data.get(), one.bytes);
        for (size_t i = 0; cell < 4 && i < one.bytes; i += cell) {  // the bits of each of them as a float
            uint16_t bits = 0;
            std::memcpy(&bits, one.data.get() + i, cell);
            const float number = bits;
            numbers.append(reinterpret_cast<const char*>(&number), sizeof number);
        }
    }
    if (count > 1) text += " " + std::to_string(numbers.size() / sizeof(float));
    return text + "\n" + numbers;
}

// The op of that name whose types are those of the inputs.
static const CustomOp* op_of(const Domain& domain, const std::string& name, const std::vector<Value>& inputs) {
    for (const CustomOp* op : domain.ops) {
        bool fits = op->GetName(op) == name && inputs.size() <= op->GetInputTypeCount(op);
        for (size_t i = 0; fits && i < inputs.size(); ++i) {
            const ElementType type = op->GetInputType(op, i);  // kAny: every one; of an input: one that a node leaves out
            fits = type == kAny || inputs[i].info.type == kAny || inputs[i].info.type == type;
        }
        if (fits) return op;
    }
    std::fprintf(stderr, "no op %s with inputs of these types\n", name.c_str());
    std::exit(6);
}

static std::string one_call(const CustomOp* op, Info info, std::vector<Value>& inputs, int at_once) {
    void* kernel = nullptr;
    info.inputs = &inputs;
    if (Status* status = op->CreateKernelV2(op, table, &info, &kernel)) {
        const std::string text = "error " + status->text + "\n";
        delete status;
        return text;
    }
    std::vector<std::string> answers(at_once);
    std::vector<std::thread> all;
    for (std::string& answer : answers) all.emplace_back([&] { answer = compute(op, kernel, inputs); });
    for (std::thread& one : all) one.join();
    op->KernelDestroy(kernel);
    for (const std::string& answer : answers)
        if (answer != answers[0]) return "error calls at the same time disturb each other\n";
    return answers[0];
}

int main(int count, char** words) {
    if (count < 5) return 2;
    threads = std::atoi(words[3]);
#if defined(__linux__)
    if (threads == 1) {  // the ops cut their work by the processors of the process: with one, a span has all panels
        cpu_set_t all, one;
        CPU_ZERO(&one);
        sched_getaffinity(0, sizeof all, &all);
        for (int i = 0; i < CPU_SETSIZE && CPU_COUNT(&one) == 0; ++i)
            if (CPU_ISSET(i, &all)) CPU_SET(i, &one);
        sched_setaffinity(0, sizeof one, &one);
    }
#endif
    fill_table();
    SessionOptions options{};
    const ApiBase base{[](uint32_t) -> const void* { return table; }, [] { return "fake"; }};
    if (RegisterCustomOps(&options, &base)) return 3;
    if (count > 5 && !cm_native_use(words[5])) return 4;
    FILE *in = std::fopen(words[1], "rb"), *out = std::fopen(words[2], "wb");
    char name[64], key[64], value[64];
    for (int attributes, tensors; std::fscanf(in, "%63s %d %d", name, &attributes, &tensors) == 3;) {
        Info info;
        while (attributes--)
            if (std::fscanf(in, "%63s %63s", key, value) == 2) info.attributes[key] = value;
        std::vector<Value> inputs(tensors);
        for (Value& tensor : inputs) {
            int rank = 0;
            if (std::fscanf(in, "%d %d", &tensor.info.type, &rank) != 2) return 5;
            tensor.info.shape.resize(rank);
            for (int64_t& size : tensor.info.shape) {
                long long read = 0;
                if (std::fscanf(in, "%lld", &read) != 1) return 5;
                size = read;
            }
            std::fgetc(in);  // the end of the line
            tensor.allocate();
            if (std::fread(tensor.data.get(), 1, tensor.bytes, in) != tensor.bytes) return 5;
        }
        const std::string answer = one_call(op_of(*options.domain, name, inputs), info, inputs, std::atoi(words[4]));
        std::fwrite(answer.data(), 1, answer.size(), out);
    }
    std::fclose(in), std::fclose(out);
    delete options.domain;
}
