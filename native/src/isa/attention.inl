// Attention, softmax(scale q k^T + mask) v, for one head and one tile of queries.
//
// Queries lie side by side in the lanes of vectors, so that the softmax over keys needs no sums across lanes. Keys come
// in blocks whose scores stay in the L1 cache; the maximum and the sum of the softmax are updated from block to block
// (Milakov and Gimelshein, 2018).
#pragma once
#include "common.inl"
#include "pack_activations.inl"
#include "vecmath.inl"

namespace {

constexpr int kQueries = Twice::W;  // queries in a tile
constexpr int kQueryVectors = kQueries / Simd::W;
constexpr int kScoreRows = Simd::REGISTERS / 2 / kQueryVectors;  // rows of a product that are computed at a time
constexpr int kFewQueries = 7;      // up to so many queries are computed row by row, four at a time
constexpr int64_t kKeyBlock = 128;  // keys
constexpr float kLowest = -1e30f;   // stands for -infinity: -infinity - -infinity is NaN

// c[r][kQueries] (+)= sum_i a[r * row + i * column] * b[i][kQueries] for R rows.
template <int R>
__attribute__((noinline)) void product_rows(const float* a, int64_t row, int64_t column, int64_t depth, const float* b,
                                            float* c, bool add) {
  constexpr int N = kQueryVectors;
  Simd::V acc[R][N];
  SECATEUR_UNROLL
  for (int r = 0; r < R; r++) SECATEUR_UNROLL
  for (int v = 0; v < N; v++) acc[r][v] = add ? Simd::load(c + r * kQueries + v * Simd::W) : Simd::zero();
  // Unrolled: counting would be a quarter of the instructions, and where a second thread runs on the core, this one can
  // issue half as many.
  _Pragma("GCC unroll 4") for (int64_t i = 0; i < depth; i++, a += column, b += kQueries) {
    Simd::V x[N];
    SECATEUR_UNROLL
    for (int v = 0; v < N; v++) x[v] = Simd::load(b + v * Simd::W);
    SECATEUR_UNROLL
    for (int r = 0; r < R; r++) {
      const Simd::V w = Simd::set1(a[r * row]);
      SECATEUR_UNROLL
      for (int v = 0; v < N; v++) acc[r][v] = Simd::fma(w, x[v], acc[r][v]);
    }
  }
  SECATEUR_UNROLL
  for (int r = 0; r < R; r++) SECATEUR_UNROLL
  for (int v = 0; v < N; v++) Simd::store(c + r * kQueries + v * Simd::W, acc[r][v]);
}

void product(const float* a, int64_t rows, int64_t row, int64_t column, int64_t depth, const float* b, float* c,
             bool add) {
  int64_t r = 0;
  for (; r + kScoreRows <= rows; r += kScoreRows)
    product_rows<kScoreRows>(a + r * row, row, column, depth, b, c + r * kQueries, add);
  for (; r < rows; r++) product_rows<1>(a + r * row, row, column, depth, b, c + r * kQueries, add);
}

bool all_kept(const uint8_t* keep, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t eight;
    memcpy(&eight, keep + i, 8);
    // Whether a byte is zero (Mycroft, 1987).
    if ((eight - 0x0101010101010101u) & ~eight & 0x8080808080808080u) return false;
  }
  for (; i < n; i++)
    if (!keep[i]) return false;
  return true;
}

// Adds the mask of keys [first, first + count) to scores [key][kQueries].
void add_mask(const sct_attention_job& j, int64_t batch, int64_t head, int64_t query, int n, int64_t first,
              int64_t count, float* scores) {
  if (j.mask) {
    const float* mask = j.mask + batch * j.mask_stride[0] + head * j.mask_stride[1] + query * j.mask_stride[2] + first;
    for (int t = 0; t < n; t++)
      for (int64_t k = 0; k < count; k++) scores[k * kQueries + t] += mask[t * j.mask_stride[2] + k];
  }
  if (j.keep) {
    const uint8_t* keep =
        j.keep + batch * j.keep_stride[0] + head * j.keep_stride[1] + query * j.keep_stride[2] + first;
    for (int t = 0; t < n; t++, keep += j.keep_stride[2]) {
      if (all_kept(keep, count)) continue;
      for (int64_t k = 0; k < count; k++)
        if (!keep[k]) scores[k * kQueries + t] = -std::numeric_limits<float>::infinity();
    }
  }
}

// Keys and values as sct_attention_job holds them: one token after another.
struct TokenKeys {
  const float *k, *v;
  int64_t k_step, v_step;

  void score(int64_t first, int64_t count, int64_t d, const float* q, float* scores) const {
    product(k + first * k_step, count, k_step, 1, d, q, scores, false);
  }
  void gather(int64_t first, int64_t count, int64_t d, const float* scores, float* out, bool add) const {
    product(v + first * v_step, d, 1, v_step, count, scores, out, add);
  }
};

// Keys and values in tiles of the layout [width][lanes]. Each tile holds `tile_tokens` tokens; tiles are `stride`
// floats apart.
struct TileKeys {
  const float *k, *v;
  int64_t lanes, tile_tokens, stride;

  // Calls f(offset into k and v, keys, keys before) for the part of [first, first + count) in each tile.
  template <class F>
  void each(int64_t first, int64_t count, F f) const {
    for (int64_t done = 0; done < count;) {
      const int64_t tile = (first + done) / tile_tokens, lane = (first + done) % tile_tokens;
      const int64_t n = std::min(count - done, tile_tokens - lane);
      f(tile * stride + lane, n, done);
      done += n;
    }
  }
  void score(int64_t first, int64_t count, int64_t d, const float* q, float* scores) const {
    each(first, count, [&](int64_t at, int64_t n, int64_t before) {
      product(k + at, n, 1, lanes, d, q, scores + before * kQueries, false);
    });
  }
  void gather(int64_t first, int64_t count, int64_t d, const float* scores, float* out, bool add) const {
    each(first, count, [&](int64_t at, int64_t n, int64_t before) {
      product(v + at, d, lanes, 1, n, scores + before * kQueries, out, add || before);
    });
  }
};

// Attention of one tile of queries. `scratch` holds attention_scratch(width) floats: first the scaled queries
// [width][kQueries], then the outputs in the same shape, then room for scores.
template <class Keys>
void attend(const sct_attention_job& j, const Keys& keys, int64_t batch, int64_t head, int64_t query, int n,
            float* scratch) {
  const int64_t d = j.width;
  float *q = scratch, *out = q + d * kQueries, *scores = out + d * kQueries;
  Twice::V most = Twice::set1(-std::numeric_limits<float>::infinity()), sum = Twice::zero();
  for (int64_t first = 0; first < j.keys; first += kKeyBlock) {
    const int64_t count = std::min(kKeyBlock, j.keys - first);
    keys.score(first, count, d, q, scores);
    add_mask(j, batch, head, query, n, first, count, scores);
    Twice::V m = most;
    for (int64_t k = 0; k < count; k++) m = Twice::max(m, Twice::load(scores + k * kQueries));
    const Twice::V base = Twice::max(m, Twice::set1(kLowest));
    if (first) {
      const Twice::V shrink = exp_v<Twice>(Twice::sub(Twice::max(most, Twice::set1(kLowest)), base));
      sum = Twice::mul(sum, shrink);
      for (int64_t i = 0; i < d; i++)
        Twice::store(out + i * kQueries, Twice::mul(Twice::load(out + i * kQueries), shrink));
    }
    most = m;
    for (int64_t k = 0; k < count; k++) {
      const Twice::V e = exp_v<Twice>(Twice::sub(Twice::load(scores + k * kQueries), base));
      Twice::store(scores + k * kQueries, e);
      sum = Twice::add(sum, e);
    }
    keys.gather(first, count, d, scores, out, first > 0);
  }
  // A query whose keys are all masked gives zeros.
  float share[kQueries], top[kQueries];
  Twice::store(share, sum);
  Twice::store(top, most);
  for (int t = 0; t < kQueries; t++)
    share[t] = top[t] == -std::numeric_limits<float>::infinity() ? 0.0f : 1.0f / share[t];
  for (int64_t i = 0; i < d; i++)
    Twice::store(out + i * kQueries, Twice::mul(Twice::load(out + i * kQueries), Twice::load(share)));
}

// Attention of Q queries, which lie scaled and row by row in `scratch`. The numbers of a head lie in the lanes of
// vectors, as few queries would leave most lanes of a tile empty. `width` is a multiple of the vector's.
template <int Q>
void attend_few(const sct_attention_job& j, const TokenKeys& keys, int64_t batch, int64_t head, int64_t query,
                float* scratch) {
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  const int64_t d = j.width;
  float *q = scratch, *out = q + Q * d, *scores = out + Q * d;
  float most[Q], sum[Q];
  std::fill(most, most + Q, kNothing);
  std::fill(sum, sum + Q, 0.0f);
  std::fill(out, out + Q * d, 0.0f);
  for (int64_t first = 0; first < j.keys; first += kKeyBlock) {
    const int64_t count = std::min(kKeyBlock, j.keys - first);
    for (int64_t s = 0; s < count; s += 2) {
      // Two keys at a time; an odd last key is computed twice.
      const float *a = keys.k + (first + s) * keys.k_step, *b = s + 1 < count ? a + keys.k_step : a;
      Simd::V sum_a[Q], sum_b[Q];
      for (int t = 0; t < Q; t++) sum_a[t] = sum_b[t] = Simd::zero();
      for (int64_t i = 0; i < d; i += Simd::W) {
        const Simd::V x = Simd::load(a + i), y = Simd::load(b + i);
        SECATEUR_UNROLL
        for (int t = 0; t < Q; t++) {
          const Simd::V w = Simd::load(q + t * d + i);
          sum_a[t] = Simd::fma(w, x, sum_a[t]);
          sum_b[t] = Simd::fma(w, y, sum_b[t]);
        }
      }
      for (int t = 0; t < Q; t++) {
        scores[t * kKeyBlock + s] = sum_of(sum_a[t]);
        if (s + 1 < count) scores[t * kKeyBlock + s + 1] = sum_of(sum_b[t]);
      }
    }
    for (int t = 0; t < Q; t++) {
      float* row = scores + t * kKeyBlock;
      const int64_t at = batch * j.mask_stride[0] + head * j.mask_stride[1] + (query + t) * j.mask_stride[2] + first;
      for (int64_t s = 0; j.mask && s < count; s++) row[s] += j.mask[at + s];
      const int64_t kept = batch * j.keep_stride[0] + head * j.keep_stride[1] + (query + t) * j.keep_stride[2] + first;
      for (int64_t s = 0; j.keep && s < count; s++) row[s] = j.keep[kept + s] ? row[s] : kNothing;
      const float m = std::max(most[t], *std::max_element(row, row + count)), base = std::max(m, kLowest);
      const float shrink = first ? std::exp(std::max(most[t], kLowest) - base) : 1.0f;
      for (int64_t s = count; s % Simd::W; s++) row[s] = kNothing;
      Simd::V total = Simd::zero();
      for (int64_t s = 0; s < count; s += Simd::W) {
        const Simd::V e = exp_v<Simd>(Simd::sub(Simd::load(row + s), Simd::set1(base)));
        Simd::store(row + s, e);
        total = Simd::add(total, e);
      }
      sum[t] = sum[t] * shrink + sum_of(total);
      most[t] = m;
      if (shrink != 1.0f)
        for (int64_t i = 0; i < d; i++) out[t * d + i] *= shrink;
    }
    for (int64_t i = 0; i < d; i += Simd::W) {
      Simd::V acc[Q];
      for (int t = 0; t < Q; t++) acc[t] = Simd::load(out + t * d + i);
      const float* v = keys.v + first * keys.v_step + i;
      for (int64_t s = 0; s < count; s++, v += keys.v_step) {
        const Simd::V x = Simd::load(v);
        SECATEUR_UNROLL
        for (int t = 0; t < Q; t++) acc[t] = Simd::fma(Simd::set1(scores[t * kKeyBlock + s]), x, acc[t]);
      }
      for (int t = 0; t < Q; t++) Simd::store(out + t * d + i, acc[t]);
    }
  }
  float* to = j.out + batch * j.out_stride[0] + head * j.out_stride[1] + query * j.out_stride[2];
  for (int t = 0; t < Q; t++) {
    const float share = most[t] == kNothing ? 0.0f : 1.0f / sum[t];
    for (int64_t i = 0; i < d; i++) to[t * j.out_stride[2] + i] = out[t * d + i] * share;
  }
}

// Computes n queries by attend_few where they are few enough and their width allows it; returns whether it did.
bool attended_few(const sct_attention_job& j, const TokenKeys& keys, int64_t batch, int64_t head, int64_t query, int n,
                  float* scratch) {
  if (n > kFewQueries || j.width % Simd::W) return false;
  const float* from = j.q + batch * j.q_stride[0] + head * j.q_stride[1] + query * j.q_stride[2];
  void (*const few[])(const sct_attention_job&, const TokenKeys&, int64_t, int64_t, int64_t, float*) = {
      attend_few<1>, attend_few<2>, attend_few<3>, attend_few<4>};
  for (int t = 0; t < n; t += 4) {
    const int rows = std::min(4, n - t);
    for (int r = 0; r < rows; r++, from += j.q_stride[2])
      for (int64_t i = 0; i < j.width; i++) scratch[r * j.width + i] = from[i] * j.scale;
    few[rows - 1](j, keys, batch, head, query + t, scratch);
  }
  return true;
}

void attention_tile(const sct_attention_job& j, int64_t batch, int64_t head, int64_t query, int n, float* scratch) {
  const int64_t d = j.width, kv = head / (j.heads / j.kv_heads);
  const TokenKeys keys{j.k + batch * j.k_stride[0] + kv * j.k_stride[1],
                       j.v + batch * j.v_stride[0] + kv * j.v_stride[1], j.k_stride[2], j.v_stride[2]};
  if (attended_few(j, keys, batch, head, query, n, scratch)) return;
  const float* from = j.q + batch * j.q_stride[0] + head * j.q_stride[1] + query * j.q_stride[2];
  if (n < kQueries) std::fill(scratch, scratch + d * kQueries, 0.0f);
  pack_tile(from, j.q_stride[2], d, n, kQueries, scratch);
  const Simd::V factor = Simd::set1(j.scale);
  for (int64_t i = 0; i < d * kQueries; i += Simd::W)
    Simd::store(scratch + i, Simd::mul(Simd::load(scratch + i), factor));
  attend(j, keys, batch, head, query, n, scratch);
  unpack_tile(scratch + d * kQueries, d, kQueries, n, SCT_NONE,
              j.out + batch * j.out_stride[0] + head * j.out_stride[1] + query * j.out_stride[2], j.out_stride[2]);
}

// Attention of n queries from `query` on that lie side by side in one tile of the layout [width][lanes], `tile_tokens`
// tokens a tile. The strides of q, k, v and out are from batch to batch, head to head and tile to tile. Queries past
// the last are computed up to a whole vector. Returns whether an output is NaN or infinite.
bool attention_packed(const sct_attention_job& j, int64_t lanes, int64_t tile_tokens, int64_t batch, int64_t head,
                      int64_t query, int n, float* scratch) {
  const int64_t d = j.width, kv = head / (j.heads / j.kv_heads), lane = query % tile_tokens;
  const float* q = j.q + batch * j.q_stride[0] + head * j.q_stride[1] + query / tile_tokens * j.q_stride[2] + lane;
  float* out = j.out + batch * j.out_stride[0] + head * j.out_stride[1] + query / tile_tokens * j.out_stride[2] + lane;
  const Simd::V factor = Simd::set1(j.scale);
  for (int64_t i = 0; i < d; i++)
    for (int v = 0; v < kQueries; v += Simd::W)
      Simd::store(scratch + i * kQueries + v, v < n ? Simd::mul(Simd::load(q + i * lanes + v), factor) : Simd::zero());
  attend(j,
         TileKeys{j.k + batch * j.k_stride[0] + kv * j.k_stride[1], j.v + batch * j.v_stride[0] + kv * j.v_stride[1],
                  lanes, tile_tokens, j.k_stride[2]},
         batch, head, query, n, scratch);
  Simd::V nan_check = Simd::zero();
  for (int64_t i = 0; i < d; i++)
    for (int v = 0; v < n; v += Simd::W) {
      const Simd::V o = Simd::load(scratch + (d + i) * kQueries + v);
      nan_check = Simd::fma(o, Simd::zero(), nan_check);
      Simd::store(out + i * lanes + v, o);
    }
  return Simd::any_nan(nan_check);
}

int64_t attention_scratch(int64_t width) { return (2 * width + kKeyBlock) * kQueries; }

}  // namespace
