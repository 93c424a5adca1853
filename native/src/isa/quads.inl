// Quads (1 x 4 blocks) of int8 weights times tokens that are rounded to uint8 when they are packed (format "quad").
// Dot, which every instruction set brings, multiplies four bytes a lane.
//
// A token x becomes q = round(x / scale) + zero in 0 .. 255, with its own scale and zero. Sums are exact integers, so
// every instruction set gives the same result. A packed tile is [quads][tile][4 bytes] (twice as wide where Dot takes
// pairs of int16), then `tile` zeros (int32) and `tile` scales.
#pragma once
#include "common.inl"

namespace {

constexpr int kQuadPanel = 512;           // columns that are rounded at a time
constexpr float kSmallestScale = 1e-36f;  // its reciprocal is finite

struct TokenScale {
  float scale, inverse;
  int32_t zero;
};

TokenScale scale_of(const float* x, int64_t n) {
  Simd::V low = Simd::zero(), high = Simd::zero();
  int64_t i = 0;
  for (; i + Simd::W <= n; i += Simd::W) {
    low = Simd::min(low, Simd::load(x + i));
    high = Simd::max(high, Simd::load(x + i));
  }
  float lows[Simd::W], highs[Simd::W];
  Simd::store(lows, low);
  Simd::store(highs, high);
  float a = 0, b = 0;
  for (int j = 0; j < Simd::W; j++) a = std::min(a, lows[j]), b = std::max(b, highs[j]);
  for (; i < n; i++) a = std::min(a, x[i]), b = std::max(b, x[i]);
  TokenScale s;
  s.scale = std::max(kSmallestScale, b / 255.0f - a / 255.0f);
  s.inverse = 1.0f / s.scale;
  s.zero = std::max(0, std::min(255, static_cast<int32_t>(std::nearbyint(-a * s.inverse))));
  return s;
}

uint8_t rounded(float x, const TokenScale& s) {
  return static_cast<uint8_t>(std::max(0, std::min(255, static_cast<int32_t>(std::nearbyint(x * s.inverse)) + s.zero)));
}

bool quad_pack(const float* x, int64_t ldx, int64_t cols, int tokens, int tile, float* out) {
  constexpr int B = Simd::TB, kQuads = kQuadPanel / 4;
  const int64_t quads = secateur::ceil_div(cols, 4);
  auto* zeros = reinterpret_cast<int32_t*>(out + quads * tile * Dot::kWide);
  float* scales = out + (quads * Dot::kWide + 1) * tile;
  for (int t = 0; t < tile; t++) zeros[t] = 0, scales[t] = 0;
  const int lanes = (tokens + Simd::W - 1) / Simd::W * Simd::W;
  bool not_finite = false;
  for (int t = 0; t < lanes; t += B) {
    TokenScale s[B];
    const int n = std::max(0, std::min(B, tokens - t));
    for (int i = 0; i < n; i++) {
      const float* row = x + (t + i) * ldx;
      const bool row_not_finite = any_not_finite(row, cols);
      not_finite |= row_not_finite;
      s[i] = row_not_finite ? TokenScale{0, 0, 0}
                            : scale_of(row, cols);  // propagate_not_finite computes such a token again
      zeros[t + i] = s[i].zero;
      scales[t + i] = s[i].scale;
    }
    alignas(64) float bytes[B * kQuads], transposed[kQuads * B];
    for (int64_t q = 0; q < quads; q += kQuads) {
      const int64_t panel_quads = std::min<int64_t>(kQuads, quads - q),
                    k = std::min<int64_t>(4 * panel_quads, cols - 4 * q);
      for (int i = 0; i < B; i++) {
        auto* to = reinterpret_cast<uint8_t*>(bytes + i * kQuads);
        int64_t done = 0;
        if (i < n && s[i].scale > 0) {
          const float* from = x + (t + i) * ldx + 4 * q;
          done = Dot::round(from, k, s[i].inverse, s[i].zero, to);
          for (; done < k; done++) to[done] = rounded(from[done], s[i]);
        }
        memset(to + done, 0, secateur::round_up(panel_quads, B) * 4 - done);
      }
      for (int64_t j = 0; j < panel_quads; j += B) Simd::transpose(bytes + j, kQuads, transposed + j * B, B);
      for (int64_t j = 0; j < panel_quads; j++)
        Dot::put(transposed + j * B, out + (q + j) * tile * Dot::kWide + t, tile);
    }
  }
  return not_finite;
}

constexpr int quad_sets(int nv) { return nv == 1 ? 4 : nv <= 3 ? 2 : 1; }

template <int NV, int NS, int COUNT>
inline __attribute__((always_inline)) void quad_group(Dot::A (&acc)[NS][NV], const uint8_t* x, const uint8_t* p,
                                                      uint32_t stride) {
  uint64_t at;
  memcpy(&at, p + 16, 8);
  SECATEUR_UNROLL
  for (int i = 0; i < COUNT; i++) {
    const typename Dot::Weights w = Dot::weights(p + 4 * i);
    const uint8_t* xs = x + (at >> 16 * i & 0xffff) * Dot::kWide;
    SECATEUR_UNROLL
    for (int v = 0; v < NV; v++) acc[i % NS][v] = Dot::add_products(acc[i % NS][v], xs + v * Simd::W * 4, stride, w);
  }
}

// `nrows` rows with 4 * groups + REST quads each.
template <int NV, int REST>
__attribute__((noinline)) void quad_rows(const uint8_t* p, const uint32_t* row, int nrows, int groups, const uint8_t* x,
                                         char* y, uint32_t stride) {
  constexpr int NS = quad_sets(NV);
  for (int r = 0; r < nrows; r++) {
    char* out = y + row[r];
    for (int line = 0; line < NV * Simd::W * 4; line += 64) Simd::prefetch(y + row[r + kRowsAhead] + line);
    typename Dot::A acc[NS][NV];
    SECATEUR_UNROLL
    for (int v = 0; v < NV; v++) acc[0][v] = Dot::load(out + v * Simd::W * 4);
    SECATEUR_UNROLL
    for (int s = 1; s < NS; s++) SECATEUR_UNROLL
    for (int v = 0; v < NV; v++) acc[s][v] = Dot::none();
    if (REST) {
      quad_group<NV, NS, REST>(acc, x, p, stride);
      p += secateur::kQuadGroup;
    }
    for (int g = groups; g > 0; g--) {
      quad_group<NV, NS, 4>(acc, x, p, stride);
      p += secateur::kQuadGroup;
    }
    SECATEUR_UNROLL
    for (int s = 1; s < NS; s++) SECATEUR_UNROLL
    for (int v = 0; v < NV; v++) acc[0][v] = Dot::add(acc[0][v], acc[s][v]);
    SECATEUR_UNROLL
    for (int v = 0; v < NV; v++) Dot::store(out + v * Simd::W * 4, acc[0][v]);
  }
}

template <int NV>
void quad_block(const uint8_t* blob, const secateur::TiledBlock& block, const uint8_t* x, float* y, uint32_t stride) {
  const auto* cls = secateur::section<secateur::TiledClass>(blob, 1) + block.class_begin;
  const uint32_t* row = secateur::section<uint32_t>(blob, 2) + block.row_begin;
  const uint8_t* p = secateur::section<uint8_t>(blob, 3) + block.stream;
  char* out = reinterpret_cast<char*>(y);
  for (uint32_t c = 0; c < block.class_count; c++) {
    const int groups = static_cast<int>(cls[c].count / 4), n = static_cast<int>(cls[c].rows);
    switch (cls[c].count % 4) {
      case 0:
        quad_rows<NV, 0>(p, row, n, groups, x, out, stride);
        break;
      case 1:
        quad_rows<NV, 1>(p, row, n, groups, x, out, stride);
        break;
      case 2:
        quad_rows<NV, 2>(p, row, n, groups, x, out, stride);
        break;
      default:
        quad_rows<NV, 3>(p, row, n, groups, x, out, stride);
    }
    p += static_cast<int64_t>(n) * ((cls[c].count + 3) / 4) * secateur::kQuadGroup;
    row += n;
  }
}

void quad_vectors(int nv, const uint8_t* blob, const secateur::TiledBlock& block, const uint8_t* x, float* y,
                  uint32_t stride) {
  switch (nv) {
    case 1:
      return quad_block<1>(blob, block, x, y, stride);
    case 2:
      return quad_block<2>(blob, block, x, y, stride);
    case 3:
      return quad_block<3>(blob, block, x, y, stride);
    case 4:
      return quad_block<4>(blob, block, x, y, stride);
    case 6:
      return quad_block<6>(blob, block, x, y, stride);
    default:
      return quad_block<8>(blob, block, x, y, stride);
  }
}

// One row block times one packed tile. y [row block rows][tile] holds the integer sums, and in the end the outputs.
void quad_tile(const uint8_t* blob, int64_t row_block, const float* packed, int tokens, const float* bias, float* y) {
  const auto& h = *reinterpret_cast<const secateur::Header*>(blob);
  const int64_t tile = h.p[0], chunk = h.p[1], quads = secateur::ceil_div(h.cols, 4), stride = tile * 4;
  const int64_t chunks = secateur::ceil_div(h.cols, chunk), begin = row_block * h.p[2];
  const int64_t rows = std::min<int64_t>(h.p[2], h.rows - begin);
  const auto* blocks = secateur::section<secateur::TiledBlock>(blob, 0) + row_block * chunks;
  const float* row_scale = secateur::section<float>(blob, 4) + begin;
  const int32_t* row_sum = secateur::section<int32_t>(blob, 5) + begin;
  const auto* zeros = reinterpret_cast<const char*>(packed + quads * tile * Dot::kWide);
  const float* scales = packed + (quads * Dot::kWide + 1) * tile;
  const int vectors = (tokens + Simd::W - 1) / Simd::W;
  for (int64_t r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++)
      Dot::store(reinterpret_cast<char*>(y + r * tile + v * Simd::W), Dot::minus(zeros + v * Simd::W * 4, row_sum[r]));
  for (int done = 0, left = vectors; left > 0;) {
    const int nv = left >= 8 ? 8 : left >= 6 ? 6 : left;
    const int take = nv == 5 ? 4 : nv;
    for (int64_t c = 0; c < chunks; c++) {
      const auto* x = reinterpret_cast<const uint8_t*>(packed + c * chunk / 4 * tile * Dot::kWide + done * Simd::W);
      quad_vectors(take, blob, blocks[c], x, y + done * Simd::W, static_cast<uint32_t>(stride));
    }
    done += take;
    left -= take;
  }
  for (int64_t r = 0; r < rows; r++) {
    const Simd::V scale = Simd::set1(row_scale[r]), b = Simd::set1(bias ? bias[r] : 0.0f);
    for (int v = 0; v < vectors; v++) {
      float* to = y + r * tile + v * Simd::W;
      const Simd::V sum = Dot::as_float(Dot::load(reinterpret_cast<char*>(to)));
      Simd::store(to, Simd::add(Simd::mul(sum, Simd::mul(scale, Simd::load(scales + v * Simd::W))), b));
    }
  }
}

}  // namespace
