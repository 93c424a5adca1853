// Simd in plain C++: eight floats as an array, which the compiler is free to vectorise. Used where the build or the CPU
// has no other instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../convert.h"
#include "../visit.h"

namespace {

struct Simd {
  static constexpr int W = 8;   // floats in a vector
  static constexpr int TB = 8;  // side of a transposed square
  static constexpr int REGISTERS = 16, MOST_VECTORS = 4;
  struct V {
    float f[W];
  };

  static V zero() { return V{}; }
  static V set1(float a) {
    V r;
    for (float& f : r.f) f = a;
    return r;
  }
  static V load(const float* p) {
    V r;
    std::memcpy(r.f, p, sizeof r.f);
    return r;
  }
  static V load_once(const float* p) { return load(p); }
  static void store(float* p, V a) { std::memcpy(p, a.f, sizeof a.f); }
  static V add(V a, V b) {
    for (int i = 0; i < W; i++) a.f[i] += b.f[i];
    return a;
  }
  static V sub(V a, V b) {
    for (int i = 0; i < W; i++) a.f[i] -= b.f[i];
    return a;
  }
  static V mul(V a, V b) {
    for (int i = 0; i < W; i++) a.f[i] *= b.f[i];
    return a;
  }
  static V div(V a, V b) {
    for (int i = 0; i < W; i++) a.f[i] /= b.f[i];
    return a;
  }
  static V sqrt(V a) {
    for (float& f : a.f) f = std::sqrt(f);
    return a;
  }
  static V fma(V a, V b, V c) {
    for (int i = 0; i < W; i++) c.f[i] += a.f[i] * b.f[i];
    return c;
  }
  // max and min return the second operand where either is NaN.
  static V max(V a, V b) {
    for (int i = 0; i < W; i++) b.f[i] = a.f[i] > b.f[i] ? a.f[i] : b.f[i];
    return b;
  }
  static V min(V a, V b) {
    for (int i = 0; i < W; i++) b.f[i] = a.f[i] < b.f[i] ? a.f[i] : b.f[i];
    return b;
  }
  static V round(V a) {
    for (float& f : a.f) f = std::nearbyint(f);
    return a;
  }
  // 2^a of an integral a in [-126, 127].
  static V exp2_int(V a) {
    for (float& f : a.f) f = f == f ? std::ldexp(1.0f, static_cast<int>(f)) : f;  // NaN is no int
    return a;
  }
  static bool any_nan(V a) {
    bool nan = false;
    for (float f : a.f) nan |= f != f;
    return nan;
  }
  static void prefetch(const void*) {}
  static void prefetch_l2(const void*) {}

  // Four weights, each of which is broadcast to a vector.
  struct FourF32 {
    const float* p;
    template <int I>
    V lane() const {
      return set1(p[I]);
    }
  };
  struct FourBf16 {
    const uint16_t* p;
    template <int I>
    V lane() const {
      return set1(secateur::from_bf16(p[I]));
    }
  };
  static FourF32 four_f32(const uint8_t* p) { return {reinterpret_cast<const float*>(p)}; }
  static FourBf16 four_bf16(const uint8_t* p) { return {reinterpret_cast<const uint16_t*>(p)}; }

  // dst[j][i] = src[i][j] for a TB x TB square.
  static constexpr int WIDE = 0;  // no larger transpose
  static constexpr bool WIDE_BACK = false;
  static void transpose(const float* src, int64_t lds, float* dst, int64_t ldd) {
    for (int i = 0; i < TB; i++)
      for (int j = 0; j < TB; j++) dst[j * ldd + i] = src[i * lds + j];
  }
};

// N rows of a block side by side. int8 values are not scaled here.
template <int N>
struct Rows {
  struct V {
    float f[N];
  };
  static V zero() { return V{}; }
  static V add(V a, V b) {
    for (int i = 0; i < N; i++) a.f[i] += b.f[i];
    return a;
  }
  static V mul(V a, V b) {
    for (int i = 0; i < N; i++) a.f[i] *= b.f[i];
    return a;
  }
  static V load(const float* p) {
    V r;
    std::memcpy(r.f, p, sizeof r.f);
    return r;
  }
  static V load_once(const float* p) { return load(p); }
  static void store(float* p, V a) { std::memcpy(p, a.f, sizeof a.f); }
  static V fma_broadcast(V w, const float* x, V acc) {
    for (int i = 0; i < N; i++) acc.f[i] += w.f[i] * *x;
    return acc;
  }
  template <int VALUE>
  static V stored(const uint8_t* p) {
    V r;
    for (int i = 0; i < N; i++) r.f[i] = secateur::stored_value(p, i, VALUE);
    return r;
  }
};

using Half = Simd;  // fewer lanes are no faster

}  // namespace
