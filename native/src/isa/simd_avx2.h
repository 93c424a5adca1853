// Eight floats in a ymm register (AVX2, FMA).
#pragma once
#include <immintrin.h>

#include "simd_avx_common.h"

namespace {

struct Simd {
  using V = __m256;
  static constexpr int W = 8, TB = 8, REGISTERS = 16, MOST_VECTORS = 6;

  static V zero() { return _mm256_setzero_ps(); }
  static V set1(float a) { return _mm256_set1_ps(a); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  // Kept in a register: GCC would load it anew for each product that reads it.
  static V load_once(const float* p) {
    V a = load(p);
    __asm__("" : "+x"(a));
    return a;
  }
  static void store(float* p, V a) { _mm256_storeu_ps(p, a); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V div(V a, V b) { return _mm256_div_ps(a, b); }
  static V sqrt(V a) { return _mm256_sqrt_ps(a); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static V min(V a, V b) { return _mm256_min_ps(a, b); }
  static V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V exp2_int(V a) {
    __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
  }
  static bool any_nan(V a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  static void prefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

  // One 16-byte broadcast and in-lane permutes: on Zen 3 about 15% faster than four scalar broadcasts,
  // because the loop is bound by loads.
  struct Quad {
    V v;
    template <int I>
    V lane() const {
      return _mm256_permute_ps(v, I * 0x55);
    }
  };
  static Quad quad_f32(const uint8_t* p) { return {_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))}; }
  static Quad quad_bf16(const uint8_t* p) {
    __m128i h = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    __m128 f = _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), h));
    return {_mm256_insertf128_ps(_mm256_castps128_ps256(f), f, 1)};
  }

  static void transpose(const float* src, int64_t lds, float* dst, int64_t ldd) {
    transpose_8x8(src, lds, dst, ldd, zero());
  }

  // 16 x 16 in quarters, so that cache lines are read and written whole while they are at hand. Returns sum + 0 * src.
  static constexpr int WIDE = 16;
  static constexpr bool WIDE_BACK = false;  // out of tiles, rows that lie 4 KiB apart drive each other out
  static V transpose_wide(const float* src, int64_t lds, float* dst, int64_t ldd, V sum) {
    for (int r = 0; r < 16; r += 8)
      for (int c = 0; c < 16; c += 8) sum = transpose_8x8(src + r * lds + c, lds, dst + c * ldd + r, ldd, sum);
    return sum;
  }
};

}  // namespace
