// Every set of kernels in this library, best first.
#include "kernels.h"

namespace cm::cpu {
#if defined(__aarch64__) || defined(CM_NEON_IN_PLAIN_CPP)
extern const Kernels kNeonDot, kNeon;
#endif
#if defined(__x86_64__)
extern const Kernels kAvx512, kAvxVnni, kAvx2;
#endif

const Kernels* const* all_kernels() {
    static const Kernels* const kernels[] = {
#if defined(__aarch64__) || defined(CM_NEON_IN_PLAIN_CPP)
        &kNeonDot, &kNeon,
#endif
#if defined(__x86_64__)
        &kAvx512, &kAvxVnni, &kAvx2,
#endif
        &kPortable, nullptr};
    return kernels;
}

}  // namespace cm::cpu
