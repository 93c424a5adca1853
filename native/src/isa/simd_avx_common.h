// The 8 x 8 transpose that the AVX2 and AVX-512 builds share.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

// dst[j][i] = src[i][j]. Inserting the lower four rows on load leaves two shuffles a result vector.
inline void transpose_8x8(const float* src, int64_t lds, float* dst, int64_t ldd) {
  for (int h = 0; h < 2; h++) {
    auto two_rows = [&](int i) {
      return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(src + i * lds + 4 * h)),
                                  _mm_loadu_ps(src + (i + 4) * lds + 4 * h), 1);
    };
    __m256 a = two_rows(0), b = two_rows(1), c = two_rows(2), d = two_rows(3);
    __m256 ab_lo = _mm256_unpacklo_ps(a, b), ab_hi = _mm256_unpackhi_ps(a, b);
    __m256 cd_lo = _mm256_unpacklo_ps(c, d), cd_hi = _mm256_unpackhi_ps(c, d);
    float* out = dst + 4 * h * ldd;
    _mm256_storeu_ps(out, _mm256_shuffle_ps(ab_lo, cd_lo, 0x44));
    _mm256_storeu_ps(out + ldd, _mm256_shuffle_ps(ab_lo, cd_lo, 0xEE));
    _mm256_storeu_ps(out + 2 * ldd, _mm256_shuffle_ps(ab_hi, cd_hi, 0x44));
    _mm256_storeu_ps(out + 3 * ldd, _mm256_shuffle_ps(ab_hi, cd_hi, 0xEE));
  }
}

}  // namespace
