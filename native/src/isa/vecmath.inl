// Activations on vectors. Included once per instruction set, after its Simd.

namespace {

// e^x to about 1e-7 relative: x = n ln 2 + r, a degree-6 polynomial in r, exponent bits for 2^n.
inline Simd::V exp_v(Simd::V x) {
  using S = Simd;
  // min/max keep their second operand when it is NaN, so that NaN passes through.
  S::V c = S::max(S::set1(-87.0f), S::min(S::set1(88.0f), x));
  S::V n = S::round(S::mul(c, S::set1(1.44269504f)));
  S::V r = S::fma(n, S::set1(-0.693359375f), c);
  r = S::fma(n, S::set1(2.12194440e-4f), r);
  S::V p = S::set1(1.0f / 720);
  p = S::fma(p, r, S::set1(1.0f / 120));
  p = S::fma(p, r, S::set1(1.0f / 24));
  p = S::fma(p, r, S::set1(1.0f / 6));
  p = S::fma(p, r, S::set1(0.5f));
  p = S::fma(p, r, S::set1(1.0f));
  p = S::fma(p, r, S::set1(1.0f));
  // NaN has no exponent; p is NaN then and any finite factor will do.
  S::V m = S::max(S::set1(-126.0f), S::min(n, S::set1(127.0f)));
  return S::mul(p, S::exp2_int(m));
}

// x P(x^2) / Q(x^2) on [-3.9, 3.9]; coefficients fitted by reweighted least squares, P made larger by 1.2e-7 so that the
// ends round to one, as they must where GELU multiplies 1 + erf by a large number. |error| < 4e-7 in float32.
inline Simd::V erf_v(Simd::V x) {
  using S = Simd;
  // min/max keep their second operand when it is NaN, so that NaN passes through.
  const S::V c = S::max(S::set1(-3.9f), S::min(S::set1(3.9f), x)), z = S::mul(c, c);
  S::V p = S::set1(2.066462941e-06f);
  p = S::fma(p, z, S::set1(2.850629657e-04f));
  p = S::fma(p, z, S::set1(3.738388334e-03f));
  p = S::fma(p, z, S::set1(5.266821598e-02f));
  p = S::fma(p, z, S::set1(1.896678520e-01f));
  p = S::fma(p, z, S::set1(1.128379283e+00f));
  S::V q = S::set1(3.826994984e-05f);
  q = S::fma(q, z, S::set1(1.157385948e-03f));
  q = S::fma(q, z, S::set1(1.491436043e-02f));
  q = S::fma(q, z, S::set1(1.138193682e-01f));
  q = S::fma(q, z, S::set1(5.014215186e-01f));
  q = S::fma(q, z, S::set1(1.0f));
  return S::max(S::set1(-1.0f), S::min(S::set1(1.0f), S::div(S::mul(c, p), q)));
}

inline Simd::V sigmoid_v(Simd::V x) {
  using S = Simd;
  return S::div(S::set1(1.0f), S::add(S::set1(1.0f), exp_v(S::sub(S::zero(), x))));
}

inline Simd::V activate_v(Simd::V x, int activation) {
  using S = Simd;
  switch (activation) {
    case SCT_RELU:
      return S::max(S::zero(), x);
    case SCT_GELU: {
      S::V h = S::mul(x, S::set1(0.5f));
      return S::fma(h, erf_v(S::mul(x, S::set1(0.70710678f))), h);
    }
    case SCT_GELU_TANH: {
      // 0.5 (1 + tanh u) = sigmoid(2 u)
      S::V u = S::mul(x, S::fma(S::mul(x, x), S::set1(0.0713548162726f), S::set1(1.59576912161f)));
      return S::mul(x, sigmoid_v(u));
    }
    case SCT_SILU:
      return S::mul(x, sigmoid_v(x));
    default:
      return x;
  }
}

inline void activate_array(float* y, int64_t n, int activation) {
  if (activation == SCT_NONE) return;
  int64_t i = 0;
  for (; i + Simd::W <= n; i += Simd::W) Simd::store(y + i, activate_v(Simd::load(y + i), activation));
  if (i < n) {
    float tail[Simd::W] = {};
    for (int64_t j = i; j < n; j++) tail[j - i] = y[j];
    Simd::store(tail, activate_v(Simd::load(tail), activation));
    for (int64_t j = i; j < n; j++) y[j] = tail[j - i];
  }
}

}  // namespace
