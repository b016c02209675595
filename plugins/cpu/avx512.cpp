// AVX-512 with VNNI: Intel since Ice Lake (servers) and Tiger Lake, AMD since Zen 4.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "target.h"

CM_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
namespace cm::cpu::avx512 {

#include "avx512.h"
#include "quantise.h"
#include "activate.h"
#include "product.h"
#include "attention.h"
#include "rows.h"

}  // namespace cm::cpu::avx512
CM_TARGET_END

namespace cm::cpu {
static bool usable() {
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
extern const Kernels kAvx512;
const Kernels kAvx512 = {"avx512-vnni", usable, avx512::keep, avx512::quantise, avx512::multiply, avx512::gate, avx512::add_parts,
                         avx512::normalise, avx512::remainder, avx512::turn, avx512::attend, avx512::round, avx512::widen_row};
}  // namespace cm::cpu
#endif
