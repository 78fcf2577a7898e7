// Which instruction sets this processor has: has_NAME for each file of this folder; see LEVELS in setup.py.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__APPLE__) && defined(__aarch64__)
#include <sys/sysctl.h>
#endif

static inline bool has_portable() { return true; }
static inline bool has_amx_emulated() { return true; }

#if defined(__x86_64__)
static inline bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
static inline bool has_avxvnni() {  // by number: clang 14 has no name for it
  unsigned a = 0, b, c, d;
  const unsigned avx_vnni = 1u << 4;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & avx_vnni) != 0;
}
static inline bool has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
static inline bool has_avx512bf16() { return has_avx512vnni() && __builtin_cpu_supports("avx512bf16"); }

// The tiles of AMX for bytes and bfloat16; the operating system has to let this process use them, and may refuse.
static inline bool has_amx() {
#if defined(__linux__)
  static const bool granted = [] {
    unsigned a, b, c, d = 0;
    const unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, amx_int8 = 1u << 25, all = amx_bf16 | amx_tile | amx_int8;
    if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & all) != all) return false;
    const long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return granted;
#else
  return false;
#endif
}
#endif

#if defined(__aarch64__)
#if defined(__linux__)
static inline bool has_neon() {
  const unsigned long dot_products = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & dot_products) != 0;
}
static inline bool has_neon_i8mm() {
  const unsigned long matrices_of_bytes = 1ul << 13, bfloat16 = 1ul << 14,
                      both = matrices_of_bytes | bfloat16;  // HWCAP2_
  return has_neon() && (getauxval(AT_HWCAP2) & both) == both;
}
#elif defined(__APPLE__)
static inline bool has_feature(const char* name) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
static inline bool has_neon() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
static inline bool has_neon_i8mm() {
  return has_neon() && has_feature("hw.optional.arm.FEAT_I8MM") && has_feature("hw.optional.arm.FEAT_BF16");
}
#else
static inline bool has_neon() { return false; }
static inline bool has_neon_i8mm() { return false; }
#endif
#endif
