// Gate, residual, norm and activation of the outputs of a linear layer, for single tokens and for tiles.
#pragma once
#include "common.inl"
#include "vecmath.inl"

namespace {

// y * gate + residual, then LayerNorm or RMSNorm over the n numbers of one token, in place.
void finish(float* y, int64_t n, const float* gate, const float* residual, int norm, const float* scale,
            const float* shift, float epsilon) {
  const int64_t whole = n / Simd::W * Simd::W;
  if (gate) {
    for (int64_t i = 0; i < whole; i += Simd::W) Simd::store(y + i, Simd::mul(Simd::load(y + i), Simd::load(gate + i)));
    for (int64_t i = whole; i < n; i++) y[i] *= gate[i];
  }
  if (residual) {
    for (int64_t i = 0; i < whole; i += Simd::W)
      Simd::store(y + i, Simd::add(Simd::load(y + i), Simd::load(residual + i)));
    for (int64_t i = whole; i < n; i++) y[i] += residual[i];
  }
  if (norm == SCT_NO_NORM) return;
  float mean = 0;
  if (norm == SCT_LAYER_NORM) {
    Simd::V a = Simd::zero();
    for (int64_t i = 0; i < whole; i += Simd::W) a = Simd::add(a, Simd::load(y + i));
    for (int64_t i = whole; i < n; i++) mean += y[i];
    mean = (mean + sum_of(a)) / static_cast<float>(n);
  }
  const Simd::V m = Simd::set1(mean);
  Simd::V a = Simd::zero();
  float square = 0;
  for (int64_t i = 0; i < whole; i += Simd::W) {
    const Simd::V d = Simd::sub(Simd::load(y + i), m);
    a = Simd::fma(d, d, a);
  }
  for (int64_t i = whole; i < n; i++) square += (y[i] - mean) * (y[i] - mean);
  const float factor = 1.0f / std::sqrt((square + sum_of(a)) / static_cast<float>(n) + epsilon);
  const Simd::V f = Simd::set1(factor);
  for (int64_t i = 0; i < whole; i += Simd::W) {
    Simd::V v = Simd::mul(Simd::sub(Simd::load(y + i), m), f);
    if (scale) v = Simd::mul(v, Simd::load(scale + i));
    if (shift) v = Simd::add(v, Simd::load(shift + i));
    Simd::store(y + i, v);
  }
  for (int64_t i = whole; i < n; i++) {
    float v = (y[i] - mean) * factor;
    if (scale) v *= scale[i];
    if (shift) v += shift[i];
    y[i] = v;
  }
}

// out = norm(y + residual) for N vectors of tokens of y[n][tile]. Returns whether a sum is NaN or infinite.
template <int N>
bool norm_band(const float* y, const float* residual, int64_t n, int tile, int norm, const float* scale,
               const float* shift, float epsilon, float* out) {
  Simd::V sum[N], square[N], nan_check = Simd::zero();
  for (int v = 0; v < N; v++) sum[v] = square[v] = Simd::zero();
  for (int64_t i = 0; i < n; i++)
    for (int v = 0; v < N; v++) {
      const int64_t at = i * tile + v * Simd::W;
      Simd::V a = Simd::load(y + at);
      if (residual) a = Simd::add(a, Simd::load(residual + at));
      if (residual || y != out) Simd::store(out + at, a);
      sum[v] = Simd::add(sum[v], a);
    }
  const Simd::V share = Simd::set1(1.0f / static_cast<float>(n));
  for (int v = 0; v < N; v++) nan_check = Simd::fma(sum[v], Simd::zero(), nan_check);
  if (norm == SCT_NO_NORM) return Simd::any_nan(nan_check);
  for (int v = 0; v < N; v++) sum[v] = norm == SCT_LAYER_NORM ? Simd::mul(sum[v], share) : Simd::zero();
  for (int64_t i = 0; i < n; i++)
    for (int v = 0; v < N; v++) {
      const Simd::V d = Simd::sub(Simd::load(out + i * tile + v * Simd::W), sum[v]);
      square[v] = Simd::fma(d, d, square[v]);
    }
  for (int v = 0; v < N; v++) {
    nan_check = Simd::fma(square[v], Simd::zero(), nan_check);
    square[v] = Simd::div(Simd::set1(1.0f), Simd::sqrt(Simd::fma(square[v], share, Simd::set1(epsilon))));
  }
  for (int64_t i = 0; i < n; i++) {
    const Simd::V a = Simd::set1(scale ? scale[i] : 1.0f), b = Simd::set1(shift ? shift[i] : 0.0f);
    for (int v = 0; v < N; v++) {
      float* to = out + i * tile + v * Simd::W;
      Simd::store(to, Simd::fma(Simd::mul(Simd::sub(Simd::load(to), sum[v]), square[v]), a, b));
    }
  }
  return Simd::any_nan(nan_check);
}

bool norm_tile(const float* y, const float* residual, int64_t n, int tile, int tokens, int norm, const float* scale,
               const float* shift, float epsilon, float* out) {
  bool not_finite = false;
  int t = 0;
  auto band = [&](auto function, int vectors) {
    for (; t + (vectors - 1) * Simd::W < tokens; t += vectors * Simd::W)
      not_finite |= function(y + t, residual ? residual + t : nullptr, n, tile, norm, scale, shift, epsilon, out + t);
  };
  band(norm_band<4>, 4);
  band(norm_band<1>, 1);
  return not_finite;
}

// Applies an activation to y[rows][tile] in place. Returns whether a result is NaN or infinite.
bool activate_tile(float* y, int64_t rows, int tile, int tokens, int activation) {
  Simd::V nan_check = Simd::zero();
  const bool whole = tokens > tile - Simd::W;  // rows then follow each other without gaps
  const int64_t n = whole ? rows * tile : tokens;
  for (int64_t r = 0; r < (whole ? 1 : rows); r++, y += tile) {
    int64_t t = 0;
    for (; t + Twice::W <= n; t += Twice::W) {
      const Twice::V both = activate_v<Twice>(Twice::load(y + t), activation);
      Twice::store(y + t, both);
      nan_check = Simd::fma(both.b, Simd::zero(), Simd::fma(both.a, Simd::zero(), nan_check));
    }
    for (; t < n; t += Simd::W) {
      const Simd::V activated = activate_v<Simd>(Simd::load(y + t), activation);
      Simd::store(y + t, activated);
      nan_check = Simd::fma(activated, Simd::zero(), nan_check);
    }
  }
  return Simd::any_nan(nan_check);
}

}  // namespace
