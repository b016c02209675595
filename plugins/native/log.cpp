#include "log.h"

#include <atomic>
#include <cstdio>

namespace cm {

namespace {
std::atomic<nvinfer1::ILoggerFinder*> finder_of_logger{nullptr};
thread_local Refusals* refusals = nullptr;
}  // namespace

Refusals::Refusals() { refusals = this; }
Refusals::~Refusals() { refusals = nullptr; }

void set_logger_finder(nvinfer1::ILoggerFinder* finder) { finder_of_logger = finder; }

void log(nvinfer1::ILogger::Severity severity, const std::string& text) {
    nvinfer1::ILoggerFinder* finder = finder_of_logger;
    nvinfer1::ILogger* logger = finder != nullptr ? finder->findLogger() : nullptr;
    if (logger != nullptr) {
        logger->log(severity, text.c_str());
    } else {
        fprintf(stderr, "cm_export plugins: %s\n", text.c_str());
    }
}

bool refuse(const char* plugin, const std::string& text) {
    const std::string whole = std::string(plugin) + ": " + text;
    if (refusals != nullptr) {
        refusals->text = whole;
    } else {
        log(nvinfer1::ILogger::Severity::kERROR, whole);
    }
    return false;
}

}  // namespace cm
