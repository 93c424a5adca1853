// Into and out of the packed activation layout [cols][tile]. Included once per instruction set.

namespace {

// 0 * x summed up is NaN exactly if some x is NaN or infinite.
bool not_finite(const float* x, int64_t n) {
  Simd::V a = Simd::zero(), b = Simd::zero();
  int64_t i = 0;
  for (; i + 2 * Simd::W <= n; i += 2 * Simd::W) {
    a = Simd::fma(Simd::load(x + i), Simd::zero(), a);
    b = Simd::fma(Simd::load(x + i + Simd::W), Simd::zero(), b);
  }
  float tail = 0;
  for (; i < n; i++) tail += x[i] * 0.0f;
  return tail != tail || Simd::any_nan(Simd::add(a, b));
}

bool pack_tile(const float* x, int64_t ldx, int64_t cols, int tokens, int tile, float* out) {
  constexpr int B = Simd::TB;
  const int lanes = (tokens + Simd::W - 1) / Simd::W * Simd::W;
  bool odd = false;
  for (int t = 0; t < tokens; t++) odd |= not_finite(x + t * ldx, cols);
  int t = 0;
  for (; t + B <= tokens; t += B) {
    const float* row = x + t * ldx;
    int64_t k = 0;
    for (; k + B <= cols; k += B) Simd::transpose(row + k, ldx, out + k * tile + t, tile);
    for (; k < cols; k++)
      for (int i = 0; i < B; i++) out[k * tile + t + i] = row[i * ldx + k];
  }
  if (t < lanes)
    for (int64_t k = 0; k < cols; k++)
      for (int i = t; i < lanes; i++) out[k * tile + i] = i < tokens ? x[i * ldx + k] : 0.0f;
  return odd;
}

void unpack_tile(float* y, int64_t rows, int tile, int tokens, int activation, float* out, int64_t ldy) {
  constexpr int B = Simd::TB;
  constexpr int kAhead = 64;  // floats; the rows of `out` are far apart and each starts a new page
  if (activation != SCT_NONE) {
    const int lanes = (tokens + Simd::W - 1) / Simd::W * Simd::W;
    for (int64_t r = 0; r < rows; r++) activate_array(y + r * tile, lanes, activation);
  }
  int t = 0;
  for (; t + B <= tokens; t += B) {
    int64_t r = 0;
    for (; r + B <= rows; r += B) {
      float* to = out + t * ldy + r;
      if (r % 16 == 0)
        for (int i = 0; i < B; i++) Simd::prefetch(to + i * ldy + kAhead);
      Simd::transpose(y + r * tile + t, tile, to, ldy);
    }
    for (; r < rows; r++)
      for (int i = 0; i < B; i++) out[(t + i) * ldy + r] = y[r * tile + t + i];
  }
  for (; t < tokens; t++)
    for (int64_t r = 0; r < rows; r++) out[t * ldy + r] = y[r * tile + t];
}

}  // namespace
