// Converts weights to stored values, for the packers: scales of int8 rows, checks of ranges, bytes.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "blob.h"
#include "convert.h"

namespace secateur {

constexpr float kLargestF16 = 65504;
constexpr float kLargestI8 = 127;

inline bool arguments_are_valid(const float* weight, int64_t rows, int64_t cols, int64_t ld, const void* allocate) {
  return weight && allocate && rows >= 1 && cols >= 1 && ld >= cols && rows <= INT32_MAX && cols <= INT32_MAX;
}

// For int8, a scale for each row, so that the row's largest weight becomes 127; for other types, no scales. Returns
// false where a weight has no value in the type.
inline bool row_scales(const float* weight, int64_t rows, int64_t cols, int64_t ld, int value,
                       std::vector<float>& scales) {
  if (value != SCT_I8 && value != SCT_F16) return true;
  if (value == SCT_I8) scales.assign(rows, 0.0f);
  for (int64_t r = 0; r < rows; r++) {
    float most = 0;
    for (int64_t k = 0; k < cols; k++) {
      const float w = weight[r * ld + k];
      if (value == SCT_F16) {
        if (std::isfinite(w) && std::fabs(w) > kLargestF16) return false;
      } else if (!std::isfinite(w)) {
        return false;
      }
      most = std::max(most, std::fabs(w));
    }
    if (value == SCT_I8) scales[r] = most / kLargestI8;
  }
  return true;
}

inline int8_t to_i8(float w, float scale) {
  const float q = scale > 0 ? std::nearbyint(w / scale) : 0.0f;
  return static_cast<int8_t>(std::max(-kLargestI8, std::min(kLargestI8, q)));
}

inline void append_value(float w, int value, float scale, std::vector<uint8_t>& out) {
  uint8_t raw[4];
  if (value == SCT_F32) {
    std::memcpy(raw, &w, 4);
  } else if (value == SCT_I8) {
    raw[0] = static_cast<uint8_t>(to_i8(w, scale));
  } else {
    const uint16_t h = value == SCT_BF16 ? to_bf16(w) : to_f16(w);
    std::memcpy(raw, &h, 2);
  }
  out.insert(out.end(), raw, raw + value_bytes(value));
}

}  // namespace secateur
