// Messages to TensorRT's logger, or to stderr where nobody has set one.
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace cm {

void set_logger_finder(nvinfer1::ILoggerFinder* finder);
void log(nvinfer1::ILogger::Severity severity, const std::string& text);

// Logs "CoreFFN: text" as an error; the value is what a plugin returns for "no".
bool refuse(const char* plugin, const std::string& text);

}  // namespace cm
