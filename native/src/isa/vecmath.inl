// exp, erf and the activations of a layer on vectors.
#pragma once
#include "common.inl"

namespace {

// Two vectors side by side: they share the loads of constants, and one computes while the other waits.
struct Twice {
  struct V {
    Simd::V a, b;
  };
  static constexpr int W = 2 * Simd::W;

  static V zero() { return {Simd::zero(), Simd::zero()}; }
  static V set1(float x) { return {Simd::set1(x), Simd::set1(x)}; }
  static V load(const float* p) { return {Simd::load(p), Simd::load(p + Simd::W)}; }
  static void store(float* p, V x) { Simd::store(p, x.a), Simd::store(p + Simd::W, x.b); }
  static V add(V x, V y) { return {Simd::add(x.a, y.a), Simd::add(x.b, y.b)}; }
  static V sub(V x, V y) { return {Simd::sub(x.a, y.a), Simd::sub(x.b, y.b)}; }
  static V mul(V x, V y) { return {Simd::mul(x.a, y.a), Simd::mul(x.b, y.b)}; }
  static V div(V x, V y) { return {Simd::div(x.a, y.a), Simd::div(x.b, y.b)}; }
  static V fma(V x, V y, V z) { return {Simd::fma(x.a, y.a, z.a), Simd::fma(x.b, y.b, z.b)}; }
  static V max(V x, V y) { return {Simd::max(x.a, y.a), Simd::max(x.b, y.b)}; }
  static V min(V x, V y) { return {Simd::min(x.a, y.a), Simd::min(x.b, y.b)}; }
  static V round(V x) { return {Simd::round(x.a), Simd::round(x.b)}; }
  static V exp2_int(V x) { return {Simd::exp2_int(x.a), Simd::exp2_int(x.b)}; }
};

// e^x with a relative error of at most 2e-7: x = n ln 2 + r; a polynomial in r that is 1 at 0, fitted by reweighted
// least squares to a small largest relative error; 2^n by exponent bits.
template <class S>
inline typename S::V exp_v(typename S::V x) {
  // min and max return their second operand where it is NaN, so NaN passes through.
  typename S::V c = S::max(S::set1(-87.0f), S::min(S::set1(88.0f), x));
  typename S::V n = S::round(S::mul(c, S::set1(1.44269504f)));
  typename S::V r = S::fma(n, S::set1(-0.693359375f), c);
  r = S::fma(n, S::set1(2.12194440e-4f), r);
  typename S::V p = S::set1(8.29028905e-3f);
  p = S::fma(p, r, S::set1(4.18979491e-2f));
  p = S::fma(p, r, S::set1(1.66676366e-1f));
  p = S::fma(p, r, S::set1(4.99991494e-1f));
  p = S::fma(p, r, S::set1(9.99999707e-1f));
  p = S::fma(p, r, S::set1(1.0f));
  return S::mul(p, S::exp2_int(n));
}

// erf as x P(x^2) / Q(x^2) on [-3.9, 3.9], with an absolute error below 4e-7 in float32. The coefficients are fitted by
// reweighted least squares. P is scaled up by 1.2e-7, so that the ends round to one: GELU multiplies 1 + erf by large
// numbers.
template <class S>
inline typename S::V erf_v(typename S::V x) {
  // min and max return their second operand where it is NaN, so NaN passes through.
  const typename S::V c = S::max(S::set1(-3.9f), S::min(S::set1(3.9f), x)), z = S::mul(c, c);
  typename S::V p = S::set1(2.066462941e-06f);
  p = S::fma(p, z, S::set1(2.850629657e-04f));
  p = S::fma(p, z, S::set1(3.738388334e-03f));
  p = S::fma(p, z, S::set1(5.266821598e-02f));
  p = S::fma(p, z, S::set1(1.896678520e-01f));
  p = S::fma(p, z, S::set1(1.128379283e+00f));
  typename S::V q = S::set1(3.826994984e-05f);
  q = S::fma(q, z, S::set1(1.157385948e-03f));
  q = S::fma(q, z, S::set1(1.491436043e-02f));
  q = S::fma(q, z, S::set1(1.138193682e-01f));
  q = S::fma(q, z, S::set1(5.014215186e-01f));
  q = S::fma(q, z, S::set1(1.0f));
  return S::max(S::set1(-1.0f), S::min(S::set1(1.0f), S::div(S::mul(c, p), q)));
}

template <class S>
inline typename S::V sigmoid_v(typename S::V x) {
  return S::div(S::set1(1.0f), S::add(S::set1(1.0f), exp_v<S>(S::sub(S::zero(), x))));
}

template <class S>
inline typename S::V activate_v(typename S::V x, int activation) {
  switch (activation) {
    case SCT_RELU:
      return S::max(S::zero(), x);
    case SCT_GELU: {
      typename S::V h = S::mul(x, S::set1(0.5f));
      return S::fma(h, erf_v<S>(S::mul(x, S::set1(0.70710678f))), h);
    }
    case SCT_GELU_TANH: {
      // 0.5 (1 + tanh u) = sigmoid(2 u)
      typename S::V u = S::mul(x, S::fma(S::mul(x, x), S::set1(0.0713548162726f), S::set1(1.59576912161f)));
      return S::mul(x, sigmoid_v<S>(u));
    }
    case SCT_SILU:
      return S::mul(x, sigmoid_v<S>(x));
    default:
      return x;
  }
}

inline void activate_array(float* y, int64_t n, int activation) {
  if (activation == SCT_NONE) return;
  int64_t i = 0;
  for (; i + Twice::W <= n; i += Twice::W) Twice::store(y + i, activate_v<Twice>(Twice::load(y + i), activation));
  for (; i + Simd::W <= n; i += Simd::W) Simd::store(y + i, activate_v<Simd>(Simd::load(y + i), activation));
  if (i < n) {
    float tail[Simd::W] = {};
    for (int64_t j = i; j < n; j++) tail[j - i] = y[j];
    Simd::store(tail, activate_v<Simd>(Simd::load(tail), activation));
    for (int64_t j = i; j < n; j++) y[j] = tail[j - i];
  }
}

}  // namespace
