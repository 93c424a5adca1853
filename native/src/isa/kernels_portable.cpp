// The kernels for the plain C++ build. Compiled with this instruction set's own flags, so nothing here may be
// shared with other translation units: everything but the table lives in anonymous namespaces.
#include "simd_portable.h"
#include "expand_scalar.h"
#include "dot_scalar.h"
#include "lanes_scalar.h"

#include "kernels.inl"

const secateur::KernelTable& secateur::portable_table() { return kTable; }
