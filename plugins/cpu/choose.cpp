// Every set of kernels in this library, best first.
#include "kernels.h"

namespace cm::cpu {
#if defined(__x86_64__)
extern const Kernels kAvx512, kAvxVnni, kAvx2;
#elif defined(__aarch64__)
extern const Kernels kNeonDot, kNeon;
#endif

const Kernels* const* all_kernels() {
    static const Kernels* const kernels[] = {
#if defined(__x86_64__)
        &kAvx512, &kAvxVnni, &kAvx2,
#elif defined(__aarch64__)
        &kNeonDot, &kNeon,
#endif
        &kPortable, nullptr};
    return kernels;
}

}  // namespace cm::cpu
