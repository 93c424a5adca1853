// The table of the functions that exist once for each instruction set.
#pragma once
#include <cstdint>

#include "secateur/kernels.h"

namespace secateur {

// Inner loops of one-shot pruning over one row; see isa/repair.inl.
template <class T>
struct RepairTable {
  void (*sweep)(T* w, int64_t width, const T* upper, int64_t ldu, const T* inverse, uint8_t* mask, int keep, int of,
                T* errors);
  int64_t (*swap)(const T* c, const T* largest, int64_t n, T slack, T* v, T* r, T* open, uint8_t* kept);
  int64_t (*group)(const T* c, int64_t n, T slack, T* v, T* r, uint8_t* mask, int keep, int of, const uint8_t* patterns,
                   int count, const T* inverses);
};

struct KernelTable {
  int width;  // floats in a vector

  // Packs `tokens` rows of x (ldx floats apart) into out[cols][tile]. Lanes after the last token are zero up to a whole
  // vector. Returns whether x holds NaN or infinity.
  bool (*pack_tile)(const float* x, int64_t ldx, int64_t cols, int tokens, int tile, float* out);

  // One row block of a tiled weight times one packed tile; y is [row block rows][tile].
  void (*tiled)(const uint8_t* blob, int64_t row_block, const float* packed, int tokens, const float* bias, float* y);

  // Applies the activation to y[rows][tile] in place, and writes the transpose to out (ldy floats from token to token).
  void (*unpack_tile)(float* y, int64_t rows, int tile, int tokens, int activation, float* out, int64_t ldy);

  // Tokens in a tile of block_tile, for blocks of four and of eight rows.
  int block_tile_tokens[2];

  // One row block of a block weight times one packed tile; y is [rows of the row block, rounded up to whole
  // blocks][tile].
  void (*block_tile)(const uint8_t* blob, int64_t row_block, const float* packed, int tokens, const float* bias,
                     float* y);

  // Packs `tokens` rows of x (ldx floats apart) into out[cols][width], with zeros after the last token. Returns whether
  // x holds NaN or infinity.
  bool (*pack_columns)(const float* x, int64_t ldx, int64_t cols, int tokens, int width, float* out);

  // One row block of a block weight times `width` (see pass_width) tokens from pack_columns, of which `tokens` exist.
  // sums is memory for [rows of the row block, rounded up to whole blocks][width].
  void (*block_rows)(const uint8_t* blob, int64_t row_block, const float* x, int width, int tokens, const float* bias,
                     int activation, float* sums, float* y, int64_t ldy);

  // Packs x into out[width][cols, padded to kBitmaskColumns], columns in the order in which bitmask_rows reads them.
  // Returns whether x holds NaN or infinity.
  bool (*pack_masked)(const float* x, int64_t ldx, int64_t cols, int tokens, int width, uint32_t value, float* out);

  // Rows [begin, end) of a bitmask weight times `width` tokens from pack_masked.
  void (*bitmask_rows)(const uint8_t* blob, int64_t begin, int64_t end, const float* x, int width, int tokens,
                       const float* bias, int activation, float* y, int64_t ldy);

  // Rows [begin, end) of an nm weight times `width` tokens from pack_masked for float32. begin is a multiple of
  // kNmRows.
  void (*nm_rows)(const uint8_t* blob, int64_t begin, int64_t end, const float* x, int width, int tokens,
                  const float* bias, int activation, float* y, int64_t ldy);

  // Packs x as uint8 quads for quad_tile (see isa/quads.inl) into ceil(cols / 4) * tile * quad_wide + 2 * tile floats.
  // Returns whether x holds NaN or infinity.
  int quad_wide;
  bool (*quad_pack)(const float* x, int64_t ldx, int64_t cols, int tokens, int tile, float* out);

  // One row block of a quad weight times one tile from quad_pack; y is [row block rows][tile].
  void (*quad_tile)(const uint8_t* blob, int64_t row_block, const float* packed, int tokens, const float* bias,
                    float* y);

  // In place, for one token: norm(y * gate + residual). norm is a sct_norm; y, gate, residual and the norm's scale and
  // shift have n numbers each, and all but y may be null.
  void (*finish)(float* y, int64_t n, const float* gate, const float* residual, int norm, const float* scale,
                 const float* shift, float epsilon);

  // For a tile: out[n][tile] = norm(y + residual); out may be y. Returns whether a sum is NaN or infinite.
  bool (*norm_tile)(const float* y, const float* residual, int64_t n, int tile, int tokens, int norm,
                    const float* scale, const float* shift, float epsilon, float* out);

  // Applies an activation to y[rows][tile] in place. Returns whether a result is NaN or infinite.
  bool (*activate_tile)(float* y, int64_t rows, int tile, int tokens, int activation);

  // Attention of n queries (at most attention_queries) of one head, from `query` on. scratch has
  // attention_scratch(width) floats.
  int attention_queries;
  void (*attention_tile)(const sct_attention_job& job, int64_t batch, int64_t head, int64_t query, int n,
                         float* scratch);

  // Attention where q, k, v and out are tiles of the layout [width][lanes] with `tile_tokens` tokens each; the strides
  // in `job` are from batch to batch, head to head and tile to tile. The queries lie in one tile. Returns whether an
  // output is NaN or infinite.
  bool (*attention_packed)(const sct_attention_job& job, int64_t lanes, int64_t tile_tokens, int64_t batch,
                           int64_t head, int64_t query, int n, float* scratch);
  int64_t (*attention_scratch)(int64_t width);

  RepairTable<float> repair_f32;
  RepairTable<double> repair_f64;
};

// The number of tokens that the kernels for few tokens take at a time when `left` tokens remain.
constexpr int pass_width(int64_t left) { return left >= 5 ? 8 : left >= 3 ? 4 : static_cast<int>(left); }

// The table of a resolved instruction set (see sct_resolve_isa).
const KernelTable& kernel_table(int isa);

const KernelTable& portable_table();
const KernelTable& neon_table();
const KernelTable& avx2_table();
const KernelTable& avx512_table();

}  // namespace secateur
