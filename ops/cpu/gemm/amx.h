// Whether this process may use AMX for products of bfloat16.
#pragma once
#include "common/simd.h"

#if VB_BFLOAT16 && defined(__AMX_BF16__) && defined(__linux__)
#define VB_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace linear {

#if VB_AMX
// Linux requires a process to request permission.
static bool has_tiles() {
  static const bool has = [] {
    unsigned a, b, c, d;
    constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d & amx_bf16) || !(d & amx_tile)) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return has;
}
#else
static bool has_tiles() { return false; }
#endif

}  // namespace linear
