// Unstructured sparse weight times packed activations (format "tiled").
//
// For each nonzero, the loop multiplies one broadcast weight by NV vectors of tokens, which it loads from the chunk of
// activations in L1 at an offset that the packer has multiplied out. Rows with equally many nonzeros share one loop
// bound, so that the branch predictor has nothing to guess. The loop is bound by loads from L1; a pair of rows loads
// the columns that both rows keep only once.
#pragma once
#include "common.inl"

namespace {

// Four weights, each of which is broadcast from memory.
template <class S>
struct OneByOne {
  const uint8_t* p;
  template <int I>
  typename S::V lane() const {
    return S::set1(reinterpret_cast<const float*>(p)[I]);
  }
};

// Groups of four weights and their offsets (see blob.h), for vectors of type `Vectors`.
template <class Vectors>
struct F32Group {
  using S = Vectors;
  static constexpr int kBytes = 24, kOffsets = 16, kSharedBytes = 40;
  static auto weights(const uint8_t* p) { return S::four_f32(p); }
  // For a shared group, which loads little else; the weights of both rows as Four would take two registers.
  static auto shared_weights(const uint8_t* p) {
    if constexpr (S::REGISTERS < 32)
      return OneByOne<S>{p};
    else
      return S::four_f32(p);
  }
};
template <class Vectors>
struct Bf16Group {
  using S = Vectors;
  static constexpr int kBytes = 16, kOffsets = 8, kSharedBytes = 24;
  static auto weights(const uint8_t* p) { return S::four_bf16(p); }
  static auto shared_weights(const uint8_t* p) { return S::four_bf16(p); }
};

// Sets of accumulators: two FMAs a cycle with a latency of four need at least eight independent chains.
constexpr int accumulator_sets(int nv) { return nv == 1 ? 8 : nv <= 3 ? 4 : nv <= 6 ? 2 : 1; }

// A pass over two rows needs 2 * NV accumulators and a few other registers.
constexpr int kMostVectors = Simd::MOST_VECTORS;

// Weights that do not stay in L2 are prefetched into it so many bytes ahead: other reads hide them from the hardware
// prefetcher. Each line prefetched costs an access to L1, so weights of up to kNearBytes, which stay in L2, are not.
constexpr int kWeightsAhead = 4096;
constexpr uint64_t kNearBytes = 512 << 10;

template <int I, class S, int NV, class Four>
inline __attribute__((always_inline)) void add_product(typename S::V (&acc)[NV], const char* x, const Four& weights) {
  const typename S::V w = weights.template lane<I>();
  for (int v = 0; v < NV; v++) acc[v] = S::fma(w, S::load(reinterpret_cast<const float*>(x) + v * S::W), acc[v]);
}

template <class Group, int NV, int NS, int FIRST, int COUNT>
inline __attribute__((always_inline)) void add_group(typename Group::S::V (&acc)[NS][NV], const char* x,
                                                     const uint8_t* p) {
  using S = typename Group::S;
  uint64_t at;
  memcpy(&at, p + Group::kOffsets, 8);
  const auto weights = Group::weights(p);
  add_product<0, S>(acc[FIRST % NS], x + (at & 0xffff), weights);
  if (COUNT > 1) add_product<1, S>(acc[(FIRST + 1) % NS], x + (at >> 16 & 0xffff), weights);
  if (COUNT > 2) add_product<2, S>(acc[(FIRST + 2) % NS], x + (at >> 32 & 0xffff), weights);
  if (COUNT > 3) add_product<3, S>(acc[(FIRST + 3) % NS], x + (at >> 48), weights);
}

// `nrows` rows with 4 * groups + REST nonzeros each.
template <class Group, int NV, int REST, bool FAR>
__attribute__((noinline)) void tiled_rows(const uint8_t* p, const uint32_t* row, int nrows, int groups, const char* x,
                                          char* y, const float* bias, uint32_t stride, bool first) {
  using S = typename Group::S;
  constexpr int NS = accumulator_sets(NV);
  const int fetched =
      FAR ? (groups + (REST > 0)) * Group::kBytes : 0;  // computed in a separate function, GCC 12 drops the loop
  for (int r = 0; r < nrows; r++) {
    float* out = reinterpret_cast<float*>(y + row[r]);
    for (int line = 0; line < NV * S::W * 4; line += 64) S::prefetch(y + row[r + kRowsAhead] + line);
    for (int line = 0; line < fetched; line += 64) S::prefetch_l2(p + kWeightsAhead + line);
    typename S::V acc[NS][NV];
    if (first) {
      if (S::W < Simd::W) Simd::store(out, Simd::zero());  // lanes without a token
      const typename S::V b = bias ? S::set1(bias[row[r] / stride]) : S::zero();
      for (int v = 0; v < NV; v++) acc[0][v] = b;
    } else {
      for (int v = 0; v < NV; v++) acc[0][v] = S::load(out + v * S::W);
    }
    for (int s = 1; s < NS; s++)
      for (int v = 0; v < NV; v++) acc[s][v] = S::zero();
    if (REST) {
      add_group<Group, NV, NS, 0, REST>(acc, x, p);
      p += Group::kBytes;
    }
    int g = groups;
    if (NS > 4) {
      for (; g >= 2; g -= 2) {
        add_group<Group, NV, NS, 0, 4>(acc, x, p);
        add_group<Group, NV, NS, 4, 4>(acc, x, p + Group::kBytes);
        p += 2 * Group::kBytes;
      }
    }
    for (; g > 0; g--) {
      add_group<Group, NV, NS, 0, 4>(acc, x, p);
      p += Group::kBytes;
    }
    // Adding up in halves would not be unrolled, and the accumulators would live in memory.
    for (int s = 1; s < NS; s++)
      for (int v = 0; v < NV; v++) acc[0][v] = S::add(acc[0][v], acc[s][v]);
    for (int v = 0; v < NV; v++) S::store(out + v * S::W, acc[0][v]);
  }
}

constexpr int pair_sets(int nv) { return nv == 1 ? 4 : nv == 2 ? 2 : 1; }

template <int I, class S, int NV, class Four>
inline __attribute__((always_inline)) void add_shared_product(typename S::V (&acc)[2][NV], const char* x,
                                                              const Four& first, const Four& second) {
  const typename S::V a = first.template lane<I>(), b = second.template lane<I>();
  for (int v = 0; v < NV; v++) {
    const typename S::V at = S::load_once(reinterpret_cast<const float*>(x) + v * S::W);
    acc[0][v] = S::fma(a, at, acc[0][v]);
    acc[1][v] = S::fma(b, at, acc[1][v]);
  }
}

template <int I, class S, int NV, class Four>
inline __attribute__((always_inline)) void add_own_products(typename S::V (&acc)[2][NV], const char* x, const char* x2,
                                                            const Four& first, const Four& second) {
  add_product<I, S>(acc[0], x, first);
  add_product<I, S>(acc[1], x2, second);
}

template <class Group, int NV, int NS, int COUNT>
inline __attribute__((always_inline)) void add_own_group(typename Group::S::V (&acc)[NS][2][NV], const char* x,
                                                         const uint8_t* p) {
  using S = typename Group::S;
  uint64_t at, at2;
  memcpy(&at, p + Group::kOffsets, 8);
  memcpy(&at2, p + Group::kBytes + Group::kOffsets, 8);
  const auto a = Group::weights(p), b = Group::weights(p + Group::kBytes);
  add_own_products<0, S>(acc[0], x + (at & 0xffff), x + (at2 & 0xffff), a, b);
  if (COUNT > 1) add_own_products<1, S>(acc[1 % NS], x + (at >> 16 & 0xffff), x + (at2 >> 16 & 0xffff), a, b);
  if (COUNT > 2) add_own_products<2, S>(acc[2 % NS], x + (at >> 32 & 0xffff), x + (at2 >> 32 & 0xffff), a, b);
  if (COUNT > 3) add_own_products<3, S>(acc[3 % NS], x + (at >> 48), x + (at2 >> 48), a, b);
}

template <class Group, int NV, int NS>
inline __attribute__((always_inline)) void add_shared_group(typename Group::S::V (&acc)[NS][2][NV], const char* x,
                                                            const uint8_t* p) {
  using S = typename Group::S;
  uint64_t at;
  memcpy(&at, p + 2 * Group::kOffsets, 8);
  const auto a = Group::shared_weights(p), b = Group::shared_weights(p + Group::kOffsets);
  add_shared_product<0, S>(acc[0], x + (at & 0xffff), a, b);
  add_shared_product<1, S>(acc[1 % NS], x + (at >> 16 & 0xffff), a, b);
  add_shared_product<2, S>(acc[2 % NS], x + (at >> 32 & 0xffff), a, b);
  add_shared_product<3, S>(acc[3 % NS], x + (at >> 48), a, b);
}

// Pairs of rows: each row has 4 * own + REST nonzeros of its own, and 4 * shared nonzeros in columns of both.
template <class Group, int NV, int REST, bool FAR>
__attribute__((noinline)) void tiled_pairs(const uint8_t* p, const uint32_t* row, int nrows, int own, int shared,
                                           const char* x, char* y, const float* bias, uint32_t stride, bool first) {
  using S = typename Group::S;
  constexpr int NS = pair_sets(NV);
  const int fetched = FAR ? 2 * (own + (REST > 0)) * Group::kBytes + shared * Group::kSharedBytes : 0;
  for (int r = 0; r < nrows; r += 2) {
    float* out[2] = {reinterpret_cast<float*>(y + row[r]), reinterpret_cast<float*>(y + row[r + 1])};
    for (int line = 0; line < fetched; line += 64) S::prefetch_l2(p + kWeightsAhead + line);
    typename S::V acc[NS][2][NV];
    SECATEUR_UNROLL
    for (int i = 0; i < 2; i++) {
      if (first) {
        if (S::W < Simd::W) Simd::store(out[i], Simd::zero());
        const typename S::V b = bias ? S::set1(bias[row[r + i] / stride]) : S::zero();
        for (int v = 0; v < NV; v++) acc[0][i][v] = b;
      } else {
        for (int v = 0; v < NV; v++) acc[0][i][v] = S::load(out[i] + v * S::W);
      }
    }
    for (int s = 1; s < NS; s++)
      for (int i = 0; i < 2; i++)
        for (int v = 0; v < NV; v++) acc[s][i][v] = S::zero();
    if (REST) {
      add_own_group<Group, NV, NS, REST>(acc, x, p);
      p += 2 * Group::kBytes;
    }
    for (int g = own; g > 0; g--) {
      add_own_group<Group, NV, NS, 4>(acc, x, p);
      p += 2 * Group::kBytes;
    }
    for (int g = shared; g > 0; g--) {
      add_shared_group<Group, NV, NS>(acc, x, p);
      p += Group::kSharedBytes;
    }
    SECATEUR_UNROLL
    for (int i = 0; i < 2; i++) {
      for (int s = 1; s < NS; s++)
        for (int v = 0; v < NV; v++) acc[0][i][v] = S::add(acc[0][i][v], acc[s][i][v]);
      for (int v = 0; v < NV; v++) S::store(out[i] + v * S::W, acc[0][i][v]);
    }
  }
}

template <class Group, int NV, bool FAR, int REST>
void tiled_run(const secateur::TiledRun& run, const uint8_t* p, const uint32_t* row, const char* x, char* y,
               const float* bias, uint32_t stride, bool first) {
  const int n = static_cast<int>(run.rows), own = static_cast<int>((run.count - run.shared) / 4);
  if (run.together == 2)
    tiled_pairs<Group, NV, REST, FAR>(p, row, n, own, run.shared / 4, x, y, bias, stride, first);
  else
    tiled_rows<Group, NV, REST, FAR>(p, row, n, own, x, y, bias, stride, first);
}

template <class Group, int NV, bool FAR>
void tiled_chunk(const uint8_t* blob, const secateur::TiledBlock& block, const float* packed, float* y,
                 const float* bias, uint32_t stride, bool first) {
  const auto* run = secateur::section<secateur::TiledRun>(blob, 1) + block.class_begin;
  const uint32_t* row = secateur::section<uint32_t>(blob, 2) + block.row_begin;
  const uint8_t* p = secateur::section<uint8_t>(blob, 3) + block.stream;
  const char* x = reinterpret_cast<const char*>(packed);
  char* out = reinterpret_cast<char*>(y);
  for (uint32_t c = 0; c < block.class_count; c++) {
    switch (run[c].count % 4) {
      case 0:
        tiled_run<Group, NV, FAR, 0>(run[c], p, row, x, out, bias, stride, first);
        break;
      case 1:
        tiled_run<Group, NV, FAR, 1>(run[c], p, row, x, out, bias, stride, first);
        break;
      case 2:
        tiled_run<Group, NV, FAR, 2>(run[c], p, row, x, out, bias, stride, first);
        break;
      default:
        tiled_run<Group, NV, FAR, 3>(run[c], p, row, x, out, bias, stride, first);
    }
    p += secateur::run_bytes(run[c], Group::kBytes, Group::kSharedBytes);
    row += run[c].rows;
  }
}

template <class Group, int NV>
void tiled_block(const uint8_t* blob, const secateur::TiledBlock& block, const float* packed, float* y,
                 const float* bias, uint32_t stride, bool first, bool far) {
  (far ? tiled_chunk<Group, NV, true> : tiled_chunk<Group, NV, false>)(blob, block, packed, y, bias, stride, first);
}

template <template <class> class Group>
void tiled_typed(const uint8_t* blob, int64_t row_block, const float* packed, int tokens, const float* bias, float* y) {
  const auto& h = *reinterpret_cast<const secateur::Header*>(blob);
  const uint32_t tile = h.p[0], chunk = h.p[1], stride = tile * 4;
  const int64_t chunks = secateur::ceil_div(h.cols, chunk);
  const bool far = h.bytes > kNearBytes;
  const auto* blocks = secateur::section<secateur::TiledBlock>(blob, 0) + row_block * chunks;
  int left = (tokens + Simd::W - 1) / Simd::W;
  // A short last tile computes only the vectors it needs; a wide tile takes several passes.
  for (int done = 0; left > 0;) {
    const int nv = left >= 8 && kMostVectors >= 8 ? 8 : left >= 6 && kMostVectors >= 6 ? 6 : left >= 4 ? 4 : left;
    const float* x = packed + done * Simd::W;
    float* out = y + done * Simd::W;
    for (int64_t c = 0; c < chunks; c++) {
      const float* xc = x + secateur::first_seen(h, c) * tile;
      const bool first = c == 0;
      switch (nv) {
        case 1:
          if (Half::W < Simd::W && tokens - done * Simd::W <= Half::W)
            tiled_block<Group<Half>, 1>(blob, blocks[c], xc, out, bias, stride, first, far);
          else
            tiled_block<Group<Simd>, 1>(blob, blocks[c], xc, out, bias, stride, first, far);
          break;
        case 2:
          tiled_block<Group<Simd>, 2>(blob, blocks[c], xc, out, bias, stride, first, far);
          break;
        case 3:
          tiled_block<Group<Simd>, 3>(blob, blocks[c], xc, out, bias, stride, first, far);
          break;
        case 4:
          tiled_block<Group<Simd>, 4>(blob, blocks[c], xc, out, bias, stride, first, far);
          break;
        case 6:
          tiled_block<Group<Simd>, std::min(kMostVectors, 6)>(blob, blocks[c], xc, out, bias, stride, first, far);
          break;
        default:
          tiled_block<Group<Simd>, kMostVectors>(blob, blocks[c], xc, out, bias, stride, first, far);
      }
    }
    done += nv;
    left -= nv;
  }
}

void tiled(const uint8_t* blob, int64_t row_block, const float* packed, int tokens, const float* bias, float* y) {
  if (reinterpret_cast<const secateur::Header*>(blob)->value == SCT_F32)
    tiled_typed<F32Group>(blob, row_block, packed, tokens, bias, y);
  else
    tiled_typed<Bf16Group>(blob, row_block, packed, tokens, bias, y);
}

}  // namespace
