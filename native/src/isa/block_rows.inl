// Block-sparse weight times few tokens (format "block"): the rows of a block lie side by side in a register (Rows),
// which is multiplied by one broadcast activation of each token.
#pragma once
#include "common.inl"
#include "vecmath.inl"

namespace {

template <int R, int VALUE, int T>
__attribute__((noinline)) void block_group(const uint16_t* column, const uint8_t* value, int64_t n, const float* x,
                                           float* sums) {
  using S = Rows<R>;
  constexpr int kSets = T >= 4 ? 1 : T == 2 ? 2 : 4;
  constexpr int kBytes = R * secateur::value_bytes(VALUE);
  typename S::V acc[kSets][T];
  SECATEUR_UNROLL
  for (int t = 0; t < T; t++) acc[0][t] = S::load(sums + t * R);
  SECATEUR_UNROLL
  for (int s = 1; s < kSets; s++) SECATEUR_UNROLL
  for (int t = 0; t < T; t++) acc[s][t] = S::zero();
  int64_t i = 0;
  for (; i + 4 <= n; i += 4, value += 4 * kBytes) {
    for (int line = 0; line < 4 * kBytes; line += 64) Simd::prefetch(value + kPrefetchBytes + line);
    SECATEUR_UNROLL
    for (int s = 0; s < 4; s++) {
      const typename S::V w = S::template stored<VALUE>(value + s * kBytes);
      const float* at = x + static_cast<size_t>(column[i + s]) * T;
      SECATEUR_UNROLL
      for (int t = 0; t < T; t++) acc[s % kSets][t] = S::fma_broadcast(w, at + t, acc[s % kSets][t]);
    }
  }
  for (; i < n; i++, value += kBytes) {
    const typename S::V w = S::template stored<VALUE>(value);
    const float* at = x + static_cast<size_t>(column[i]) * T;
    SECATEUR_UNROLL
    for (int t = 0; t < T; t++) acc[0][t] = S::fma_broadcast(w, at + t, acc[0][t]);
  }
  SECATEUR_UNROLL
  for (int s = 1; s < kSets; s++) SECATEUR_UNROLL
  for (int t = 0; t < T; t++) acc[0][t] = S::add(acc[0][t], acc[s][t]);
  SECATEUR_UNROLL
  for (int t = 0; t < T; t++) S::store(sums + t * R, acc[0][t]);
}

template <int R, int VALUE, int T>
void block_rows_pass(const uint8_t* blob, int64_t rb, const float* x, float* sums) {
  using secateur::section;
  const auto& h = *reinterpret_cast<const secateur::Header*>(blob);
  const secateur::BlockShape s(h);
  const int64_t groups = s.groups_in(rb);
  const auto* column = section<uint16_t>(blob, 1);
  const auto* value = section<uint8_t>(blob, 2);
  memset(sums, 0, sizeof(float) * groups * R * T);
  for (int64_t c = 0; c < s.chunks; c++) {
    const auto* start = section<uint32_t>(blob, 0) + s.first(rb, c);
    for (int64_t g = 0; g < groups; g++)
      block_group<R, VALUE, T>(column + start[g], value + int64_t{start[g]} * R * secateur::value_bytes(VALUE),
                               start[g + 1] - start[g], x + c * s.chunk * T, sums + g * R * T);
  }
}

template <int R, int VALUE>
void block_rows_wide(const uint8_t* blob, int64_t rb, const float* x, int width, float* sums) {
  switch (width) {
    case 1:
      return block_rows_pass<R, VALUE, 1>(blob, rb, x, sums);
    case 2:
      return block_rows_pass<R, VALUE, 2>(blob, rb, x, sums);
    case 4:
      return block_rows_pass<R, VALUE, 4>(blob, rb, x, sums);
    default:
      return block_rows_pass<R, VALUE, 8>(blob, rb, x, sums);
  }
}

template <int R>
void block_rows_valued(const uint8_t* blob, int64_t rb, const float* x, int width, float* sums) {
  switch (reinterpret_cast<const secateur::Header*>(blob)->value) {
    case SCT_F32:
      return block_rows_wide<R, SCT_F32>(blob, rb, x, width, sums);
    case SCT_BF16:
      return block_rows_wide<R, SCT_BF16>(blob, rb, x, width, sums);
    case SCT_F16:
      return block_rows_wide<R, SCT_F16>(blob, rb, x, width, sums);
    default:
      return block_rows_wide<R, SCT_I8>(blob, rb, x, width, sums);
  }
}

void block_rows(const uint8_t* blob, int64_t rb, const float* x, int width, int tokens, const float* bias,
                int activation, float* sums, float* y, int64_t ldy) {
  const auto& h = *reinterpret_cast<const secateur::Header*>(blob);
  const int64_t block = h.p[0], rows = secateur::BlockShape(h).rows_in(rb);
  const float* scale = h.value == SCT_I8 ? secateur::section<float>(blob, 3) + rb * h.p[2] : nullptr;
  if (block == 4)
    block_rows_valued<4>(blob, rb, x, width, sums);
  else
    block_rows_valued<8>(blob, rb, x, width, sums);
  for (int t = 0; t < tokens; t++) {
    float* out = y + t * ldy;
    for (int64_t r = 0; r < rows; r++) {
      const float sum = sums[(r / block * width + t) * block + r % block];
      out[r] = (scale ? sum * scale[r] : sum) + (bias ? bias[r] : 0.0f);
    }
    activate_array(out, rows, activation);
  }
}

}  // namespace
