// Packs activations for the kernels: into tiles [cols][tile] for many tokens, into columns [cols][width] for few
// tokens; and unpacks tiles of outputs.
#pragma once
#include "common.inl"
#include "vecmath.inl"

namespace {

// Rows that lie a multiple of 4 KiB apart share one set of the L1 cache, which holds fewer lines than a transpose
// touches. Such rows are first copied, kStrip columns at a time, to a strip in which they do not share a set.
constexpr int kStrip = 256;
constexpr int kStripLd = kStrip + 16;
bool share_a_set(int64_t ld) { return ld % 1024 == 0; }

void copy_rows(const float* from, int64_t ld_from, int rows, float* to, int64_t ld_to) {
  for (int i = 0; i < rows; i++)
    for (int c = 0; c < kStrip; c += Simd::W) Simd::store(to + i * ld_to + c, Simd::load(from + i * ld_from + c));
}

// Packs the first tokens in bands of S::WIDE, if S has a wide transpose. Returns how many tokens it packed; sets
// not_finite if one of their numbers is NaN or infinite.
template <class S>
int pack_bands(const float* x, int64_t ldx, int64_t cols, int tokens, int tile, float* out, bool& not_finite) {
  constexpr int kAhead = 3 * S::WIDE;  // floats; more rows are read side by side than the hardware prefetcher follows
  int t = 0;
  if constexpr (S::WIDE > 0) {
    for (; t + S::WIDE <= tokens; t += S::WIDE) {
      const float* row = x + t * ldx;
      typename S::V sum = S::zero();
      float tail = 0;
      int64_t k = 0;
      if (share_a_set(ldx)) {
        alignas(64) float strip[S::WIDE * kStripLd];
        for (; k + kStrip <= cols; k += kStrip) {
          copy_rows(row + k, ldx, S::WIDE, strip, kStripLd);
          for (int c = 0; c < kStrip; c += S::WIDE)
            sum = S::transpose_wide(strip + c, kStripLd, out + (k + c) * tile + t, tile, sum);
        }
      }
      for (; k + S::WIDE <= cols; k += S::WIDE) {
        for (int i = 0; i < S::WIDE; i++) S::prefetch(row + i * ldx + k + kAhead);
        sum = S::transpose_wide(row + k, ldx, out + k * tile + t, tile, sum);
      }
      for (; k < cols; k++)
        for (int i = 0; i < S::WIDE; i++) tail += 0.0f * (out[k * tile + t + i] = row[i * ldx + k]);
      not_finite |= tail != tail || S::any_nan(sum);
    }
  }
  return t;
}

bool pack_tile(const float* x, int64_t ldx, int64_t cols, int tokens, int tile, float* out) {
  constexpr int B = Simd::TB;
  const int lanes = (tokens + Simd::W - 1) / Simd::W * Simd::W;
  bool not_finite = false;
  int t = pack_bands<Simd>(x, ldx, cols, tokens, tile, out, not_finite);
  for (int i = t; i < tokens; i++) not_finite |= any_not_finite(x + i * ldx, cols);
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
  return not_finite;
}

template <class S>
struct Wide {
  static constexpr int kTokens = S::WIDE_BACK ? S::WIDE : 0;
  static void transpose(const float* y, int tile, float* out, int64_t ldy) {
    S::transpose_wide(y, tile, out, ldy, S::zero());
  }
};
template <class S>
struct Narrow {
  static constexpr int kTokens = S::TB;
  static void transpose(const float* y, int tile, float* out, int64_t ldy) { S::transpose(y, tile, out, ldy); }
};

// Unpacks tokens from t on in whole bands of B::kTokens. Returns the first token that is left.
template <class B>
int unpack_bands(const float* y, int64_t rows, int tile, int t, int tokens, float* out, int64_t ldy) {
  constexpr int N = B::kTokens;
  constexpr int kAhead = 64;  // floats; the rows of `out` are far apart, each on another page
  if constexpr (N > 0) {
    for (; t + N <= tokens; t += N) {
      int64_t r = 0;
      if (share_a_set(ldy)) {
        alignas(64) float strip[N * kStripLd];
        for (; r + kStrip <= rows; r += kStrip) {
          for (int c = 0; c < kStrip; c += N) B::transpose(y + (r + c) * tile + t, tile, strip + c, kStripLd);
          copy_rows(strip, kStripLd, N, out + t * ldy + r, ldy);
        }
      }
      for (; r + N <= rows; r += N) {
        float* to = out + t * ldy + r;
        if (N < 16 && r % 16 == 0)
          for (int i = 0; i < N; i++) Simd::prefetch(to + i * ldy + kAhead);
        B::transpose(y + r * tile + t, tile, to, ldy);
      }
      for (; r < rows; r++)
        for (int i = 0; i < N; i++) out[(t + i) * ldy + r] = y[r * tile + t + i];
    }
  }
  return t;
}

void unpack_tile(float* y, int64_t rows, int tile, int tokens, int activation, float* out, int64_t ldy) {
  if (activation != SCT_NONE) {
    const int lanes = (tokens + Simd::W - 1) / Simd::W * Simd::W;
    if (lanes == tile) activate_array(y, rows * tile, activation);
    for (int64_t r = 0; r < rows && lanes < tile; r++) activate_array(y + r * tile, lanes, activation);
  }
  int t = unpack_bands<Wide<Simd>>(y, rows, tile, 0, tokens, out, ldy);
  t = unpack_bands<Narrow<Simd>>(y, rows, tile, t, tokens, out, ldy);
  for (; t < tokens; t++)
    for (int64_t r = 0; r < rows; r++) out[t * ldy + r] = y[r * tile + t];
}

// x column by column, [cols][width], with zeros for tokens that do not exist. Returns whether x holds NaN or infinity.
bool pack_columns(const float* x, int64_t ldx, int64_t cols, int tokens, int width, float* out) {
  bool not_finite = false;
  for (int t = 0; t < tokens; t++) not_finite |= any_not_finite(x + t * ldx, cols);
  int64_t k = 0;
  if (width == Simd::TB && tokens == width)
    for (; k + Simd::TB <= cols; k += Simd::TB) Simd::transpose(x + k, ldx, out + k * width, width);
  for (; k < cols; k++)
    for (int t = 0; t < width; t++) out[k * width + t] = t < tokens ? x[t * ldx + k] : 0.0f;
  return not_finite;
}

}  // namespace
