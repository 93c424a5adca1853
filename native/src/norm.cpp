// Computes a norm that follows no linear layer (sct_norm_on): threads share tokens.
#include <algorithm>
#include <atomic>

#include "blob.h"
#include "pool.h"
#include "secateur/kernels.h"
#include "table.h"

namespace secateur {
namespace {

constexpr int64_t kUnitFloats = 16384;  // floats that a thread takes at a time

struct NormJob {
  const KernelTable* kernels;
  const float* x;
  int64_t tokens, width, ldx, unit;
  int norm;
  const float *scale, *shift;
  float epsilon;
  float* y;
  int64_t ldy;
  std::atomic<int64_t> next{0};
};

void norm_task(void* context) {
  auto& job = *static_cast<NormJob*>(context);
  for (int64_t t; (t = job.next.fetch_add(job.unit)) < job.tokens;)
    for (const int64_t end = std::min(job.tokens, t + job.unit); t < end; t++) {
      const float* from = job.x + t * job.ldx;
      float* to = job.y + t * job.ldy;
      if (from != to) std::copy(from, from + job.width, to);
      job.kernels->finish(to, job.width, nullptr, nullptr, job.norm, job.scale, job.shift, job.epsilon);
    }
}

}  // namespace
}  // namespace secateur

extern "C" int sct_norm_on(const float* x, int64_t tokens, int64_t width, int64_t ldx, int norm, const float* scale,
                           const float* shift, float epsilon, float* y, int64_t ldy, int threads, int isa,
                           sct_run_function run, void* pool) {
  using namespace secateur;
  if (tokens < 0 || width < 1 || ldx < width || ldy < width || threads < 1 || norm < SCT_NO_NORM || norm > SCT_RMS_NORM)
    return SCT_BAD_ARGUMENT;
  if (!tokens) return SCT_OK;
  if (!x || !y) return SCT_BAD_ARGUMENT;
  const int resolved = sct_resolve_isa(isa);
  if (resolved < 0) return SCT_UNSUPPORTED_ISA;
  NormJob job;
  job.kernels = &kernel_table(resolved);
  job.x = x, job.tokens = tokens, job.width = width, job.ldx = ldx;
  job.unit = std::max<int64_t>(1, kUnitFloats / width);
  job.norm = norm, job.scale = scale, job.shift = shift, job.epsilon = epsilon;
  job.y = y, job.ldy = ldy;
  const int64_t units = ceil_div(tokens, job.unit);
  run_parallel(static_cast<int>(std::min<int64_t>(threads, units)), norm_task, &job, {run, pool});
  return SCT_OK;
}
