// The kernels in plain C++. Compiled with flags of its own, so nothing here may be shared with other translation units:
// everything but the table lives in anonymous namespaces.
#include "simd_portable.h"

#include "dot_scalar.h"
#include "expand_scalar.h"
#include "lanes_scalar.h"

#include "kernels.inl"

const secateur::KernelTable& secateur::portable_table() { return kTable; }
