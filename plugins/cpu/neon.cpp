// NEON, of every 64-bit ARM, and its dot product instruction, of most since 2018.
#if defined(__aarch64__) || defined(CM_NEON_IN_PLAIN_CPP)
#if defined(CM_NEON_IN_PLAIN_CPP)  // the tests bring the few intrinsics used, to run this file on any processor
#include "neon_in_plain_cpp.h"
#else
#include <arm_neon.h>
#endif

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "kernels.h"
#include "target.h"

namespace cm::cpu::neon {

// Lane i of the sums += byte 4i .. 4i + 3 of w times those of x.
static CM_INLINE int32x4_t dot_of_bytes(int32x4_t sums, int8x16_t w, int8x16_t x) {
    // 2 * 128 * 127 fits into the 16 bits of a pair only as one product: pairs are added in 32 bits
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
    const int32x4_t high = vpaddlq_s16(vmull_high_s8(w, x));
    return vaddq_s32(sums, vpaddq_s32(low, high));
}

#include "quantise.h"
#include "activate.h"
#include "neon.h"
#include "product.h"
#include "attention.h"
#include "rows.h"

}  // namespace cm::cpu::neon

#if defined(CM_NEON_IN_PLAIN_CPP)
#define CM_DOT_BEGIN
#define CM_DOT_END
#elif defined(__clang__)
#define CM_DOT_BEGIN CM_TARGET_BEGIN("dotprod")
#define CM_DOT_END CM_TARGET_END
#else
#define CM_DOT_BEGIN CM_TARGET_BEGIN("arch=armv8.2-a+dotprod")
#define CM_DOT_END CM_TARGET_END
#endif

CM_DOT_BEGIN
namespace cm::cpu::neon_dot {

static CM_INLINE int32x4_t dot_of_bytes(int32x4_t sums, int8x16_t w, int8x16_t x) { return vdotq_s32(sums, w, x); }

#include "neon.h"
#include "product.h"

}  // namespace cm::cpu::neon_dot
CM_DOT_END

namespace cm::cpu {
static bool usable() { return true; }
static bool usable_with_dot() {
#if defined(__APPLE__) || defined(CM_NEON_IN_PLAIN_CPP)
    return true;
#elif defined(__linux__) && defined(__aarch64__)
    return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
    return false;
#endif
}
extern const Kernels kNeon, kNeonDot;
const Kernels kNeon = {"neon", usable, neon::keep, neon::quantise, neon::multiply, neon::gate, neon::add_parts,
                       neon::normalise, neon::remainder, neon::turn, neon::attend, neon::round, neon::widen_row};
const Kernels kNeonDot = {"neon-dot", usable_with_dot, neon::keep, neon::quantise, neon_dot::multiply, neon::gate, neon::add_parts,
                          neon::normalise, neon::remainder, neon::turn, neon::attend, neon::round, neon::widen_row};
}  // namespace cm::cpu
#endif
