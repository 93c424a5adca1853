// The functions that exist once per instruction set, and how to get at them.
#pragma once
#include <cstdint>

namespace secateur {

// Loops over one row in one-shot pruning; see isa/repair.inl.
template <class T>
struct RepairTable {
  void (*sweep)(T* w, int64_t width, const T* upper, int64_t ldu, const T* inverse, uint8_t* mask, int keep,
                int of, T* errors);
  int64_t (*swap)(const T* c, const T* largest, int64_t n, T slack, T* v, T* r, T* open, uint8_t* kept);
  int64_t (*group)(const T* c, int64_t n, T slack, T* v, T* r, uint8_t* mask, int keep, int of,
                   const uint8_t* patterns, int count, const T* inverses);
};

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

  RepairTable<float> repair_f32;
  RepairTable<double> repair_f64;
};

// The table of a resolved instruction set (see sct_resolve_isa).
const KernelTable& kernel_table(int isa);

const KernelTable& portable_table();
const KernelTable& neon_table();
const KernelTable& avx2_table();
const KernelTable& avx512_table();

}  // namespace secateur
