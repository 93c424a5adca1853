// Expand for AVX2, for rows of a bitmask weight: a table of permutations, one for each mask of eight columns, puts
// nonzeros into their lanes.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "simd_avx_common.h"

namespace {

// For each mask of eight columns and each lane, the index of its value among the next values; the sign bit is set where
// a lane has no value.
struct LaneTable {
  alignas(64) uint32_t lane[256][8];
  constexpr LaneTable() : lane() {
    for (int m = 0; m < 256; m++) {
      uint32_t next = 0;
      for (int i = 0; i < 8; i++) lane[m][i] = m >> i & 1 ? next++ : 0x80000000u;
    }
  }
};
constexpr LaneTable kLanes;

template <int VALUE>
struct Expand {
  static constexpr float kScale = 1.0f;
  static constexpr int source(int lane) { return lane; }

  template <int T>
  static void row(const uint64_t* mask, int64_t words, const uint8_t* value, const float* x, int64_t stride,
                  float (&sum)[T]) {
    constexpr int kSets = T >= 4 ? 1 : T == 2 ? 2 : 4;
    __m256 acc[kSets][T];
    _Pragma("GCC unroll 16") for (int s = 0; s < kSets; s++) {
      _Pragma("GCC unroll 16") for (int t = 0; t < T; t++) acc[s][t] = _mm256_setzero_ps();
    }
    for (int64_t k = 0; k < words; k++) {
      const uint64_t m = mask[k];
      _mm_prefetch(reinterpret_cast<const char*>(value) + 1024, _MM_HINT_T0);
      _Pragma("GCC unroll 16") for (int s = 0; s < 8; s++) {
        const auto part = static_cast<uint32_t>(m >> 8 * s & 255);
        const __m256i lane = _mm256_load_si256(reinterpret_cast<const __m256i*>(kLanes.lane[part]));
        const __m256 next = Rows<8>::template stored<VALUE>(value);
        const __m256 w =
            _mm256_blendv_ps(_mm256_permutevar8x32_ps(next, lane), _mm256_setzero_ps(), _mm256_castsi256_ps(lane));
        const float* at = x + k * 64 + 8 * s;
        _Pragma("GCC unroll 16") for (int t = 0; t < T; t++) acc[s % kSets][t] =
            _mm256_fmadd_ps(w, _mm256_loadu_ps(at + t * stride), acc[s % kSets][t]);
        value += secateur::value_bytes(VALUE) * _mm_popcnt_u32(part);
      }
    }
    _Pragma("GCC unroll 16") for (int t = 0; t < T; t++) {
      _Pragma("GCC unroll 16") for (int s = 1; s < kSets; s++) acc[0][t] = _mm256_add_ps(acc[0][t], acc[s][t]);
      float lanes[8];
      _mm256_storeu_ps(lanes, acc[0][t]);
      sum[t] = 0;
      for (float lane : lanes) sum[t] += lane;
    }
  }
};

}  // namespace
