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

// The first tokens in bands of S::WIDE, if it has a wide transpose; says how many went, and whether one was not finite.
template <class S>
int pack_bands(const float* x, int64_t ldx, int64_t cols, int tokens, int tile, float* out, bool& odd) {
  constexpr int kAhead = 3 * S::WIDE;  // floats; more rows are read side by side than the processor itself runs ahead of
  int t = 0;
  if constexpr (S::WIDE > 0) {
    for (; t + S::WIDE <= tokens; t += S::WIDE) {
      const float* row = x + t * ldx;
      typename S::V sum = S::zero();
      float tail = 0;
      int64_t k = 0;
      for (; k + S::WIDE <= cols; k += S::WIDE) {
        for (int i = 0; i < S::WIDE; i++) S::prefetch(row + i * ldx + k + kAhead);
        sum = S::transpose_wide(row + k, ldx, out + k * tile + t, tile, sum);
      }
      for (; k < cols; k++)
        for (int i = 0; i < S::WIDE; i++) tail += 0.0f * (out[k * tile + t + i] = row[i * ldx + k]);
      odd |= tail != tail || S::any_nan(sum);
    }
  }
  return t;
}

bool pack_tile(const float* x, int64_t ldx, int64_t cols, int tokens, int tile, float* out) {
  constexpr int B = Simd::TB;
  const int lanes = (tokens + Simd::W - 1) / Simd::W * Simd::W;
  bool odd = false;
  int t = pack_bands<Simd>(x, ldx, cols, tokens, tile, out, odd);
  for (int i = t; i < tokens; i++) odd |= not_finite(x + i * ldx, cols);
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

template <class S>
int unpack_bands(const float* y, int64_t rows, int tile, int tokens, float* out, int64_t ldy) {
  int t = 0;
  if constexpr (S::WIDE_BACK) {
    for (; t + S::WIDE <= tokens; t += S::WIDE) {
      int64_t r = 0;
      for (; r + S::WIDE <= rows; r += S::WIDE)
        S::transpose_wide(y + r * tile + t, tile, out + t * ldy + r, ldy, S::zero());
      for (; r < rows; r++)
        for (int i = 0; i < S::WIDE; i++) out[(t + i) * ldy + r] = y[r * tile + t + i];
    }
  }
  return t;
}

void unpack_tile(float* y, int64_t rows, int tile, int tokens, int activation, float* out, int64_t ldy) {
  constexpr int B = Simd::TB;
  constexpr int kAhead = 64;  // floats; the rows of `out` are far apart and each starts a new page
  if (activation != SCT_NONE) {
    const int lanes = (tokens + Simd::W - 1) / Simd::W * Simd::W;
    if (lanes == tile) activate_array(y, rows * tile, activation);
    for (int64_t r = 0; r < rows && lanes < tile; r++) activate_array(y + r * tile, lanes, activation);
  }
  int t = unpack_bands<Simd>(y, rows, tile, tokens, out, ldy);
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
