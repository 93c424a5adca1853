// One call of sct_linear, and the functions that compute it.
#pragma once
#include <cstdint>

#include "blob.h"
#include "pool.h"
#include "table.h"

namespace secateur {

struct LinearCall {
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
  Threads on;
  const sct_after* after;
};

constexpr int kFewTokens = 16;  // up to here the block format runs on block_rows, above on block_tile

// Many tokens, activations in tiles: the tiled format, and the block format.
int run_tiles(const LinearCall& call);

// Few tokens, or a format that knows no tiles.
int run_rows(const LinearCall& call);

// Mends y where x holds NaN or infinity: the kernels skip zero weights; a dense product does not.
void spread_not_finite(const LinearCall& call);

// Calls run_panel for `panel_tokens` tokens after another, until one fails.
int run_in_panels(const LinearCall& call, int64_t panel_tokens, int (*run_panel)(const LinearCall& panel));

// What comes after the outputs of tokens [begin, end).
void finish_tokens(const LinearCall& call, int64_t begin, int64_t end);

}  // namespace secateur
