// Simd for AVX-512 (F, BW, DQ, VL and VBMI2): sixteen floats in a zmm register.
#pragma once
#include <immintrin.h>

#include "simd_avx_common.h"

namespace {

struct Simd {
  using V = __m512;
  static constexpr int W = 16, TB = 8, REGISTERS = 32, MOST_VECTORS = 8;

  static V zero() { return _mm512_setzero_ps(); }
  static V set1(float a) { return _mm512_set1_ps(a); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  // Kept in a register: GCC might load it again for each product that reads it.
  static V load_once(const float* p) {
    V a = load(p);
    __asm__("" : "+v"(a));
    return a;
  }
  static void store(float* p, V a) { _mm512_storeu_ps(p, a); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V div(V a, V b) { return _mm512_div_ps(a, b); }
  static V sqrt(V a) { return _mm512_sqrt_ps(a); }
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
  static void prefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

  // Four weights: one 16-byte broadcast and in-lane permutes, on Zen 4 4 to 9% faster than four scalar broadcasts,
  // because the loop is bound by loads.
  struct Four {
    V v;
    template <int I>
    V lane() const {
      return _mm512_permute_ps(v, I * 0x55);
    }
  };
  static Four four_f32(const uint8_t* p) {
    return {_mm512_broadcast_f32x4(_mm_loadu_ps(reinterpret_cast<const float*>(p)))};
  }
  static Four four_bf16(const uint8_t* p) {
    __m128i h = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return {_mm512_broadcast_f32x4(_mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), h)))};
  }

  static void transpose(const float* src, int64_t lds, float* dst, int64_t ldd) {
    transpose_8x8(src, lds, dst, ldd, _mm256_setzero_ps());
  }

  // A 16 x 16 transpose: reads and writes whole cache lines, each once, whatever the strides. Returns sum + 0 * src.
  static constexpr int WIDE = 16;
  static constexpr bool WIDE_BACK = true;
  // Inlined, it takes a tenth to a fifth longer.
  __attribute__((noinline)) static V transpose_wide(const float* src, int64_t lds, float* dst, int64_t ldd, V sum) {
    V q[16];  // q[4 a + c], lane l: column 4 l + c of rows 4 a .. 4 a + 3
    for (int a = 0; a < 4; a++) {
      V r[4];
      for (int i = 0; i < 4; i++) {
        r[i] = load(src + (4 * a + i) * lds);
        sum = fma(r[i], zero(), sum);
      }
      const V lo = _mm512_unpacklo_ps(r[0], r[1]), hi = _mm512_unpackhi_ps(r[0], r[1]);
      const V lo2 = _mm512_unpacklo_ps(r[2], r[3]), hi2 = _mm512_unpackhi_ps(r[2], r[3]);
      q[4 * a] = _mm512_shuffle_ps(lo, lo2, 0x44);
      q[4 * a + 1] = _mm512_shuffle_ps(lo, lo2, 0xEE);
      q[4 * a + 2] = _mm512_shuffle_ps(hi, hi2, 0x44);
      q[4 * a + 3] = _mm512_shuffle_ps(hi, hi2, 0xEE);
    }
    for (int c = 0; c < 4; c++) {
      const V a = _mm512_shuffle_f32x4(q[c], q[4 + c], 0x88), b = _mm512_shuffle_f32x4(q[c], q[4 + c], 0xDD);
      const V d = _mm512_shuffle_f32x4(q[8 + c], q[12 + c], 0x88), e = _mm512_shuffle_f32x4(q[8 + c], q[12 + c], 0xDD);
      store(dst + c * ldd, _mm512_shuffle_f32x4(a, d, 0x88));
      store(dst + (4 + c) * ldd, _mm512_shuffle_f32x4(b, e, 0x88));
      store(dst + (8 + c) * ldd, _mm512_shuffle_f32x4(a, d, 0xDD));
      store(dst + (12 + c) * ldd, _mm512_shuffle_f32x4(b, e, 0xDD));
    }
    return sum;
  }
};

// For few tokens: ymm registers allow two loads and two products a cycle, zmm registers one.
struct Half : Eight {
  static constexpr int REGISTERS = 32;
};

}  // namespace
