// Lanes for AVX2: sixteen rows in two ymm registers, each row picking one of M activations.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "../blob.h"
#include "simd_avx_common.h"

namespace {

template <int M>
struct Lanes {
  struct V {
    __m256 a, b;
  };
  struct I {
    __m256i a, b;
  };
  static constexpr bool kUnrolled = true;
  static V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static V add(V p, V q) { return {_mm256_add_ps(p.a, q.a), _mm256_add_ps(p.b, q.b)}; }
  static V fma(V p, V q, V r) { return {_mm256_fmadd_ps(p.a, q.a, r.a), _mm256_fmadd_ps(p.b, q.b, r.b)}; }
  static void store(float* p, V v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
  }
  static I words(const uint8_t* p) {
    const auto* q = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
  }
  static I shifted(I i, int bits) {
    const __m128i n = _mm_cvtsi32_si128(bits);
    return {_mm256_srl_epi32(i.a, n), _mm256_srl_epi32(i.b, n)};
  }
  // The permutations use only the low bits of an index.
  static __m256 group(const float* x) {
    return M == 4 ? _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x)) : _mm256_loadu_ps(x);
  }
  static V pick(__m256 group, I i) {
    if (M == 4) return {_mm256_permutevar_ps(group, i.a), _mm256_permutevar_ps(group, i.b)};
    return {_mm256_permutevar8x32_ps(group, i.a), _mm256_permutevar8x32_ps(group, i.b)};
  }
  template <int VALUE>
  static V stored(const uint8_t* p) {
    return {Rows<8>::stored<VALUE>(p), Rows<8>::stored<VALUE>(p + 8 * secateur::value_bytes(VALUE))};
  }
};

}  // namespace
