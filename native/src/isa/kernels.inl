// All kernels of one instruction set, and their table.
#include <cstdint>
#include <cstring>

#include "../blob.h"
#include "../table.h"
#include "vecmath.inl"

#include "tiles.inl"

#include "tiled.inl"

namespace {

const secateur::KernelTable kTable = {Simd::W, pack_tile, tiled, unpack_tile, nullptr, nullptr, nullptr};

}  // namespace
