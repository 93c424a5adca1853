// The kernels for AVX2 and FMA. Compiled with flags of its own, so nothing here may be shared with other translation
// units: everything but the table lives in anonymous namespaces.
#include "simd_avx2.h"

#include "dot_avx2.h"
#include "expand_avx2.h"
#include "lanes_avx2.h"

#include "kernels.inl"

const secateur::KernelTable& secateur::avx2_table() { return kTable; }
