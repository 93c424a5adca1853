// Lanes in plain C++: sixteen rows as an array, each row picking one of M activations.
#pragma once
#include <cstdint>
#include <cstring>

#include "../visit.h"

namespace {

template <int M>
struct Lanes {
  struct V {
    float f[16];
  };
  struct I {
    uint32_t i[16];
  };
  static constexpr bool kUnrolled = false;
  static V zero() { return V{}; }
  static V add(V a, const V& b) {
    for (int i = 0; i < 16; i++) a.f[i] += b.f[i];
    return a;
  }
  static V fma(const V& a, const V& b, V c) {
    for (int i = 0; i < 16; i++) c.f[i] += a.f[i] * b.f[i];
    return c;
  }
  static void store(float* p, const V& v) { std::memcpy(p, v.f, sizeof v.f); }
  static I words(const uint8_t* p) {
    I w;
    std::memcpy(w.i, p, sizeof w.i);
    return w;
  }
  static I shifted(I w, int bits) {
    for (uint32_t& i : w.i) i >>= bits;
    return w;
  }
  static const float* group(const float* x) { return x; }
  static V pick(const float* group, const I& index) {
    V v;
    for (int i = 0; i < 16; i++) v.f[i] = group[index.i[i] % M];
    return v;
  }
  template <int VALUE>
  static V stored(const uint8_t* p) {
    V v;
    for (int i = 0; i < 16; i++) v.f[i] = secateur::stored_value(p, i, VALUE);
    return v;
  }
};

}  // namespace
