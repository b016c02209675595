// Messages to TensorRT's logger, or to stderr where nobody has set one.
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace cm {

void set_logger_finder(nvinfer1::ILoggerFinder* finder);
void log(nvinfer1::ILogger::Severity severity, const std::string& text);

// Logs "CoreFFN: text" as an error; the value is what a plugin returns for "no".
bool refuse(const char* plugin, const std::string& text);

// As long as one lives, what its thread refuses becomes `text` instead: for a caller that reports errors itself.
class Refusals {
  public:
    Refusals();
    ~Refusals();
    std::string text;
};

}  // namespace cm
