// All kernels of one instruction set, and their table.
#pragma once
#include "attention.inl"
#include "bitmask.inl"
#include "block_rows.inl"
#include "block_tile.inl"
#include "common.inl"
#include "nm.inl"
#include "norm.inl"
#include "pack_activations.inl"
#include "quads.inl"
#include "repair.inl"
#include "tiled.inl"
#include "vecmath.inl"

namespace {

constexpr secateur::KernelTable make_table() {
  secateur::KernelTable t{};
  t.width = Simd::W;
  t.pack_tile = pack_tile;
  t.unpack_tile = unpack_tile;
  t.pack_columns = pack_columns;
  t.pack_masked = pack_masked;
  t.tiled = tiled;
  t.block_tile_tokens[0] = block_vectors(4) * Simd::W;
  t.block_tile_tokens[1] = block_vectors(8) * Simd::W;
  t.block_tile = block_tile;
  t.block_rows = block_rows;
  t.bitmask_rows = bitmask_rows;
  t.nm_rows = nm_rows;
  t.quad_wide = Dot::kWide;
  t.quad_pack = quad_pack;
  t.quad_tile = quad_tile;
  t.finish = finish;
  t.norm_tile = norm_tile;
  t.activate_tile = activate_tile;
  t.attention_queries = kQueries;
  t.attention_scratch = attention_scratch;
  t.attention_tile = attention_tile;
  t.attention_packed = attention_packed;
  t.repair_f32 = repair_table<float>();
  t.repair_f64 = repair_table<double>();
  return t;
}

constexpr secateur::KernelTable kTable = make_table();

}  // namespace
