// The kernels for NEON. Compiled with flags of its own, so nothing here may be shared with other translation units:
// everything but the table lives in anonymous namespaces.
#include "simd_neon.h"

#include "dot_scalar.h"
#include "expand_scalar.h"
#include "lanes_scalar.h"

#include "kernels.inl"

const secateur::KernelTable& secateur::neon_table() { return kTable; }
