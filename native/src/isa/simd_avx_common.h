// What the AVX2 and AVX-512 builds share: eight floats, the 8 x 8 transpose, and vectors of four and eight rows.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../blob.h"

namespace {

// Eight floats in a ymm register, with the operations that products need.
struct Eight {
  using V = __m256;
  static constexpr int W = 8;

  static V zero() { return _mm256_setzero_ps(); }
  static V set1(float a) { return _mm256_set1_ps(a); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  // Kept in a register: GCC would load it again for each product that reads it.
  static V load_once(const float* p) {
    V a = load(p);
    __asm__("" : "+x"(a));
    return a;
  }
  static void store(float* p, V a) { _mm256_storeu_ps(p, a); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  static void prefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

  // Four weights: one 16-byte broadcast and in-lane permutes, on Zen 3 about 15% faster than four scalar broadcasts,
  // because the loop is bound by loads.
  struct Four {
    V v;
    template <int I>
    V lane() const {
      return _mm256_permute_ps(v, I * 0x55);
    }
  };
  static Four four_f32(const uint8_t* p) { return {_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))}; }
  static Four four_bf16(const uint8_t* p) {
    __m128i h = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    __m128 f = _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), h));
    return {_mm256_insertf128_ps(_mm256_castps128_ps256(f), f, 1)};
  }
};

// dst[j][i] = src[i][j]; returns sum + 0 * src. As the lower four rows are inserted on load, each result takes two
// shuffles.
inline __attribute__((always_inline)) __m256 transpose_8x8(const float* src, int64_t lds, float* dst, int64_t ldd,
                                                           __m256 sum) {
  for (int h = 0; h < 2; h++) {
    auto two_rows = [&](int i) {
      return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(src + i * lds + 4 * h)),
                                  _mm_loadu_ps(src + (i + 4) * lds + 4 * h), 1);
    };
    __m256 a = two_rows(0), b = two_rows(1), c = two_rows(2), d = two_rows(3);
    for (__m256 rows : {a, b, c, d}) sum = _mm256_fmadd_ps(rows, _mm256_setzero_ps(), sum);
    __m256 ab_lo = _mm256_unpacklo_ps(a, b), ab_hi = _mm256_unpackhi_ps(a, b);
    __m256 cd_lo = _mm256_unpacklo_ps(c, d), cd_hi = _mm256_unpackhi_ps(c, d);
    float* out = dst + 4 * h * ldd;
    _mm256_storeu_ps(out, _mm256_shuffle_ps(ab_lo, cd_lo, 0x44));
    _mm256_storeu_ps(out + ldd, _mm256_shuffle_ps(ab_lo, cd_lo, 0xEE));
    _mm256_storeu_ps(out + 2 * ldd, _mm256_shuffle_ps(ab_hi, cd_hi, 0x44));
    _mm256_storeu_ps(out + 3 * ldd, _mm256_shuffle_ps(ab_hi, cd_hi, 0xEE));
  }
  return sum;
}

// N rows of a block side by side in one register. int8 values are not scaled here.
template <int N>
struct Rows;

template <>
struct Rows<8> {
  using V = __m256;
  static V zero() { return _mm256_setzero_ps(); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V a) { _mm256_storeu_ps(p, a); }
  static V fma_broadcast(V w, const float* x, V acc) { return _mm256_fmadd_ps(w, _mm256_broadcast_ss(x), acc); }
  template <int VALUE>
  static V stored(const uint8_t* p) {
    if (VALUE == SCT_F32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    if (VALUE == SCT_I8) {
      const __m128i q = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q));
    }
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if (VALUE == SCT_F16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
};

template <>
struct Rows<4> {
  using V = __m128;
  static V zero() { return _mm_setzero_ps(); }
  static V add(V a, V b) { return _mm_add_ps(a, b); }
  static V mul(V a, V b) { return _mm_mul_ps(a, b); }
  static V load(const float* p) { return _mm_loadu_ps(p); }
  static void store(float* p, V a) { _mm_storeu_ps(p, a); }
  static V fma_broadcast(V w, const float* x, V acc) { return _mm_fmadd_ps(w, _mm_broadcast_ss(x), acc); }
  template <int VALUE>
  static V stored(const uint8_t* p) {
    if (VALUE == SCT_F32) return _mm_loadu_ps(reinterpret_cast<const float*>(p));
    if (VALUE == SCT_I8) {
      int q;
      std::memcpy(&q, p, 4);
      return _mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(q)));
    }
    const __m128i h = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    if (VALUE == SCT_F16) return _mm_cvtph_ps(h);
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(h), 16));
  }
};

}  // namespace
