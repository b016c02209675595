// Every set of kernels in this library, best first; and what follows from who made the processor.
#include "kernels.h"
#include "target.h"

namespace cm::cpu {
#if defined(__x86_64__)
extern const Kernels kAvx512, kAvxVnni, kAvx2;
#if defined(CM_AMX)
extern const Kernels kAmx;
#endif
#elif defined(__aarch64__)
extern const Kernels kNeonDot, kNeon;
#endif

#if defined(__x86_64__)
const bool kSecondCache = (__builtin_cpu_init(), __builtin_cpu_is("amd"));
#else
const bool kSecondCache = false;
#endif

const Kernels* const* all_kernels() {
    static const Kernels* const kernels[] = {
#if defined(__x86_64__)
#if defined(CM_AMX)
        &kAmx,
#endif
        &kAvx512, &kAvxVnni, &kAvx2,
#elif defined(__aarch64__)
        &kNeonDot, &kNeon,
#endif
        &kPortable, nullptr};
    return kernels;
}

}  // namespace cm::cpu
