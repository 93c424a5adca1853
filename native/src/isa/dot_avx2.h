// Dot for AVX2: products of four bytes a lane without VNNI. vpmaddubsw would saturate, so bytes are kept as two pairs
// of int16 (even bytes and odd bytes) for vpmaddwd.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Dot {
  using A = __m256i;
  struct Weights {
    __m256i even, odd;
  };
  static constexpr int kWide = 2;

  static A none() { return _mm256_setzero_si256(); }
  static A load(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(char* p, A a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static A add(A a, A b) { return _mm256_add_epi32(a, b); }
  // -zeros * sum
  static A minus(const char* zeros, int32_t sum) { return _mm256_mullo_epi32(load(zeros), _mm256_set1_epi32(-sum)); }
  static __m256 as_float(A a) { return _mm256_cvtepi32_ps(a); }
  static Weights weights(const uint8_t* p) {
    int32_t w;
    std::memcpy(&w, p, 4);
    const __m256i all = _mm256_set1_epi32(w);
    return {_mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8), _mm256_srai_epi16(all, 8)};
  }
  static A add_products(A acc, const uint8_t* x, uint32_t stride, Weights w) {
    const char* p = reinterpret_cast<const char*>(x);
    const A even = _mm256_madd_epi16(load(p), w.even), odd = _mm256_madd_epi16(load(p + stride), w.odd);
    return add(acc, add(even, odd));
  }
  // Rounds whole vectors of x to bytes. Returns how many numbers it rounded.
  static int64_t round(const float* x, int64_t n, float inverse, int32_t zero, uint8_t* out) {
    const __m256 factor = _mm256_set1_ps(inverse);
    const __m256i z = _mm256_set1_epi32(zero);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      const __m256i q = add(_mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), factor)), z);
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i), _mm_packus_epi16(words, words));
    }
    return i;
  }
  // Writes a quad of eight tokens to the tile: even bytes, then odd ones.
  static void put(const float* from, float* to, int64_t tile) {
    const __m256i q = load(reinterpret_cast<const char*>(from));
    store(reinterpret_cast<char*>(to), _mm256_and_si256(q, _mm256_set1_epi32(0x00ff00ff)));
    store(reinterpret_cast<char*>(to + tile), _mm256_srli_epi16(q, 8));
  }
};

}  // namespace
