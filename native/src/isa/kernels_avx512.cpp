// The kernels for AVX-512. Compiled with flags of its own, so nothing here may be shared with other translation units:
// everything but the table lives in anonymous namespaces.
#include "simd_avx512.h"

#include "dot_avx512.h"
#include "expand_avx512.h"
#include "lanes_avx512.h"

#include "kernels.inl"

const secateur::KernelTable& secateur::avx512_table() { return kTable; }
