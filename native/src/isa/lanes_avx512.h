// Lanes for AVX-512: sixteen rows in a zmm register, each row picking one of M activations.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "../blob.h"

namespace {

template <int M>
struct Lanes {
  using V = __m512;
  using I = __m512i;
  static constexpr bool kUnrolled = true;
  static V zero() { return _mm512_setzero_ps(); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static void store(float* p, V a) { _mm512_storeu_ps(p, a); }
  static I words(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static I shifted(I a, int bits) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(bits)); }
  // Repeated over the register. The permutations use only the low bits of an index.
  static V group(const float* x) {
    if (M == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(x));
    return _mm512_broadcast_f32x8(_mm256_loadu_ps(x));
  }
  static V pick(V group, I index) {
    return M == 4 ? _mm512_permutevar_ps(group, index) : _mm512_permutexvar_ps(index, group);
  }
  template <int VALUE>
  static V stored(const uint8_t* p) {
    if (VALUE == SCT_F32) return _mm512_loadu_ps(p);
    if (VALUE == SCT_I8)
      return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if (VALUE == SCT_F16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
};

}  // namespace
