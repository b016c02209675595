// CM_TARGET_BEGIN("avx2,fma") ... CM_TARGET_END: functions between them may use these instructions, whatever the rest of
// the library is compiled for. Headers are included before, or their inline functions would use them too.
#pragma once

#define CM_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define CM_TARGET_BEGIN(what) CM_PRAGMA(clang attribute push(__attribute__((target(what))), apply_to = function))
#define CM_TARGET_END CM_PRAGMA(clang attribute pop)
#else
#define CM_TARGET_BEGIN(what) CM_PRAGMA(GCC push_options) CM_PRAGMA(GCC target(what))
#define CM_TARGET_END CM_PRAGMA(GCC pop_options)
#endif

// Compilers before GCC 11 and clang 12 do not know tiles.
#if defined(__x86_64__) && defined(__linux__) && ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define CM_AMX
#endif

#define CM_INLINE inline __attribute__((always_inline))
