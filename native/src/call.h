// One call of sct_linear as the runners of the formats see it, and the memory that they share.
#pragma once
#include <cstdint>

#include "blob.h"
#include "pool.h"
#include "table.h"

namespace secateur {

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
  Threads on;
  const sct_after* after;
};

constexpr int kFewTokens = 16;  // up to here the block format runs on block_rows, above on block_tile

// Many tokens, activations in tiles: the tiled format, and the block format.
int run_tiles(const Call& call);

// Few tokens, or a format that knows no tiles.
int run_rows(const Call& call);

// Mends y where x holds NaN or infinity: the kernels skip zero weights; a dense product does not.
void spread_not_finite(const Call& call);

// What comes after the outputs of tokens [begin, end).
void finish_tokens(const Call& call, int64_t begin, int64_t end);

// A buffer of the calling thread that grows and is reused by its next call; null when memory is out. Buffers
// of different `slot`s (0, 1 or 2) are independent.
float* scratch(int slot, int64_t floats);

}  // namespace secateur
