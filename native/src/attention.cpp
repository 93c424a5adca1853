// Computes attention (sct_attention): threads share tiles of queries of every head.
#include <algorithm>
#include <atomic>

#include "blob.h"
#include "pool.h"
#include "scratch.h"
#include "table.h"

namespace secateur {
namespace {

struct AttentionRun {
  const sct_attention_job* job;
  const KernelTable* kernels;
  int64_t tiles, units;
  std::atomic<int64_t> next{0};
};

void attention_task(void* context) {
  auto& run = *static_cast<AttentionRun*>(context);
  const sct_attention_job& job = *run.job;
  float* memory = scratch(Scratch::kOwn, run.kernels->attention_scratch(job.width));
  if (!memory) return;  // the other threads do the work
  for (int64_t i; (i = run.next.fetch_add(1)) < run.units;) {
    const int64_t head = i / run.tiles, query = i % run.tiles * run.kernels->attention_queries;
    const int64_t queries = std::min<int64_t>(run.kernels->attention_queries, job.queries - query);
    run.kernels->attention_tile(job, head / job.heads, head % job.heads, query, static_cast<int>(queries), memory);
  }
}

// Where heads that share keys have one query each, the heads of a group become as many queries of one head, so that
// they lie side by side in a vector. Other jobs are returned as they are.
sct_attention_job grouped(const sct_attention_job& job) {
  sct_attention_job result = job;
  const int64_t group = job.heads / job.kv_heads;
  if (job.queries != 1 || group == 1 || (job.mask && job.mask_stride[1]) || (job.keep && job.keep_stride[1]))
    return result;
  result.heads = job.kv_heads, result.queries = group;
  result.q_stride[1] = group * job.q_stride[1], result.q_stride[2] = job.q_stride[1];
  result.out_stride[1] = group * job.out_stride[1], result.out_stride[2] = job.out_stride[1];
  result.mask_stride[2] = result.keep_stride[2] = 0;
  return result;
}

}  // namespace
}  // namespace secateur

extern "C" int sct_attention(const sct_attention_job* job, int threads, int isa, sct_run_function run, void* pool) {
  using namespace secateur;
  if (!job || threads < 1 || job->batch < 0 || job->queries < 0 || job->keys < 1 || job->width < 1)
    return SCT_BAD_ARGUMENT;
  if (job->heads < 1 || job->kv_heads < 1 || job->heads % job->kv_heads) return SCT_BAD_ARGUMENT;
  const int resolved = sct_resolve_isa(isa);
  if (resolved < 0) return SCT_UNSUPPORTED_ISA;
  if (!job->batch || !job->queries) return SCT_OK;
  if (!job->q || !job->k || !job->v || !job->out) return SCT_BAD_ARGUMENT;
  const sct_attention_job grouped_job = grouped(*job);
  AttentionRun attention;
  attention.job = &grouped_job;
  attention.kernels = &kernel_table(resolved);
  attention.tiles = ceil_div(grouped_job.queries, attention.kernels->attention_queries);
  attention.units = attention.tiles * grouped_job.heads * grouped_job.batch;
  const int useful = static_cast<int>(std::min<int64_t>(threads, attention.units));
  run_parallel(useful, attention_task, &attention, {run, pool});
  return attention.next.load() < attention.units ? SCT_NO_MEMORY : SCT_OK;
}
