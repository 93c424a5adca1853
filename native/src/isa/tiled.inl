// Unstructured sparse weight times packed activations (format "tiled"). Included once per instruction set.
//
// For each nonzero the loop multiplies one broadcast weight into NV vectors of tokens, which it loads from
// the chunk of activations in L1 at an offset that the packer multiplied out. Rows of equal count run under
// one loop bound, so that the branch predictor has nothing to guess.

namespace {

struct F32Group {
  static constexpr int kBytes = 24, kOffsets = 16;
  static auto quad(const uint8_t* p) { return Simd::quad_f32(p); }
};
struct Bf16Group {
  static constexpr int kBytes = 16, kOffsets = 8;
  static auto quad(const uint8_t* p) { return Simd::quad_bf16(p); }
};

// Sets of accumulators: two FMAs a cycle with a latency of four need at least eight independent chains.
constexpr int accumulator_sets(int nv) { return nv == 1 ? 8 : nv <= 3 ? 4 : nv <= 6 ? 2 : 1; }

constexpr int kRowsAhead = 3;  // sorted rows defeat the hardware prefetcher

template <int I, int NV, class Quad>
inline __attribute__((always_inline)) void step(Simd::V (&acc)[NV], const char* x, const Quad& quad) {
  const Simd::V w = quad.template lane<I>();
  for (int v = 0; v < NV; v++)
    acc[v] = Simd::fma(w, Simd::load(reinterpret_cast<const float*>(x) + v * Simd::W), acc[v]);
}

template <class Group, int NV, int NS, int FIRST, int COUNT>
inline __attribute__((always_inline)) void group(Simd::V (&acc)[NS][NV], const char* x, const uint8_t* p) {
  uint64_t at;
  memcpy(&at, p + Group::kOffsets, 8);
  const auto quad = Group::quad(p);
  step<0>(acc[FIRST % NS], x + (at & 0xffff), quad);
  if (COUNT > 1) step<1>(acc[(FIRST + 1) % NS], x + (at >> 16 & 0xffff), quad);
  if (COUNT > 2) step<2>(acc[(FIRST + 2) % NS], x + (at >> 32 & 0xffff), quad);
  if (COUNT > 3) step<3>(acc[(FIRST + 3) % NS], x + (at >> 48), quad);
}

// `nrows` rows with 4 * groups + REST nonzeros each.
template <class Group, int NV, int REST>
__attribute__((noinline)) void tiled_rows(const uint8_t* p, const uint32_t* row, int nrows, int groups,
                                          const char* x, char* y, const float* bias, uint32_t stride,
                                          bool first) {
  constexpr int NS = accumulator_sets(NV);
  for (int r = 0; r < nrows; r++) {
    float* out = reinterpret_cast<float*>(y + row[r]);
    for (int line = 0; line < NV * Simd::W * 4; line += 64) Simd::prefetch(y + row[r + kRowsAhead] + line);
    Simd::V acc[NS][NV];
    if (first) {
      const Simd::V b = bias ? Simd::set1(bias[row[r] / stride]) : Simd::zero();
      for (int v = 0; v < NV; v++) acc[0][v] = b;
    } else {
      for (int v = 0; v < NV; v++) acc[0][v] = Simd::load(out + v * Simd::W);
    }
    for (int s = 1; s < NS; s++)
      for (int v = 0; v < NV; v++) acc[s][v] = Simd::zero();
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
      for (int v = 0; v < NV; v++) acc[0][v] = Simd::add(acc[0][v], acc[s][v]);
    for (int v = 0; v < NV; v++) Simd::store(out + v * Simd::W, acc[0][v]);
  }
}

template <class Group, int NV>
void tiled_block(const uint8_t* blob, const secateur::TiledBlock& block, const float* packed, float* y,
                 const float* bias, uint32_t stride, bool first) {
  const auto* cls = secateur::section<secateur::TiledClass>(blob, 1) + block.class_begin;
  const uint32_t* row = secateur::section<uint32_t>(blob, 2) + block.row_begin;
  const uint8_t* p = secateur::section<uint8_t>(blob, 3) + block.stream;
  const char* x = reinterpret_cast<const char*>(packed);
  char* out = reinterpret_cast<char*>(y);
  for (uint32_t c = 0; c < block.class_count; c++) {
    const int groups = static_cast<int>(cls[c].count / 4), n = static_cast<int>(cls[c].rows);
    switch (cls[c].count % 4) {
      case 0:
        tiled_rows<Group, NV, 0>(p, row, n, groups, x, out, bias, stride, first);
        break;
      case 1:
        tiled_rows<Group, NV, 1>(p, row, n, groups, x, out, bias, stride, first);
        break;
      case 2:
        tiled_rows<Group, NV, 2>(p, row, n, groups, x, out, bias, stride, first);
        break;
      default:
        tiled_rows<Group, NV, 3>(p, row, n, groups, x, out, bias, stride, first);
    }
    p += static_cast<int64_t>(n) * ((cls[c].count + 3) / 4) * Group::kBytes;
    row += n;
  }
}

template <class Group>
void tiled_typed(const uint8_t* blob, int64_t row_block, const float* packed, int tokens, const float* bias,
                 float* y) {
  const auto& h = *reinterpret_cast<const secateur::Header*>(blob);
  const uint32_t tile = h.p[0], chunk = h.p[1], stride = tile * 4;
  const int64_t chunks = secateur::ceil_div(h.cols, chunk);
  const auto* blocks = secateur::section<secateur::TiledBlock>(blob, 0) + row_block * chunks;
  int left = (tokens + Simd::W - 1) / Simd::W;
  // A short last tile computes only the vectors it needs; a tile wider than eight vectors takes several
  // passes.
  for (int done = 0; left > 0;) {
    const int nv = left >= 8 ? 8 : left >= 6 ? 6 : left >= 4 ? 4 : left;
    const float* x = packed + done * Simd::W;
    float* out = y + done * Simd::W;
    for (int64_t c = 0; c < chunks; c++) {
      const float* xc = x + c * chunk * tile;
      const bool first = c == 0;
      switch (nv) {
        case 1:
          tiled_block<Group, 1>(blob, blocks[c], xc, out, bias, stride, first);
          break;
        case 2:
          tiled_block<Group, 2>(blob, blocks[c], xc, out, bias, stride, first);
          break;
        case 3:
          tiled_block<Group, 3>(blob, blocks[c], xc, out, bias, stride, first);
          break;
        case 4:
          tiled_block<Group, 4>(blob, blocks[c], xc, out, bias, stride, first);
          break;
        case 6:
          tiled_block<Group, 6>(blob, blocks[c], xc, out, bias, stride, first);
          break;
        default:
          tiled_block<Group, 8>(blob, blocks[c], xc, out, bias, stride, first);
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
