// What follows a linear layer, one token at a time. Included once per instruction set.

namespace {

inline float sum_of(Simd::V v) {
  float lanes[Simd::W], sum = 0;
  Simd::store(lanes, v);
  for (float lane : lanes) sum += lane;
  return sum;
}

// y + residual, then LayerNorm or RMSNorm over the n numbers, in place.
void finish(float* y, int64_t n, const float* residual, int norm, const float* scale, const float* shift,
            float epsilon) {
  const int64_t whole = n / Simd::W * Simd::W;
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

}  // namespace
