// What kernels are written with: vectors, threads, scratch buffers, prefetches, a C interface.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>
#include "common/interface.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "common/prefetch.h"
#include "common/range.h"
#include "common/scratch.h"
#include "common/variants.h"
