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
  CallerThreads on;
  const sct_after* after;
};

constexpr int kFewTokens = 16;  // with at most so many, the block format runs on block_rows, with more on block_tile

// Computes a call with many tokens, whose activations are packed into tiles: formats tiled, block and quad.
int run_tiles(const LinearCall& call);

// Computes a call with few tokens, or of a format without tiles: formats block, bitmask and nm.
int run_rows(const LinearCall& call);

// Corrects y where x holds NaN or infinity: the kernels skip zero weights, a dense product does not.
void propagate_not_finite(const LinearCall& call);

// Calls run_panel for one panel of tokens after another, until a panel fails.
int run_in_panels(const LinearCall& call, int64_t panel_tokens, int (*run_panel)(const LinearCall& panel));

// Applies call.after to the outputs of tokens [begin, end).
void finish_tokens(const LinearCall& call, int64_t begin, int64_t end);

}  // namespace secateur
