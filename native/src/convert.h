// Scalar conversions between float32 and the stored value types, for the packers and the portable kernels.
#pragma once
#include <cstdint>
#include <cstring>

namespace secateur {

// Rounds to nearest even; NaN stays NaN.
static inline uint16_t to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline float from_bf16(uint16_t h) {
  uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// Rounds to nearest even; numbers that are too large become infinite.
static inline uint16_t to_f16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  const uint32_t sign = u >> 16 & 0x8000, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);
  if (a < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    float magnitude;
    std::memcpy(&magnitude, &a, 4);
    magnitude += 0.5f;
    std::memcpy(&u, &magnitude, 4);
    return static_cast<uint16_t>(sign | (u & 0xffff));
  }
  return static_cast<uint16_t>(sign | ((a - 0x38000000u + 0xfff + (a >> 13 & 1)) >> 13));
}

static inline float from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 0x3ff;
  uint32_t u;
  float f;
  if (e == 0) {
    f = static_cast<float>(m) * 5.9604644775390625e-8f;  // 2^-24
    std::memcpy(&u, &f, 4);
    u |= sign;
  } else if (e == 31) {
    u = sign | 0x7f800000u | m << 13;
  } else {
    u = sign | (e + 112) << 23 | m << 13;
  }
  std::memcpy(&f, &u, 4);
  return f;
}

}  // namespace secateur
