// Dot for AVX-512: products of four bytes a lane by vpdpbusd (VNNI).
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Dot {
  using A = __m512i;
  using Weights = __m512i;
  static constexpr int kWide = 1;

  static A none() { return _mm512_setzero_si512(); }
  static A load(const char* p) { return _mm512_loadu_si512(p); }
  static void store(char* p, A a) { _mm512_storeu_si512(p, a); }
  static A add(A a, A b) { return _mm512_add_epi32(a, b); }
  // -zeros * sum
  static A minus(const char* zeros, int32_t sum) {
    return _mm512_mullo_epi32(_mm512_loadu_si512(zeros), _mm512_set1_epi32(-sum));
  }
  static __m512 as_float(A a) { return _mm512_cvtepi32_ps(a); }
  static Weights weights(const uint8_t* p) {
    int32_t w;
    std::memcpy(&w, p, 4);
    return _mm512_set1_epi32(w);
  }
  static A add_products(A acc, const uint8_t* x, uint32_t, Weights w) {
    return _mm512_dpbusd_epi32(acc, _mm512_loadu_si512(x), w);
  }
  // Rounds whole vectors of x to bytes. Returns how many numbers it rounded.
  static int64_t round(const float* x, int64_t n, float inverse, int32_t zero, uint8_t* out) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(inverse)));
      const __m512i moved = _mm512_max_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(zero)), _mm512_setzero_si512());
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtusepi32_epi8(moved));
    }
    return i;
  }
  // Writes a quad of eight tokens to the tile.
  static void put(const float* from, float* to, int64_t) { _mm256_storeu_ps(to, _mm256_loadu_ps(from)); }
};

}  // namespace
