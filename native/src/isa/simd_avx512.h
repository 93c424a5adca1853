// Sixteen floats in a zmm register (AVX-512 F, BW, DQ, VL and VBMI2).
#pragma once
#include <immintrin.h>

#include "simd_avx_common.h"

namespace {

struct Simd {
  using V = __m512;
  static constexpr int W = 16, TB = 8, REGISTERS = 32;

  static V zero() { return _mm512_setzero_ps(); }
  static V set1(float a) { return _mm512_set1_ps(a); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V a) { _mm512_storeu_ps(p, a); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V div(V a, V b) { return _mm512_div_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static V min(V a, V b) { return _mm512_min_ps(a, b); }
  static V round(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V exp2_int(V a) {
    __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(e, 23));
  }
  static bool any_nan(V a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

  // Scalar broadcasts: zmm shuffles would take the port of every second FMA.
  struct QuadF32 {
    const float* p;
    template <int I>
    V lane() const {
      return _mm512_set1_ps(p[I]);
    }
  };
  struct QuadBf16 {
    V v;
    template <int I>
    V lane() const {
      return _mm512_permute_ps(v, I * 0x55);
    }
  };
  static QuadF32 quad_f32(const uint8_t* p) { return {reinterpret_cast<const float*>(p)}; }
  static QuadBf16 quad_bf16(const uint8_t* p) {
    __m128i h = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return {_mm512_broadcast_f32x4(_mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), h)))};
  }

  static void transpose(const float* src, int64_t lds, float* dst, int64_t ldd) {
    transpose_8x8(src, lds, dst, ldd);
  }
};

}  // namespace
