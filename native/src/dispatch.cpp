// Chooses the instruction set at run time.
#include <cstdlib>
#include <cstring>

#include "secateur/kernels.h"
#include "table.h"

#ifdef SECATEUR_AVX
#include <cpuid.h>
#endif

namespace {

const char* const kNames[] = {"auto", "portable", "neon", "avx2", "avx512"};

#ifdef SECATEUR_AVX
// __builtin_cpu_supports of GCC 12 has no name for F16C.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

bool available(int isa) {
  switch (isa) {
    case SCT_ISA_PORTABLE:
      return true;
#ifdef SECATEUR_NEON
    case SCT_ISA_NEON:
      return true;
#endif
#ifdef SECATEUR_AVX
    // __builtin_cpu_supports also asks the operating system whether it saves the registers.
    case SCT_ISA_AVX2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    case SCT_ISA_AVX512:
      return available(SCT_ISA_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vbmi2") &&
             __builtin_cpu_supports("avx512vnni");  // every CPU with VBMI2 has VNNI
#endif
    default:
      return false;
  }
}

int best() {
  const int order[] = {SCT_ISA_AVX512, SCT_ISA_AVX2, SCT_ISA_NEON};
  for (int isa : order)
    if (available(isa)) return isa;
  return SCT_ISA_PORTABLE;
}

// The instruction set that the environment variable SECATEUR_ISA names, the best one where it is not set, or -1 for a
// name that is unknown or not available.
int from_environment() {
  const char* name = std::getenv("SECATEUR_ISA");
  if (!name || !*name || !std::strcmp(name, "auto")) return best();
  for (int isa = SCT_ISA_PORTABLE; isa <= SCT_ISA_AVX512; isa++)
    if (!std::strcmp(name, kNames[isa])) return available(isa) ? isa : -1;
  return -1;
}

}  // namespace

extern "C" int sct_resolve_isa(int requested) {
  if (requested == SCT_ISA_AUTO) {
    static const int chosen = from_environment();
    return chosen;
  }
  return available(requested) ? requested : -1;
}

extern "C" const char* sct_isa_name(int isa) {
  return isa >= SCT_ISA_AUTO && isa <= SCT_ISA_AVX512 ? kNames[isa] : "unknown";
}

const secateur::KernelTable& secateur::kernel_table(int isa) {
  switch (isa) {
#ifdef SECATEUR_NEON
    case SCT_ISA_NEON:
      return neon_table();
#endif
#ifdef SECATEUR_AVX
    case SCT_ISA_AVX2:
      return avx2_table();
    case SCT_ISA_AVX512:
      return avx512_table();
#endif
    default:
      return portable_table();
  }
}
