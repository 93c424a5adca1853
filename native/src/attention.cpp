// Attention between the layers: threads share tiles of queries of every head.
#include <algorithm>
#include <atomic>

#include "blob.h"
#include "pool.h"
#include "scratch.h"
#include "table.h"

namespace secateur {
namespace {

struct AttentionJob {
  const sct_attention_job* call;
  const KernelTable* kernels;
  int64_t tiles, units;
  std::atomic<int64_t> next{0};
};

void attention_task(void* context) {
  auto& job = *static_cast<AttentionJob*>(context);
  const sct_attention_job& c = *job.call;
  float* memory = scratch(Scratch::kOwn, job.kernels->attention_scratch(c.width));
  if (!memory) return;  // the other threads do the work
  for (int64_t i; (i = job.next.fetch_add(1)) < job.units;) {
    const int64_t head = i / job.tiles, query = i % job.tiles * job.kernels->attention_queries;
    job.kernels->attention_tile(c, head / c.heads, head % c.heads, query,
                                static_cast<int>(std::min<int64_t>(job.kernels->attention_queries, c.queries - query)),
                                memory);
  }
}

}  // namespace
}  // namespace secateur

namespace secateur {

// One query whose heads share keys: the heads of a group are as many queries of one head, side by side in a vector.
static sct_attention_job grouped(const sct_attention_job& call) {
  sct_attention_job job = call;
  const int64_t group = call.heads / call.kv_heads;
  if (call.queries != 1 || group == 1 || (call.mask && call.mask_stride[1]) || (call.keep && call.keep_stride[1])) return job;
  job.heads = call.kv_heads, job.queries = group;
  job.q_stride[1] = group * call.q_stride[1], job.q_stride[2] = call.q_stride[1];
  job.out_stride[1] = group * call.out_stride[1], job.out_stride[2] = call.out_stride[1];
  job.mask_stride[2] = job.keep_stride[2] = 0;
  return job;
}

}  // namespace secateur

extern "C" int sct_attention(const sct_attention_job* call, int threads, int isa, sct_run_function run, void* pool) {
  using namespace secateur;
  if (!call || threads < 1 || call->batch < 0 || call->queries < 0 || call->keys < 1 || call->width < 1)
    return SCT_BAD_ARGUMENT;
  if (call->heads < 1 || call->kv_heads < 1 || call->heads % call->kv_heads) return SCT_BAD_ARGUMENT;
  const int resolved = sct_resolve_isa(isa);
  if (resolved < 0) return SCT_UNSUPPORTED_ISA;
  if (!call->batch || !call->queries) return SCT_OK;
  if (!call->q || !call->k || !call->v || !call->out) return SCT_BAD_ARGUMENT;
  const sct_attention_job shared = grouped(*call);
  call = &shared;
  AttentionJob job;
  job.call = call;
  job.kernels = &kernel_table(resolved);
  job.tiles = ceil_div(call->queries, job.kernels->attention_queries);
  job.units = job.tiles * call->heads * call->batch;
  run_parallel(static_cast<int>(std::min<int64_t>(threads, job.units)), attention_task, &job, {run, pool});
  return job.next.load() < job.units ? SCT_NO_MEMORY : SCT_OK;
}
