// All kernels of one instruction set, and their table.
#include <cstdint>
#include <cstring>

#include "../blob.h"
#include "../table.h"

// In this order: each builds on the one before.
#include "vecmath.inl"
#include "tiles.inl"
#include "tiled.inl"
#include "repair.inl"

namespace {

const secateur::KernelTable kTable = {
    Simd::W, pack_tile, tiled, unpack_tile, repair_table<float>(), repair_table<double>()};

}  // namespace
