// Linear layers for other kernels. Their micro-kernels are large and slow to compile, so they are
// only in the library of gemm.cpp; ops/cpu/build/libraries.py passes its function to each library that
// includes this header.
#pragma once
#include <new>
#include "gemm/pack.h"

namespace linear {

using Forward = int(const Problem*, const Tensors*);

static Forward* gemm;  // linear_forward of gemm.cpp, for the same instruction set

static void forward(const Problem& p, const Tensors& t) {
  if (gemm(&p, &t)) throw std::bad_alloc();
}

// Contiguous rows, in one thread.
template <class T>
static Problem layer_of(int64_t rows, int64_t in_features, int64_t out_features) {
  Problem p{};
  p.rows = rows;
  p.in_features = p.in_stride = in_features;
  p.out_features = p.out_stride = out_features;
  p.bfloat16 = sizeof(T) < sizeof(float);
  p.threads = 1;
  return p;
}

template <class T>
static void map_rows(const T* in, int64_t rows, int64_t in_features, const void* weight,
                     const float* bias, int64_t out_features, int64_t activation, T* out) {
  Problem p = layer_of<T>(rows, in_features, out_features);
  p.activation = activation;
  Tensors t{};
  t.in = in;
  t.weight = weight;
  t.bias = bias;
  t.out = out;
  forward(p, t);
}

}  // namespace linear

extern "C" void linear_use(linear::Forward* forward) { linear::gemm = forward; }
