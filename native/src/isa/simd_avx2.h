// Simd for AVX2 and FMA: eight floats in a ymm register.
#pragma once
#include <immintrin.h>

#include "simd_avx_common.h"

namespace {

struct Simd : Eight {
  static constexpr int TB = 8, REGISTERS = 16, MOST_VECTORS = 6;

  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V div(V a, V b) { return _mm256_div_ps(a, b); }
  static V sqrt(V a) { return _mm256_sqrt_ps(a); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static V min(V a, V b) { return _mm256_min_ps(a, b); }
  static V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V exp2_int(V a) {
    __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
  }
  static bool any_nan(V a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }

  static void transpose(const float* src, int64_t lds, float* dst, int64_t ldd) {
    transpose_8x8(src, lds, dst, ldd, zero());
  }

  // A 16 x 16 transpose in quarters, so that whole cache lines are read and written while they are in cache.
  // Returns sum + 0 * src.
  static constexpr int WIDE = 16;
  static constexpr bool WIDE_BACK = false;  // rows of the output that lie 4 KiB apart evict each other
  static V transpose_wide(const float* src, int64_t lds, float* dst, int64_t ldd, V sum) {
    for (int r = 0; r < 16; r += 8)
      for (int c = 0; c < 16; c += 8) sum = transpose_8x8(src + r * lds + c, lds, dst + c * ldd + r, ldd, sum);
    return sum;
  }
};

using Half = Simd;  // fewer lanes are no faster

}  // namespace
