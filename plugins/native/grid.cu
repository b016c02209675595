// The parts of plugin.h that need device.h: the size of the chip and the names of CUDA's errors.
#include "device.h"
#include "plugin.h"

namespace cm {

bool read_grid_blocks(const Fields& fields, int32_t* out) {
    constexpr int kPerMultiprocessor = 4;
    constexpr int kWithoutDevice = 132;
    if (fields.has(kGridBlocks)) return fields.read(kGridBlocks, out);
    int count = multiprocessors();
    if (count == 0) {
        log(nvinfer1::ILogger::Severity::kWARNING, "no CUDA device: work is cut for 132 multiprocessors");
        count = kWithoutDevice;
    }
    *out = kPerMultiprocessor * count;
    return true;
}

int32_t OpPlugin::status(cudaError_t error) const {
    const cudaError_t finished = finish();
    if (error == cudaSuccess) error = finished;
    if (error == cudaSuccess) return 0;
    refuse(name_, std::string("CUDA: ") + error_text(error));
    return static_cast<int32_t>(error);
}

}  // namespace cm
