// Expand for AVX-512, for rows of a bitmask weight: vpexpand puts the nonzeros of 16, 32 or 64 columns into their
// lanes. Narrow types become float32 in the lanes where they lie, and activations are packed in that order (source).
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "../blob.h"

namespace {

template <int VALUE>
struct Expand {
  // An int8 is used as the top byte of an int32.
  static constexpr float kScale = VALUE == SCT_I8 ? 1.0f / 16777216 : 1.0f;

  // The column of lane i of 64: bf16 takes the even columns of 32 before the odd columns, int8 every fourth column.
  static constexpr int source(int i) {
    return VALUE == SCT_F32 ? i : VALUE == SCT_BF16 ? i / 32 * 32 + i % 16 * 2 + i / 16 % 2 : i % 16 * 4 + i / 16;
  }

  template <int T>
  static void row(const uint64_t* mask, int64_t words, const uint8_t* value, const float* x, int64_t stride,
                  float (&sum)[T]) {
    constexpr int kSets = T >= 4 ? 1 : T == 2 ? 2 : 4;
    __m512 acc[kSets][T];
    _Pragma("GCC unroll 16") for (int s = 0; s < kSets; s++) {
      _Pragma("GCC unroll 16") for (int t = 0; t < T; t++) acc[s][t] = _mm512_setzero_ps();
    }
    auto add_products = [&](int s, __m512 w, const float* at) __attribute__((always_inline)) {
      _Pragma("GCC unroll 16") for (int t = 0; t < T; t++) acc[s % kSets][t] =
          _mm512_fmadd_ps(w, _mm512_loadu_ps(at + t * stride), acc[s % kSets][t]);
    };
    for (int64_t k = 0; k < words; k++) {
      const uint64_t m = mask[k];
      const float* at = x + k * 64;
      _mm_prefetch(reinterpret_cast<const char*>(value) + 1024, _MM_HINT_T0);
      if (VALUE == SCT_F32) {
        _Pragma("GCC unroll 16") for (int s = 0; s < 4; s++) {
          const auto part = static_cast<__mmask16>(m >> 16 * s);
          add_products(s, _mm512_maskz_expand_ps(part, _mm512_loadu_ps(value)), at + 16 * s);
          value += 4 * _mm_popcnt_u32(part);
        }
      } else if (VALUE == SCT_BF16) {
        _Pragma("GCC unroll 16") for (int s = 0; s < 2; s++) {
          const auto part = static_cast<__mmask32>(m >> 32 * s);
          const __m512i w = _mm512_maskz_expand_epi16(part, _mm512_loadu_si512(value));
          add_products(2 * s, _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), at + 32 * s);
          add_products(2 * s + 1,
                       _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))),
                       at + 32 * s + 16);
          value += 2 * _mm_popcnt_u32(part);
        }
      } else {
        const __m512i w = _mm512_maskz_expand_epi8(m, _mm512_loadu_si512(value));
        const __m512i top = _mm512_set1_epi32(static_cast<int>(0xff000000u));
        add_products(0, _mm512_cvtepi32_ps(_mm512_slli_epi32(w, 24)), at);
        add_products(1, _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_slli_epi32(w, 16), top)), at + 16);
        add_products(2, _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_slli_epi32(w, 8), top)), at + 32);
        add_products(3, _mm512_cvtepi32_ps(_mm512_and_si512(w, top)), at + 48);
        value += _mm_popcnt_u64(m);
      }
    }
    _Pragma("GCC unroll 16") for (int t = 0; t < T; t++) {
      _Pragma("GCC unroll 16") for (int s = 1; s < kSets; s++) acc[0][t] = _mm512_add_ps(acc[0][t], acc[s][t]);
      sum[t] = _mm512_reduce_add_ps(acc[0][t]);
    }
  }
};

}  // namespace
