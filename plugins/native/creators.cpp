// The two functions that TensorRT looks for in a plugin library; nothing else is exported.
#include "../core_attention/plugin.h"
#include "../core_ffn/plugin.h"
#include "../core_linear/plugin.h"

#define CM_EXPORT extern "C" __attribute__((visibility("default")))

CM_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { cm::set_logger_finder(finder); }

CM_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static cm::Creator<cm::CoreFfn> ffn;
    static cm::Creator<cm::CoreAttention> attention;
    static cm::Creator<cm::CoreLinear> linear;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&ffn, &attention, &linear};
    count = 3;
    return creators;
}
