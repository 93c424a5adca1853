// Multiplies activations by a packed weight: checks arguments, splits the work over threads, mends NaN.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "blob.h"
#include "pool.h"
#include "table.h"
#include "visit.h"

namespace secateur {
namespace {

constexpr int64_t kPanelTokens = 1024;     // bounds the packed copy of the activations
constexpr double kMacsPerThread = 200000;  // less work than this is not worth waking a thread

struct Free {
  void operator()(float* p) const { std::free(p); }
};

// A buffer of the calling thread that grows and is reused by its next call; null when memory is out. Buffers
// of different `slot`s are independent.
float* scratch(int slot, int64_t floats) {
  struct Buffer {
    std::unique_ptr<float, Free> data;
    int64_t floats = 0;
  };
  static thread_local Buffer buffers[2];
  Buffer& b = buffers[slot];
  if (b.floats < floats) {
    b.floats = 0;
    b.data.reset();
    const int64_t bytes = round_up(floats * 4 + 4096, 4096);
    b.data.reset(static_cast<float*>(std::aligned_alloc(4096, static_cast<size_t>(bytes))));
    if (!b.data) return nullptr;
    b.floats = floats;
  }
  return b.data.get();
}

struct Call {
  const uint8_t* blob;
  const Header* h;
  const KernelTable* kernels;
  const float* x;
  int64_t tokens, ldx;
  const float* bias;
  int activation;
  float* y;
  int64_t ldy;
  int threads;
};

struct TiledJob {
  const Call* call;
  float* packed;
  int64_t tiles, row_blocks;
  std::atomic<int64_t> next_pack{0}, packed_tiles{0}, next{0};
  std::atomic<bool> odd{false};
};

int tokens_in_tile(const Call& c, int64_t tile_index) {
  const int64_t tile = c.h->p[0];
  return static_cast<int>(std::min<int64_t>(tile, c.tokens - tile_index * tile));
}

void tiled_task(void* context) {
  auto& job = *static_cast<TiledJob*>(context);
  const Call& c = *job.call;
  const int64_t tile = c.h->p[0], row_block = c.h->p[2], tile_floats = tile * c.h->cols;
  for (int64_t t; (t = job.next_pack.fetch_add(1)) < job.tiles;) {
    if (c.kernels->pack_tile(c.x + t * tile * c.ldx, c.ldx, c.h->cols, tokens_in_tile(c, t),
                             static_cast<int>(tile), job.packed + t * tile_floats))
      job.odd.store(true);
    job.packed_tiles.fetch_add(1, std::memory_order_release);
  }
  float* y = scratch(1, row_block * tile);
  if (!y) return;  // the other threads do the work
  for (unsigned spins = 0; job.packed_tiles.load(std::memory_order_acquire) < job.tiles;) relax(spins);
  // Row block by row block, so that all threads read the same part of the weight at a time.
  for (int64_t i; (i = job.next.fetch_add(1)) < job.tiles * job.row_blocks;) {
    const int64_t b = i / job.tiles, t = i % job.tiles, row = b * row_block;
    const int n = tokens_in_tile(c, t);
    c.kernels->tiled(c.blob, b, job.packed + t * tile_floats, n, c.bias ? c.bias + row : nullptr, y);
    c.kernels->unpack_tile(y, std::min<int64_t>(row_block, c.h->rows - row), static_cast<int>(tile), n,
                           c.activation, c.y + t * tile * c.ldy + row, c.ldy);
  }
}

// The kernels skip zero weights; a dense product does not: 0 * inf and 0 * NaN are NaN. Output o of a token
// keeps its value only if the weight is nonzero at every column where the token is not finite.
void spread_not_finite(const Call& c) {
  std::vector<int32_t> hits(c.h->rows);
  std::vector<char> odd(c.h->cols);
  for (int64_t t = 0; t < c.tokens; t++) {
    int32_t n = 0;
    for (int64_t k = 0; k < c.h->cols; k++) n += odd[k] = !std::isfinite(c.x[t * c.ldx + k]);
    if (!n) continue;
    std::fill(hits.begin(), hits.end(), 0);
    visit(c.blob, [&](int64_t row, int64_t k, float v) { hits[row] += odd[k] && v != 0.0f; });
    for (int64_t o = 0; o < c.h->rows; o++)
      if (hits[o] < n) c.y[t * c.ldy + o] = std::numeric_limits<float>::quiet_NaN();
  }
}

int run_tiled_panel(const Call& c) {
  TiledJob job;
  job.call = &c;
  job.tiles = ceil_div(c.tokens, c.h->p[0]);
  job.row_blocks = ceil_div(c.h->rows, c.h->p[2]);
  job.packed = scratch(0, job.tiles * c.h->p[0] * c.h->cols);
  if (!job.packed) return SCT_NO_MEMORY;
  const int useful = static_cast<int>(std::min<int64_t>(c.threads, job.tiles * job.row_blocks));
  run_parallel(useful, tiled_task, &job);
  // A helper without memory leaves its share to the others; only when nobody could work is something missing.
  if (job.next.load() < job.tiles * job.row_blocks) return SCT_NO_MEMORY;
  if (job.odd.load()) spread_not_finite(c);
  return SCT_OK;
}

int run_tiled(Call c) {
  const int64_t tile = c.h->p[0], panel = std::max(tile, kPanelTokens / tile * tile), tokens = c.tokens;
  for (int64_t t = 0; t < tokens; t += panel) {
    Call part = c;
    part.x += t * c.ldx;
    part.y += t * c.ldy;
    part.tokens = std::min(panel, tokens - t);
    const int status = run_tiled_panel(part);
    if (status != SCT_OK) return status;
  }
  return SCT_OK;
}

}  // namespace
}  // namespace secateur

extern "C" int sct_linear(const uint8_t* blob, int64_t bytes, const float* x, int64_t tokens, int64_t ldx,
                          const float* bias, int activation, float* y, int64_t ldy, int threads, int isa) {
  using namespace secateur;
  sct_info info;
  const int status = sct_describe(blob, bytes, &info);
  if (status != SCT_OK) return status;
  if (tokens < 0 || threads < 1 || activation < SCT_NONE || activation > SCT_SILU) return SCT_BAD_ARGUMENT;
  if (tokens == 0) return SCT_OK;
  if (!x || !y || ldx < info.cols || ldy < info.rows) return SCT_BAD_ARGUMENT;
  const int resolved = sct_resolve_isa(isa);
  if (resolved < 0) return SCT_UNSUPPORTED_ISA;
  const double macs = static_cast<double>(info.nonzeros) * static_cast<double>(tokens);
  const int worthwhile = static_cast<int>(std::min(1024.0, 1 + macs / kMacsPerThread));
  Call call{blob,
            reinterpret_cast<const Header*>(blob),
            &kernel_table(resolved),
            x,
            tokens,
            ldx,
            bias,
            activation,
            y,
            ldy,
            std::min(threads, worthwhile)};
  try {
    return run_tiled(call);
  } catch (const std::bad_alloc&) {
    return SCT_NO_MEMORY;
  }
}
