// Block-sparse weight times a tile of packed activations (format "block", many tokens).
//
// The rows of a block share each load of activations: rows * NV accumulators, NV loads, and one broadcast weight for
// each row. Where registers are few, a block of eight rows is computed in two halves.
#pragma once
#include "common.inl"

namespace {

constexpr int rows_at_once(int block) { return Simd::REGISTERS >= 32 ? block : 4; }
// Of 16 registers, 12 accumulate, three hold activations and one a weight; eight sums would wait for each other.
constexpr int block_vectors(int block) { return Simd::REGISTERS >= 32 ? Simd::REGISTERS / 2 / rows_at_once(block) : 3; }

constexpr int kWidened = 256;  // blocks whose weights are converted to float32 at a time

// Adds the products of the first rows_at_once(R) rows of n blocks to y [R][tile]. w holds their weights [n][R], x the
// packed activations of the chunk.
template <int R, int NV>
__attribute__((noinline)) void block_part(const uint16_t* column, const float* w, int64_t n, const float* x, float* y) {
  constexpr int kTile = block_vectors(R) * Simd::W, kRows = rows_at_once(R);
  constexpr int kSets = NV == 1 && kRows < 8 ? 2 : 1;
  Simd::V acc[kSets][kRows][NV];
  SECATEUR_UNROLL
  for (int r = 0; r < kRows; r++) SECATEUR_UNROLL
  for (int v = 0; v < NV; v++) acc[0][r][v] = Simd::load(y + r * kTile + v * Simd::W);
  for (int s = 1; s < kSets; s++) SECATEUR_UNROLL
  for (int r = 0; r < kRows; r++) SECATEUR_UNROLL
  for (int v = 0; v < NV; v++) acc[s][r][v] = Simd::zero();
  const auto add = [&](auto& sums, int64_t i) __attribute__((always_inline)) {
    const float* at = x + static_cast<size_t>(column[i]) * kTile;
    Simd::V xs[NV];
    SECATEUR_UNROLL
    for (int v = 0; v < NV; v++) xs[v] = Simd::load_once(at + v * Simd::W);
    SECATEUR_UNROLL
    for (int r = 0; r < kRows; r++) {
      const Simd::V wr = Simd::set1(w[i * R + r]);
      SECATEUR_UNROLL
      for (int v = 0; v < NV; v++) sums[r][v] = Simd::fma(wr, xs[v], sums[r][v]);
    }
  };
  int64_t i = 0;
  for (; i + kSets <= n; i += kSets) SECATEUR_UNROLL
  for (int s = 0; s < kSets; s++) add(acc[s], i + s);
  if (i < n) add(acc[0], i);
  SECATEUR_UNROLL
  for (int r = 0; r < kRows; r++) SECATEUR_UNROLL
  for (int v = 0; v < NV; v++)
    if (kSets > 1) acc[0][r][v] = Simd::add(acc[0][r][v], acc[kSets - 1][r][v]);
  SECATEUR_UNROLL
  for (int r = 0; r < kRows; r++) SECATEUR_UNROLL
  for (int v = 0; v < NV; v++) Simd::store(y + r * kTile + v * Simd::W, acc[0][r][v]);
}

template <int R, int NV>
void block_columns(const uint16_t* column, const float* w, int64_t n, const float* x, float* y) {
  for (int r = 0; r < R; r += rows_at_once(R))
    block_part<R, NV>(column, w + r, n, x, y + r * block_vectors(R) * Simd::W);
}

// n blocks of stored values as float32 weights [n][R].
template <int R, int VALUE>
void widen(const uint8_t* values, int64_t n, const float* scales, float* out) {
  using S = Rows<R>;
  const typename S::V scale = VALUE == SCT_I8 ? S::load(scales) : S::zero();
  for (int64_t i = 0; i < n; i++) {
    typename S::V w = S::template stored<VALUE>(values + i * R * secateur::value_bytes(VALUE));
    if (VALUE == SCT_I8) w = S::mul(w, scale);
    S::store(out + i * R, w);
  }
}

template <int R, int NV, int VALUE>
void block_tile_pass(const uint8_t* blob, int64_t rb, const float* packed, const float* bias, float* y) {
  using secateur::section;
  constexpr int kTile = block_vectors(R) * Simd::W;
  const auto& h = *reinterpret_cast<const secateur::Header*>(blob);
  const secateur::BlockShape s(h);
  const int64_t rows = s.rows_in(rb), groups = s.groups_in(rb);
  const auto* column = section<uint16_t>(blob, 1);
  const auto* value = section<uint8_t>(blob, 2);
  const auto* scale = section<float>(blob, 3) + rb * s.row_block;
  for (int64_t r = 0; r < groups * R; r++) {
    const Simd::V b = Simd::set1(bias && r < rows ? bias[r] : 0.0f);
    SECATEUR_UNROLL
    for (int v = 0; v < NV; v++) Simd::store(y + r * kTile + v * Simd::W, b);
  }
  float widened[VALUE == SCT_F32 ? 1 : kWidened * R];
  float scales[R] = {};
  for (int64_t c = 0; c < s.chunks; c++) {
    const auto* start = section<uint32_t>(blob, 0) + s.first(rb, c);
    const float* x = packed + c * s.chunk * kTile;
    for (int64_t g = 0; g < groups; g++) {
      float* out = y + g * R * kTile;
      if (VALUE == SCT_F32) {
        block_columns<R, NV>(column + start[g], reinterpret_cast<const float*>(value) + int64_t{start[g]} * R,
                             start[g + 1] - start[g], x, out);
        continue;
      }
      if (VALUE == SCT_I8)
        for (int64_t r = 0; r < R && g * R + r < rows; r++) scales[r] = scale[g * R + r];
      for (int64_t i = start[g]; i < start[g + 1]; i += kWidened) {
        const int64_t n = std::min<int64_t>(kWidened, start[g + 1] - i);
        widen<R, VALUE>(value + i * R * secateur::value_bytes(VALUE), n, scales, widened);
        block_columns<R, NV>(column + i, widened, n, x, out);
      }
    }
  }
}

template <int R, int VALUE>
void block_tile_sized(const uint8_t* blob, int64_t rb, const float* packed, int tokens, const float* bias, float* y) {
  constexpr int kMost = block_vectors(R);
  const int vectors = (tokens + Simd::W - 1) / Simd::W;
  if (vectors <= 1)
    block_tile_pass<R, 1, VALUE>(blob, rb, packed, bias, y);
  else if (vectors <= 2 && kMost > 2)
    block_tile_pass < R, kMost<2 ? kMost : 2, VALUE>(blob, rb, packed, bias, y);
  else
    block_tile_pass<R, kMost, VALUE>(blob, rb, packed, bias, y);
}

template <int R>
void block_tile_valued(const uint8_t* blob, int64_t rb, const float* packed, int tokens, const float* bias, float* y) {
  switch (reinterpret_cast<const secateur::Header*>(blob)->value) {
    case SCT_F32:
      return block_tile_sized<R, SCT_F32>(blob, rb, packed, tokens, bias, y);
    case SCT_BF16:
      return block_tile_sized<R, SCT_BF16>(blob, rb, packed, tokens, bias, y);
    case SCT_F16:
      return block_tile_sized<R, SCT_F16>(blob, rb, packed, tokens, bias, y);
    default:
      return block_tile_sized<R, SCT_I8>(blob, rb, packed, tokens, bias, y);
  }
}

void block_tile(const uint8_t* blob, int64_t rb, const float* packed, int tokens, const float* bias, float* y) {
  if (reinterpret_cast<const secateur::Header*>(blob)->p[0] == 4)
    block_tile_valued<4>(blob, rb, packed, tokens, bias, y);
  else
    block_tile_valued<8>(blob, rb, packed, tokens, bias, y);
}

}  // namespace
