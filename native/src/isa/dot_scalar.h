// Dot in plain integers: products of four bytes a lane. Include a Simd before it.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

struct Dot {
  struct A {
    uint32_t i[Simd::W];  // wraps, as vectors do
  };
  struct Weights {
    int32_t w[4];
  };
  static constexpr int kWide = 1;

  static A none() { return A{}; }
  static A load(const char* p) {
    A a;
    std::memcpy(a.i, p, sizeof a.i);
    return a;
  }
  static void store(char* p, A a) { std::memcpy(p, a.i, sizeof a.i); }
  static A add(A a, A b) {
    for (int i = 0; i < Simd::W; i++) a.i[i] += b.i[i];
    return a;
  }
  // -zeros * sum
  static A minus(const char* zeros, int32_t sum) {
    A a = load(zeros);
    for (uint32_t& i : a.i) i *= 0u - static_cast<uint32_t>(sum);
    return a;
  }
  static Simd::V as_float(A a) {
    float f[Simd::W];
    for (int i = 0; i < Simd::W; i++) f[i] = static_cast<float>(static_cast<int32_t>(a.i[i]));
    return Simd::load(f);
  }
  static Weights weights(const uint8_t* p) {
    Weights w;
    for (int i = 0; i < 4; i++) w.w[i] = static_cast<int8_t>(p[i]);
    return w;
  }
  static A add_products(A acc, const uint8_t* x, uint32_t, const Weights& w) {
    for (int i = 0; i < Simd::W; i++)
      for (int j = 0; j < 4; j++) acc.i[i] += static_cast<uint32_t>(x[4 * i + j] * w.w[j]);
    return acc;
  }
  static int64_t round(const float*, int64_t, float, int32_t, uint8_t*) { return 0; }
  static void put(const float* from, float* to, int64_t) { std::memcpy(to, from, sizeof(float) * Simd::TB); }
};

}  // namespace
