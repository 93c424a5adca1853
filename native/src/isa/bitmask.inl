// Unstructured weight times few tokens (format "bitmask"). Expand, which every instruction set brings, puts the
// nonzeros of 64 columns into their lanes and multiplies them by the activations of each token.
#pragma once
#include "common.inl"
#include "vecmath.inl"

namespace {

template <int VALUE, int T>
void bitmask_pass(const uint8_t* blob, int64_t begin, int64_t end, const float* x, const float* bias, float* y,
                  int64_t ldy, int tokens) {
  using secateur::section;
  const auto& h = *reinterpret_cast<const secateur::Header*>(blob);
  const int64_t words = secateur::ceil_div(h.cols, secateur::kBitmaskColumns);
  const int64_t stride = words * secateur::kBitmaskColumns;
  const uint64_t* mask = section<uint64_t>(blob, 1) + begin * words;
  for (int64_t r = begin; r < end; r++, mask += words) {
    const uint8_t* value = section<uint8_t>(blob, 2) + section<uint64_t>(blob, 0)[r] * secateur::value_bytes(VALUE);
    float sum[T];
    Expand<VALUE>::template row<T>(mask, words, value, x, stride, sum);
    const float scale = VALUE == SCT_I8 ? section<float>(blob, 3)[r] * Expand<VALUE>::kScale : 1.0f;
    for (int t = 0; t < tokens; t++) y[t * ldy + r - begin] = sum[t] * scale + (bias ? bias[r - begin] : 0.0f);
  }
}

template <int VALUE>
void bitmask_wide(const uint8_t* blob, int64_t begin, int64_t end, const float* x, int width, int tokens,
                  const float* bias, float* y, int64_t ldy) {
  switch (width) {
    case 1:
      return bitmask_pass<VALUE, 1>(blob, begin, end, x, bias, y, ldy, tokens);
    case 2:
      return bitmask_pass<VALUE, 2>(blob, begin, end, x, bias, y, ldy, tokens);
    case 4:
      return bitmask_pass<VALUE, 4>(blob, begin, end, x, bias, y, ldy, tokens);
    default:
      return bitmask_pass<VALUE, 8>(blob, begin, end, x, bias, y, ldy, tokens);
  }
}

void bitmask_rows(const uint8_t* blob, int64_t begin, int64_t end, const float* x, int width, int tokens,
                  const float* bias, int activation, float* y, int64_t ldy) {
  switch (reinterpret_cast<const secateur::Header*>(blob)->value) {
    case SCT_F32:
      bitmask_wide<SCT_F32>(blob, begin, end, x, width, tokens, bias, y, ldy);
      break;
    case SCT_BF16:
      bitmask_wide<SCT_BF16>(blob, begin, end, x, width, tokens, bias, y, ldy);
      break;
    default:
      bitmask_wide<SCT_I8>(blob, begin, end, x, width, tokens, bias, y, ldy);
  }
  for (int t = 0; t < tokens; t++) activate_array(y + t * ldy, end - begin, activation);
}

template <int VALUE>
void pack_masked_valued(const float* x, int64_t cols, int64_t padded, float* out) {
  int64_t k = 0;
  for (; k + 64 <= cols; k += 64)
    for (int i = 0; i < 64; i++) out[k + i] = x[k + Expand<VALUE>::source(i)];
  if (k < padded) {
    float tail[64] = {};
    for (int64_t i = k; i < cols; i++) tail[i - k] = x[i];
    for (int i = 0; i < 64; i++) out[k + i] = tail[Expand<VALUE>::source(i)];
  }
}

bool pack_masked(const float* x, int64_t ldx, int64_t cols, int tokens, int width, uint32_t value, float* out) {
  const int64_t padded = secateur::round_up(cols, secateur::kBitmaskColumns);
  bool not_finite = false;
  for (int t = 0; t < width; t++) {
    float* to = out + t * padded;
    if (t >= tokens) {
      memset(to, 0, sizeof(float) * padded);
      continue;
    }
    not_finite |= any_not_finite(x + t * ldx, cols);
    if (value == SCT_F32)
      pack_masked_valued<SCT_F32>(x + t * ldx, cols, padded, to);
    else if (value == SCT_BF16)
      pack_masked_valued<SCT_BF16>(x + t * ldx, cols, padded, to);
    else
      pack_masked_valued<SCT_I8>(x + t * ldx, cols, padded, to);
  }
  return not_finite;
}

}  // namespace
