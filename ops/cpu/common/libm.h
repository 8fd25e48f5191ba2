// Functions of libm by the versions that old systems have.
#pragma once
#include <cmath>

// glibc 2.29 gave exp a version that leaves errno alone; the one before computes the same.
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver exp, exp@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver exp, exp@GLIBC_2.17");
#endif
