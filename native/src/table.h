// The functions that exist once per instruction set, and how to get at them.
#pragma once
#include <cstdint>

namespace secateur {

struct KernelTable {
  int width;  // floats in a vector

  // Packs `tokens` rows of x (ldx floats apart) into out[cols][tile]; lanes past the last token up to a whole
  // vector are zero. Returns whether x holds NaN or infinity.
  bool (*pack_tile)(const float* x, int64_t ldx, int64_t cols, int tokens, int tile, float* out);

  // One row block of a tiled weight times one packed tile; y is [row block rows][tile].
  void (*tiled)(const uint8_t* blob, int64_t row_block, const float* packed, int tokens, const float* bias,
                float* y);

  // Applies the activation to y[rows][tile] in place and writes the transpose to out (ldy floats from token
  // to token).
  void (*unpack_tile)(float* y, int64_t rows, int tile, int tokens, int activation, float* out, int64_t ldy);
};

// The table of a resolved instruction set (see sct_resolve_isa).
const KernelTable& kernel_table(int isa);

const KernelTable& portable_table();
const KernelTable& neon_table();
const KernelTable& avx2_table();
const KernelTable& avx512_table();

}  // namespace secateur
