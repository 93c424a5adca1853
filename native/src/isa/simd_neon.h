// Simd for NEON (AArch64): four floats in a register.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "../blob.h"

namespace {

struct Simd {
  using V = float32x4_t;
  static constexpr int W = 4, TB = 4, REGISTERS = 32, MOST_VECTORS = 8;

  static V zero() { return vdupq_n_f32(0.0f); }
  static V set1(float a) { return vdupq_n_f32(a); }
  static V load(const float* p) { return vld1q_f32(p); }
  static V load_once(const float* p) { return load(p); }
  static void store(float* p, V a) { vst1q_f32(p, a); }
  static V add(V a, V b) { return vaddq_f32(a, b); }
  static V sub(V a, V b) { return vsubq_f32(a, b); }
  static V mul(V a, V b) { return vmulq_f32(a, b); }
  static V div(V a, V b) { return vdivq_f32(a, b); }
  static V sqrt(V a) { return vsqrtq_f32(a); }
  static V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
  // Unlike fmax, max and min return NaN where either operand is NaN.
  static V max(V a, V b) { return vmaxq_f32(a, b); }
  static V min(V a, V b) { return vminq_f32(a, b); }
  static V round(V a) { return vrndnq_f32(a); }
  static V exp2_int(V a) {
    int32x4_t e = vaddq_s32(vcvtq_s32_f32(a), vdupq_n_s32(127));
    return vreinterpretq_f32_s32(vshlq_n_s32(e, 23));
  }
  static bool any_nan(V a) { return vminvq_u32(vceqq_f32(a, a)) == 0; }
  static void prefetch(const void* p) { __builtin_prefetch(p); }
  static void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

  struct Four {
    V v;
    template <int I>
    V lane() const {
      return vdupq_laneq_f32(v, I);
    }
  };
  static Four four_f32(const uint8_t* p) { return {vld1q_f32(reinterpret_cast<const float*>(p))}; }
  static Four four_bf16(const uint8_t* p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16))};
  }

  static constexpr int WIDE = 0;  // no larger transpose
  static constexpr bool WIDE_BACK = false;
  static void transpose(const float* src, int64_t lds, float* dst, int64_t ldd) {
    float32x4x2_t ab = vtrnq_f32(vld1q_f32(src), vld1q_f32(src + lds));
    float32x4x2_t cd = vtrnq_f32(vld1q_f32(src + 2 * lds), vld1q_f32(src + 3 * lds));
    vst1q_f32(dst, vcombine_f32(vget_low_f32(ab.val[0]), vget_low_f32(cd.val[0])));
    vst1q_f32(dst + ldd, vcombine_f32(vget_low_f32(ab.val[1]), vget_low_f32(cd.val[1])));
    vst1q_f32(dst + 2 * ldd, vcombine_f32(vget_high_f32(ab.val[0]), vget_high_f32(cd.val[0])));
    vst1q_f32(dst + 3 * ldd, vcombine_f32(vget_high_f32(ab.val[1]), vget_high_f32(cd.val[1])));
  }
};

// N rows of a block side by side. int8 values are not scaled here.
template <int N>
struct Rows;

template <>
struct Rows<4> {
  using V = float32x4_t;
  static V zero() { return vdupq_n_f32(0.0f); }
  static V add(V a, V b) { return vaddq_f32(a, b); }
  static V mul(V a, V b) { return vmulq_f32(a, b); }
  static V load(const float* p) { return vld1q_f32(p); }
  static V load_once(const float* p) { return load(p); }
  static void store(float* p, V a) { vst1q_f32(p, a); }
  static V fma_broadcast(V w, const float* x, V acc) { return vfmaq_n_f32(acc, w, *x); }
  template <int VALUE>
  static V stored(const uint8_t* p) {
    if (VALUE == SCT_F32) return vld1q_f32(reinterpret_cast<const float*>(p));
    if (VALUE == SCT_I8) {
      uint32_t q;
      std::memcpy(&q, p, 4);
      const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(q)));
      return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
    }
    const uint16x4_t h = vld1_u16(reinterpret_cast<const uint16_t*>(p));
    if (VALUE == SCT_F16) return vcvt_f32_f16(vreinterpret_f16_u16(h));
    return vreinterpretq_f32_u32(vshll_n_u16(h, 16));
  }
};

template <>
struct Rows<8> {
  using Half = Rows<4>;
  struct V {
    float32x4_t a, b;
  };
  static V zero() { return {Half::zero(), Half::zero()}; }
  static V add(V p, V q) { return {vaddq_f32(p.a, q.a), vaddq_f32(p.b, q.b)}; }
  static V mul(V p, V q) { return {vmulq_f32(p.a, q.a), vmulq_f32(p.b, q.b)}; }
  static V load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static void store(float* p, V v) {
    vst1q_f32(p, v.a);
    vst1q_f32(p + 4, v.b);
  }
  static V fma_broadcast(V w, const float* x, V acc) {
    return {Half::fma_broadcast(w.a, x, acc.a), Half::fma_broadcast(w.b, x, acc.b)};
  }
  template <int VALUE>
  static V stored(const uint8_t* p) {
    return {Half::stored<VALUE>(p), Half::stored<VALUE>(p + 4 * secateur::value_bytes(VALUE))};
  }
};

using Half = Simd;  // fewer lanes are no faster

}  // namespace
