// All kernels of one instruction set, and their table.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../blob.h"
#include "../table.h"

// For loops over registers: left to itself, GCC keeps arrays of accumulators in memory where a loop around them
// is not unrolled.
#define SECATEUR_UNROLL _Pragma("GCC unroll 16")

// In this order: each builds on the one before.
#include "vecmath.inl"
#include "tiles.inl"
#include "tiled.inl"
#include "columns.inl"
#include "block_tile.inl"
#include "block_rows.inl"
#include "bitmask.inl"
#include "nm.inl"
#include "quads.inl"
#include "norm.inl"
#include "attention.inl"
#include "repair.inl"

namespace {

const secateur::KernelTable kTable = {Simd::W,
                                      pack_tile,
                                      tiled,
                                      unpack_tile,
                                      {block_vectors(4) * Simd::W, block_vectors(8) * Simd::W},
                                      block_tile,
                                      pack_columns,
                                      block_rows,
                                      pack_masked,
                                      bitmask_rows,
                                      nm_rows,
                                      Dot::kWide,
                                      quad_pack,
                                      quad_tile,
                                      finish,
                                      norm_tile,
                                      activate_tile,
                                      kQueries,
                                      attention_tile,
                                      attention_packed,
                                      attention_scratch,
                                      repair_table<float>(),
                                      repair_table<double>()};

}  // namespace
