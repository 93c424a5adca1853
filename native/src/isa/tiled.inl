// Unstructured sparse weight times packed activations (format "tiled"). Included once per instruction set.
//
// For each nonzero the loop multiplies one broadcast weight into NV vectors of tokens, which it loads from
// the chunk of activations in L1 at an offset that the packer multiplied out. Rows of equal count run under
// one loop bound, so that the branch predictor has nothing to guess. The loop is bound by loads from L1: two rows go
// through the chunk together and load the columns that both keep once.
#pragma once
#include "common.inl"

namespace {

// Weights that are broadcast from memory one by one.
template <class S>
struct OneByOne {
  const uint8_t* p;
  template <int I>
  typename S::V lane() const {
    return S::set1(reinterpret_cast<const float*>(p)[I]);
  }
};

// Groups of four weights and their offsets, for one kind of vectors.
template <class Vectors>
struct F32Group {
  using S = Vectors;
  static constexpr int kBytes = 24, kOffsets = 16, kSharedBytes = 40;
  static auto quad(const uint8_t* p) { return S::quad_f32(p); }
  // Of a shared group, which loads little beside: two quads would take two registers.
  static auto shared(const uint8_t* p) {
    if constexpr (S::REGISTERS < 32)
      return OneByOne<S>{p};
    else
      return S::quad_f32(p);
  }
};
template <class Vectors>
struct Bf16Group {
  using S = Vectors;
  static constexpr int kBytes = 16, kOffsets = 8, kSharedBytes = 24;
  static auto quad(const uint8_t* p) { return S::quad_bf16(p); }
  static auto shared(const uint8_t* p) { return S::quad_bf16(p); }
};

// Sets of accumulators: two FMAs a cycle with a latency of four need at least eight independent chains.
constexpr int accumulator_sets(int nv) { return nv == 1 ? 8 : nv <= 3 ? 4 : nv <= 6 ? 2 : 1; }

// A pass of two rows needs 2 * NV accumulators, and some registers beside them.
constexpr int kMostVectors = Simd::MOST_VECTORS;

// Weights that do not stay in L2 are fetched into it so many bytes ahead: other reads hide them from the prefetcher, too.
// Each line fetched is an access to L1, which weights that are in L2 already can do without.
constexpr int kWeightsAhead = 4096;
constexpr uint64_t kNearBytes = 512 << 10;

template <int I, class S, int NV, class Quad>
inline __attribute__((always_inline)) void step(typename S::V (&acc)[NV], const char* x, const Quad& quad) {
  const typename S::V w = quad.template lane<I>();
  for (int v = 0; v < NV; v++)
    acc[v] = S::fma(w, S::load(reinterpret_cast<const float*>(x) + v * S::W), acc[v]);
}

template <class Group, int NV, int NS, int FIRST, int COUNT>
inline __attribute__((always_inline)) void group(typename Group::S::V (&acc)[NS][NV], const char* x,
                                                 const uint8_t* p) {
  using S = typename Group::S;
  uint64_t at;
  memcpy(&at, p + Group::kOffsets, 8);
  const auto quad = Group::quad(p);
  step<0, S>(acc[FIRST % NS], x + (at & 0xffff), quad);
  if (COUNT > 1) step<1, S>(acc[(FIRST + 1) % NS], x + (at >> 16 & 0xffff), quad);
  if (COUNT > 2) step<2, S>(acc[(FIRST + 2) % NS], x + (at >> 32 & 0xffff), quad);
  if (COUNT > 3) step<3, S>(acc[(FIRST + 3) % NS], x + (at >> 48), quad);
}

// `nrows` rows with 4 * groups + REST nonzeros each.
template <class Group, int NV, int REST, bool FAR>
__attribute__((noinline)) void tiled_rows(const uint8_t* p, const uint32_t* row, int nrows, int groups,
                                          const char* x, char* y, const float* bias, uint32_t stride,
                                          bool first) {
  using S = typename Group::S;
  constexpr int NS = accumulator_sets(NV);
  const int fetched = FAR ? (groups + (REST > 0)) * Group::kBytes : 0;  // in a function of its own GCC 12 drops the loop
  for (int r = 0; r < nrows; r++) {
    float* out = reinterpret_cast<float*>(y + row[r]);
    for (int line = 0; line < NV * S::W * 4; line += 64) S::prefetch(y + row[r + kRowsAhead] + line);
    for (int line = 0; line < fetched; line += 64) S::prefetch_l2(p + kWeightsAhead + line);
    typename S::V acc[NS][NV];
    if (first) {
      if (S::W < Simd::W) Simd::store(out, Simd::zero());  // lanes of no token
      const typename S::V b = bias ? S::set1(bias[row[r] / stride]) : S::zero();
      for (int v = 0; v < NV; v++) acc[0][v] = b;
    } else {
      for (int v = 0; v < NV; v++) acc[0][v] = S::load(out + v * S::W);
    }
    for (int s = 1; s < NS; s++)
      for (int v = 0; v < NV; v++) acc[s][v] = S::zero();
    if (REST) {
      group<Group, NV, NS, 0, REST>(acc, x, p);
      p += Group::kBytes;
    }
    int g = groups;
    if (NS > 4) {
      for (; g >= 2; g -= 2) {
        group<Group, NV, NS, 0, 4>(acc, x, p);
        group<Group, NV, NS, 4, 4>(acc, x, p + Group::kBytes);
        p += 2 * Group::kBytes;
      }
    }
    for (; g > 0; g--) {
      group<Group, NV, NS, 0, 4>(acc, x, p);
      p += Group::kBytes;
    }
    // A loop that halves would not be unrolled, and the accumulators would live in memory.
    for (int s = 1; s < NS; s++)
      for (int v = 0; v < NV; v++) acc[0][v] = S::add(acc[0][v], acc[s][v]);
    for (int v = 0; v < NV; v++) S::store(out + v * S::W, acc[0][v]);
  }
}

constexpr int pair_sets(int nv) { return nv == 1 ? 4 : nv == 2 ? 2 : 1; }

template <int I, class S, int NV, class Quad>
inline __attribute__((always_inline)) void shared_step(typename S::V (&acc)[2][NV], const char* x, const Quad& first,
                                                       const Quad& second) {
  const typename S::V a = first.template lane<I>(), b = second.template lane<I>();
  for (int v = 0; v < NV; v++) {
    const typename S::V at = S::load_once(reinterpret_cast<const float*>(x) + v * S::W);
    acc[0][v] = S::fma(a, at, acc[0][v]);
    acc[1][v] = S::fma(b, at, acc[1][v]);
  }
}

template <int I, class S, int NV, class Quad>
inline __attribute__((always_inline)) void own_step(typename S::V (&acc)[2][NV], const char* x, const char* x2,
                                                    const Quad& first, const Quad& second) {
  step<I, S>(acc[0], x, first);
  step<I, S>(acc[1], x2, second);
}

template <class Group, int NV, int NS, int COUNT>
inline __attribute__((always_inline)) void own_group(typename Group::S::V (&acc)[NS][2][NV], const char* x,
                                                     const uint8_t* p) {
  using S = typename Group::S;
  uint64_t at, at2;
  memcpy(&at, p + Group::kOffsets, 8);
  memcpy(&at2, p + Group::kBytes + Group::kOffsets, 8);
  const auto a = Group::quad(p), b = Group::quad(p + Group::kBytes);
  own_step<0, S>(acc[0], x + (at & 0xffff), x + (at2 & 0xffff), a, b);
  if (COUNT > 1) own_step<1, S>(acc[1 % NS], x + (at >> 16 & 0xffff), x + (at2 >> 16 & 0xffff), a, b);
  if (COUNT > 2) own_step<2, S>(acc[2 % NS], x + (at >> 32 & 0xffff), x + (at2 >> 32 & 0xffff), a, b);
  if (COUNT > 3) own_step<3, S>(acc[3 % NS], x + (at >> 48), x + (at2 >> 48), a, b);
}

template <class Group, int NV, int NS>
inline __attribute__((always_inline)) void shared_group(typename Group::S::V (&acc)[NS][2][NV], const char* x,
                                                        const uint8_t* p) {
  using S = typename Group::S;
  uint64_t at;
  memcpy(&at, p + 2 * Group::kOffsets, 8);
  const auto a = Group::shared(p), b = Group::shared(p + Group::kOffsets);
  shared_step<0, S>(acc[0], x + (at & 0xffff), a, b);
  shared_step<1, S>(acc[1 % NS], x + (at >> 16 & 0xffff), a, b);
  shared_step<2, S>(acc[2 % NS], x + (at >> 32 & 0xffff), a, b);
  shared_step<3, S>(acc[3 % NS], x + (at >> 48), a, b);
}

// Pairs of rows with 4 * own + REST nonzeros of their own each, and 4 * shared in common.
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
      own_group<Group, NV, NS, REST>(acc, x, p);
      p += 2 * Group::kBytes;
    }
    for (int g = own; g > 0; g--) {
      own_group<Group, NV, NS, 4>(acc, x, p);
      p += 2 * Group::kBytes;
    }
    for (int g = shared; g > 0; g--) {
      shared_group<Group, NV, NS>(acc, x, p);
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
void tiled_typed(const uint8_t* blob, int64_t row_block, const float* packed, int tokens, const float* bias,
                 float* y) {
  const auto& h = *reinterpret_cast<const secateur::Header*>(blob);
  const uint32_t tile = h.p[0], chunk = h.p[1], stride = tile * 4;
  const int64_t chunks = secateur::ceil_div(h.cols, chunk);
  const bool far = h.bytes > kNearBytes;
  const auto* blocks = secateur::section<secateur::TiledBlock>(blob, 0) + row_block * chunks;
  int left = (tokens + Simd::W - 1) / Simd::W;
  // A short last tile computes only the vectors it needs; a wide one takes several passes.
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

void tiled(const uint8_t* blob, int64_t row_block, const float* packed, int tokens, const float* bias,
           float* y) {
  if (reinterpret_cast<const secateur::Header*>(blob)->value == SCT_F32)
    tiled_typed<F32Group>(blob, row_block, packed, tokens, bias, y);
  else
    tiled_typed<Bf16Group>(blob, row_block, packed, tokens, bias, y);
}

}  // namespace
