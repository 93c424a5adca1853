// Computes a call with many tokens: activations are packed into tiles, and threads share (row block, tile) pairs.
#include <algorithm>
#include <atomic>
#include <memory>

#include "blob.h"
#include "linear_call.h"
#include "pool.h"
#include "scratch.h"
#include "table.h"

namespace secateur {
namespace {

constexpr int64_t kPanelTokens = 1024;      // tokens at a time at most
constexpr int64_t kPanelFloats = 196608;    // packed activations at a time at most, so that they stay in the L2 cache
constexpr uint64_t kCachedBytes = 8 << 20;  // weights up to this size stay in the L3 cache from tile to tile

struct TileJob {
  const LinearCall* call;
  float* packed;
  int64_t tiles, row_blocks;
  std::atomic<int64_t> next_pack{0}, packed_tiles{0}, next{0};
  std::atomic<bool> not_finite{false};
  std::unique_ptr<std::atomic<int64_t>[]> row_blocks_done;  // for each tile, where call.after is set
};

bool is_block(const LinearCall& c) { return c.h->format == SCT_BLOCK; }
bool is_quad(const LinearCall& c) { return c.h->format == SCT_QUAD; }

int64_t tile_tokens(const LinearCall& c) {
  return is_block(c) ? c.kernels->block_tile_tokens[c.h->p[0] == 8] : static_cast<int64_t>(c.h->p[0]);
}

int64_t packed_floats(const LinearCall& c, int64_t tile) {
  return is_quad(c) ? (ceil_div(c.h->cols, 4) * c.kernels->quad_wide + 2) * tile : tile * c.h->cols;
}

int tokens_in_tile(const LinearCall& c, int64_t tile_index) {
  const int64_t tile = tile_tokens(c);
  return static_cast<int>(std::min<int64_t>(tile, c.tokens - tile_index * tile));
}

void tile_task(void* context) {
  auto& job = *static_cast<TileJob*>(context);
  const LinearCall& c = *job.call;
  const int64_t tile = tile_tokens(c), row_block = std::min<int64_t>(c.h->p[2], round_up(c.h->rows, 8)),
                tile_floats = packed_floats(c, tile);
  for (int64_t t; (t = job.next_pack.fetch_add(1)) < job.tiles;) {
    if ((is_quad(c) ? c.kernels->quad_pack : c.kernels->pack_tile)(c.x + t * tile * c.ldx, c.ldx, c.h->cols,
                                                                   tokens_in_tile(c, t), static_cast<int>(tile),
                                                                   job.packed + t * tile_floats))
      job.not_finite.store(true);
    job.packed_tiles.fetch_add(1, std::memory_order_release);
  }
  float* y = scratch(Scratch::kOwn, row_block * tile);
  if (!y) return;  // the other threads do the work
  for (unsigned spins = 0; job.packed_tiles.load(std::memory_order_acquire) < job.tiles;) relax(spins);
  // Row block by row block, so that all threads read the same part of the weight at a time.
  for (int64_t i; (i = job.next.fetch_add(1)) < job.tiles * job.row_blocks;) {
    const int64_t b = i / job.tiles, t = i % job.tiles, row = b * row_block;
    const int n = tokens_in_tile(c, t);
    (is_quad(c)    ? c.kernels->quad_tile
     : is_block(c) ? c.kernels->block_tile
                   : c.kernels->tiled)(c.blob, b, job.packed + t * tile_floats, n, c.bias ? c.bias + row : nullptr, y);
    c.kernels->unpack_tile(y, std::min<int64_t>(row_block, c.h->rows - row), static_cast<int>(tile), n, c.activation,
                           c.y + t * tile * c.ldy + row, c.ldy);
    // The thread that computes the last row block of a tile applies `after`. Where there is NaN, run_panel does so
    // later.
    if (c.after && !job.not_finite.load() &&
        job.row_blocks_done[t].fetch_add(1, std::memory_order_acq_rel) + 1 == job.row_blocks)
      finish_tokens(c, t * tile, t * tile + n);
  }
}

int run_panel(const LinearCall& c) {
  TileJob job;
  job.call = &c;
  job.tiles = ceil_div(c.tokens, tile_tokens(c));
  job.row_blocks = ceil_div(c.h->rows, int64_t{c.h->p[2]});
  job.packed = scratch(Scratch::kShared, job.tiles * packed_floats(c, tile_tokens(c)));
  if (!job.packed) return SCT_NO_MEMORY;
  if (c.after) job.row_blocks_done.reset(new std::atomic<int64_t>[job.tiles]());
  const int useful = static_cast<int>(std::min<int64_t>(c.threads, job.tiles * job.row_blocks));
  run_parallel(useful, tile_task, &job, c.on);
  // A thread without memory leaves its share to the others; work is left over only when no thread had memory.
  if (job.next.load() < job.tiles * job.row_blocks) return SCT_NO_MEMORY;
  if (job.not_finite.load()) {
    propagate_not_finite(c);
    if (c.after) finish_tokens(c, 0, c.tokens);
  }
  return SCT_OK;
}

}  // namespace

int run_tiles(const LinearCall& c) {
  const int64_t tile = tile_tokens(c);
  const int64_t most = std::min<int64_t>(kPanelTokens, kPanelFloats * tile / packed_floats(c, tile)) / tile * tile;
  // A single thread takes one tile at a time, so that its buffers are small: this saves 3 to 8% where other code has
  // used the caches in between.
  const bool small = c.threads == 1 && c.h->bytes <= kCachedBytes;
  const int64_t panel = small ? tile : std::max(2 * tile, most);
  return run_in_panels(c, panel, run_panel);
}

}  // namespace secateur
