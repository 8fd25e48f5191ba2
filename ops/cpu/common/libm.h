// Binds libm functions to symbol versions available on old systems.
#pragma once
#include <cmath>

// glibc 2.29 added a version of exp that does not set errno; the older one computes the same.
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver exp, exp@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver exp, exp@GLIBC_2.17");
#endif
