// What the kernels of one instruction set share. A kernels_<isa>.cpp includes this set's own headers (Simd, Half, Rows,
// Expand, Dot and Lanes) and then kernels.inl; each .inl file includes the others that it needs.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../blob.h"
#include "../table.h"

// For loops over registers: left to itself, GCC keeps arrays of accumulators in memory where a loop around them
// is not unrolled.
#define SECATEUR_UNROLL _Pragma("GCC unroll 16")

namespace {

// The block and nm kernels read weights once and in order, and prefetch them by so many bytes: one page, into which no
// hardware prefetcher looks ahead.
constexpr int kPrefetchBytes = 4096;

// The tiled and quad kernels prefetch the output of the row that comes so many rows later: rows sorted by their number
// of nonzeros defeat the hardware prefetcher.
constexpr int kRowsAhead = 3;

inline float sum_of(Simd::V v) {
  float lanes[Simd::W], sum = 0;
  Simd::store(lanes, v);
  for (float lane : lanes) sum += lane;
  return sum;
}

// Whether one of n numbers is NaN or infinite: only then is 0 * x, summed up, NaN.
bool any_not_finite(const float* x, int64_t n) {
  Simd::V a = Simd::zero(), b = Simd::zero();
  int64_t i = 0;
  for (; i + 2 * Simd::W <= n; i += 2 * Simd::W) {
    a = Simd::fma(Simd::load(x + i), Simd::zero(), a);
    b = Simd::fma(Simd::load(x + i + Simd::W), Simd::zero(), b);
  }
  float tail = 0;
  for (; i < n; i++) tail += x[i] * 0.0f;
  return tail != tail || Simd::any_nan(Simd::add(a, b));
}

}  // namespace
