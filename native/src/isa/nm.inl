// N:M weight times few tokens (format "nm"): sixteen rows lie side by side in a vector (Lanes<M>), and each row picks
// its own column of a group of M activations. As all groups have equally many weights, no loop counts or branches.
#pragma once
#include "common.inl"
#include "vecmath.inl"

namespace {

template <int N, int M>
struct NmFields {
  static constexpr int kBits = M == 4 ? 2 : 3, kFields = secateur::nm_fields(M), kWords = secateur::nm_words(N, M);
  static constexpr int kPeriod = kWords * kFields / N;
};

// Sixteen rows times T tokens.
template <int N, int M, int VALUE, int T>
__attribute__((noinline)) void nm_sixteen(const uint8_t* p, int64_t groups, const float* x, int64_t stride,
                                          float (&sums)[T][16]) {
  using P = NmFields<N, M>;
  using L = Lanes<M>;
  constexpr int kSets = T == 1 ? 4 : T == 2 ? 2 : 1, kBytes = 16 * secateur::value_bytes(VALUE);
  typename L::V acc[kSets][T];
  SECATEUR_UNROLL
  for (int s = 0; s < kSets; s++) SECATEUR_UNROLL
  for (int t = 0; t < T; t++) acc[s][t] = L::zero();
  if constexpr (L::kUnrolled) {
    for (; groups >= P::kPeriod; groups -= P::kPeriod, x += P::kPeriod * M) {
      typename L::I word[P::kWords];
      SECATEUR_UNROLL
      for (int i = 0; i < P::kWords; i++) {
        word[i] = L::words(p + i * 64);
        Simd::prefetch(p + i * 64 + kPrefetchBytes);
      }
      p += P::kWords * 64;
      SECATEUR_UNROLL
      for (int w = 0; w < P::kWords; w++) SECATEUR_UNROLL
      for (int i = 0; i < P::kFields; i++) {
        const int f = w * P::kFields + i;
        if (f * kBytes % 64 == 0) Simd::prefetch(p + f * kBytes + kPrefetchBytes);
        const typename L::V value = L::template stored<VALUE>(p + f * kBytes);
        const typename L::I index = L::shifted(word[w], i * P::kBits);
        SECATEUR_UNROLL
        for (int t = 0; t < T; t++)
          acc[f % kSets][t] = L::fma(value, L::pick(L::group(x + t * stride + f / N * M), index), acc[f % kSets][t]);
      }
      p += P::kWords * P::kFields * kBytes;
    }
  }
  for (; groups > 0; groups -= P::kPeriod, x += P::kPeriod * M) {
    const uint8_t* word = p;
    p += P::kWords * 64;
    const int fields = static_cast<int>(std::min<int64_t>(groups, P::kPeriod)) * N;
    for (int f = 0; f < fields; f++, p += kBytes) {
      const typename L::V value = L::template stored<VALUE>(p);
      const typename L::I index = L::shifted(L::words(word + f / P::kFields * 64), f % P::kFields * P::kBits);
      SECATEUR_UNROLL
      for (int t = 0; t < T; t++)
        acc[0][t] = L::fma(value, L::pick(L::group(x + t * stride + f / N * M), index), acc[0][t]);
    }
  }
  SECATEUR_UNROLL
  for (int t = 0; t < T; t++) {
    SECATEUR_UNROLL
    for (int s = 1; s < kSets; s++) acc[0][t] = L::add(acc[0][t], acc[s][t]);
    L::store(sums[t], acc[0][t]);
  }
}

// T tokens at a time out of up to eight: for the second T tokens, the weights of sixteen rows are in cache.
template <int N, int M, int VALUE, int T>
void nm_pass(const uint8_t* blob, int64_t begin, int64_t end, const float* x, const float* bias, float* y, int64_t ldy,
             int tokens) {
  using secateur::section;
  const auto& h = *reinterpret_cast<const secateur::Header*>(blob);
  const secateur::NmShape s(h);
  const int64_t stride = secateur::round_up(h.cols, secateur::kBitmaskColumns);
  for (int64_t r = begin; r < end; r += 16)
    for (int first = 0; first < tokens; first += T) {
      float sums[T][16];
      nm_sixteen<N, M, VALUE, T>(section<uint8_t>(blob, 0) + r / 16 * s.bytes(), s.groups, x + first * stride, stride,
                                 sums);
      for (int t = first; t < std::min(tokens, first + T); t++)
        for (int64_t i = 0; i < std::min<int64_t>(16, end - r); i++) {
          const float sum = sums[t - first][i];
          y[t * ldy + r - begin + i] =
              (VALUE == SCT_I8 ? sum * section<float>(blob, 1)[r + i] : sum) + (bias ? bias[r - begin + i] : 0.0f);
        }
    }
}

template <int N, int M, int VALUE>
void nm_wide(const uint8_t* blob, int64_t begin, int64_t end, const float* x, int width, int tokens, const float* bias,
             float* y, int64_t ldy) {
  switch (width) {
    case 1:
      return nm_pass<N, M, VALUE, 1>(blob, begin, end, x, bias, y, ldy, tokens);
    case 2:
      return nm_pass<N, M, VALUE, 2>(blob, begin, end, x, bias, y, ldy, tokens);
    default:
      return nm_pass<N, M, VALUE, 4>(blob, begin, end, x, bias, y, ldy, tokens);
  }
}

template <int N, int M>
void nm_valued(const uint8_t* blob, int64_t begin, int64_t end, const float* x, int width, int tokens,
               const float* bias, float* y, int64_t ldy) {
  switch (reinterpret_cast<const secateur::Header*>(blob)->value) {
    case SCT_F32:
      return nm_wide<N, M, SCT_F32>(blob, begin, end, x, width, tokens, bias, y, ldy);
    case SCT_BF16:
      return nm_wide<N, M, SCT_BF16>(blob, begin, end, x, width, tokens, bias, y, ldy);
    case SCT_F16:
      return nm_wide<N, M, SCT_F16>(blob, begin, end, x, width, tokens, bias, y, ldy);
    default:
      return nm_wide<N, M, SCT_I8>(blob, begin, end, x, width, tokens, bias, y, ldy);
  }
}

void nm_rows(const uint8_t* blob, int64_t begin, int64_t end, const float* x, int width, int tokens, const float* bias,
             int activation, float* y, int64_t ldy) {
  const auto& h = *reinterpret_cast<const secateur::Header*>(blob);
  switch (h.p[0] * 16 + h.p[1]) {
    case 0x14:
      nm_valued<1, 4>(blob, begin, end, x, width, tokens, bias, y, ldy);
      break;
    case 0x24:
      nm_valued<2, 4>(blob, begin, end, x, width, tokens, bias, y, ldy);
      break;
    default:
      nm_valued<4, 8>(blob, begin, end, x, width, tokens, bias, y, ldy);
  }
  for (int t = 0; t < tokens; t++) activate_array(y + t * ldy, end - begin, activation);
}

}  // namespace
