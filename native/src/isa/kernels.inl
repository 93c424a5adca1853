// All kernels of one instruction set, and their table.
#include <cstdint>
#include <cstring>

#include "../blob.h"
#include "../table.h"

// In this order: each builds on the one before.
#include "vecmath.inl"
#include "tiles.inl"
#include "tiled.inl"

namespace {

const secateur::KernelTable kTable = {Simd::W, pack_tile, tiled, unpack_tile};

}  // namespace
