// Expand in plain C++, for rows of a bitmask weight: a loop over the set bits.
#pragma once
#include <cstdint>

#include "../visit.h"

namespace {

template <int VALUE>
struct Expand {
  static constexpr float kScale = 1.0f;
  static constexpr int source(int lane) { return lane; }

  template <int T>
  static void row(const uint64_t* mask, int64_t words, const uint8_t* value, const float* x, int64_t stride,
                  float (&sum)[T]) {
    for (float& s : sum) s = 0;
    int64_t i = 0;
    for (int64_t k = 0; k < words; k++) {
      for (uint64_t m = mask[k]; m; m &= m - 1, i++) {
        const float w = secateur::stored_value(value, i, VALUE);
        const float* at = x + k * 64 + __builtin_ctzll(m);
        for (int t = 0; t < T; t++) sum[t] += w * at[t * stride];
      }
    }
  }
};

}  // namespace
