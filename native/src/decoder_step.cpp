// Runs one token of each sequence through the steps of a decoder's block (sct_token), one step after another.
#include <algorithm>
#include <new>
#include <vector>

#include "blob.h"
#include "secateur/kernels.h"
#include "table.h"

namespace secateur {
namespace {

// The rows (numbers a token) of the value that a step writes, given the rows of the values before it; negative where
// the step does not fit the values that it reads.
int64_t rows_of(const sct_step& s, const std::vector<int64_t>& rows) {
  const auto known = static_cast<int64_t>(rows.size());
  for (int64_t from : s.from)
    if (from < -1 || from >= known) return -1;
  if (s.from[0] < 0) return -1;
  const int64_t rows_read = rows[s.from[0]];
  auto has_rows = [&](int64_t value, int64_t expected) { return value < 0 || rows[value] == expected; };
  auto heads_fit = [&] {
    return s.heads > 0 && s.width > 0 && rows_read % s.heads == 0 && rows_read / s.heads == s.width;
  };
  switch (s.kind) {
    case SCT_LINEAR_STEP: {
      sct_info info;
      if (!s.blob) return s.bytes > 0 ? s.bytes : -1;  // a layer of s.bytes rows that the caller computes
      if (sct_describe(s.blob, s.bytes, &info) != SCT_OK || info.cols != rows_read) return -1;
      if (s.activation < SCT_NONE || s.activation > SCT_SILU) return -1;
      return has_rows(s.from[1], info.rows) && has_rows(s.from[2], info.rows) ? info.rows : -1;
    }
    case SCT_NORM_STEP:
      if (s.norm < SCT_NO_NORM || s.norm > SCT_RMS_NORM || !has_rows(s.from[1], rows_read)) return -1;
      return s.heads == 0 || (s.from[1] < 0 && heads_fit()) ? rows_read : -1;
    case SCT_ATTENTION_STEP:
      if (!heads_fit() || s.kv_heads < 1 || s.heads % s.kv_heads || s.from[1] < 0 || s.from[2] < 0) return -1;
      return has_rows(s.from[1], s.kv_heads * s.width) && has_rows(s.from[2], s.kv_heads * s.width) ? rows_read : -1;
    case SCT_ROTARY_STEP:
      return heads_fit() && s.width % 2 == 0 ? rows_read : -1;
    case SCT_GATE_STEP:
      return s.from[1] >= 0 && has_rows(s.from[1], rows_read) ? rows_read : -1;
    default:
      return -1;
  }
}

// The rows of x and of all values; empty where steps do not fit together.
std::vector<int64_t> all_rows(const sct_step* steps, int64_t count, int64_t width) {
  std::vector<int64_t> rows{width};
  for (int64_t i = 0; i < count; i++) {
    const int64_t rows_written = rows_of(steps[i], rows);
    if (rows_written < 1) return {};
    rows.push_back(rows_written);
  }
  return rows;
}

int attend(const sct_token_job& job, const sct_step& s, const float* q, float* out, int threads, int isa,
           sct_run_function run, void* pool) {
  sct_attention_job a{};
  a.q = q, a.k = job.k, a.v = job.v, a.out = out;
  a.batch = job.batch, a.heads = s.heads, a.kv_heads = s.kv_heads, a.queries = 1, a.keys = job.keys, a.width = s.width;
  for (auto* stride : {a.q_stride, a.out_stride}) stride[0] = stride[2] = s.heads * s.width, stride[1] = s.width;
  std::copy(job.k_stride, job.k_stride + 3, a.k_stride);
  std::copy(job.v_stride, job.v_stride + 3, a.v_stride);
  a.mask = job.mask, a.keep = job.keep, a.scale = s.factor;
  std::copy(job.mask_stride, job.mask_stride + 3, a.mask_stride);
  std::copy(job.mask_stride, job.mask_stride + 3, a.keep_stride);
  return sct_attention(&a, threads, isa, run, pool);
}

}  // namespace
}  // namespace secateur

extern "C" int64_t sct_token_floats(const sct_step* steps, int64_t count, int64_t width) {
  if (!steps || count < 1 || width < 1) return -1;
  const std::vector<int64_t> rows = secateur::all_rows(steps, count, width);
  int64_t floats = 0;
  for (size_t v = 1; v < rows.size(); v++) floats += rows[v];
  return rows.empty() ? -1 : floats;
}

extern "C" int sct_token(const sct_token_job* job, int64_t begin, int64_t end, int threads, int isa,
                         sct_run_function run, void* pool) {
  using namespace secateur;
  if (!job || !job->steps || job->count < 1 || job->width < 1 || job->batch < 0 || threads < 1 || begin < 0 ||
      end > job->count)
    return SCT_BAD_ARGUMENT;
  const int resolved = sct_resolve_isa(isa);
  if (resolved < 0) return SCT_UNSUPPORTED_ISA;
  try {
    const std::vector<int64_t> rows = all_rows(job->steps, job->count, job->width);
    if (rows.empty()) return SCT_BAD_ARGUMENT;
    if (!job->batch) return SCT_OK;
    if (!job->x || !job->values) return SCT_BAD_ARGUMENT;
    std::vector<int64_t> first(rows.size());
    for (size_t v = 2; v < rows.size(); v++) first[v] = first[v - 1] + rows[v - 1] * job->batch;
    auto at = [&](int64_t value) -> const float* {
      return value < 0 ? nullptr : value == 0 ? job->x : job->values + first[value];
    };
    for (int64_t i = begin; i < end; i++) {
      const sct_step& s = job->steps[i];
      const int64_t rows_written = rows[i + 1], batch = job->batch;
      const float *x = at(s.from[0]), *second = at(s.from[1]);
      float* y = job->values + first[i + 1];
      int status = SCT_OK;
      if (s.kind == SCT_LINEAR_STEP) {
        const sct_after after{at(s.from[2]), rows_written, SCT_NO_NORM, nullptr, nullptr, 0, second, rows_written};
        if (!s.blob) return SCT_BAD_ARGUMENT;
        status = sct_linear_on(s.blob, s.bytes, x, batch, rows[s.from[0]], s.bias, s.activation,
                               after.gate || after.residual ? &after : nullptr, y, rows_written, threads, resolved, run,
                               pool);
      } else if (s.kind == SCT_NORM_STEP && !second) {
        const int64_t width = s.heads ? s.width : rows_written;
        status = sct_norm_on(x, batch * rows_written / width, width, width, s.norm, s.scale, s.shift, s.epsilon, y,
                             width, threads, resolved, run, pool);
      } else if (s.kind == SCT_NORM_STEP) {
        std::copy(x, x + batch * rows_written, y);
        for (int64_t t = 0; t < batch; t++)
          kernel_table(resolved).finish(y + t * rows_written, rows_written, nullptr, second + t * rows_written, s.norm,
                                        s.scale, s.shift, s.epsilon);
      } else if (s.kind == SCT_GATE_STEP) {
        for (int64_t k = 0; k < batch * rows_written; k++) y[k] = x[k] * second[k];
      } else if (s.kind == SCT_ROTARY_STEP) {
        const int64_t stride[] = {rows_written, s.width, rows_written};
        status = sct_rotary(x, stride, batch, s.heads, 1, s.width, job->cos, job->sin, job->turn_stride, y, stride);
      } else {
        status = attend(*job, s, x, y, threads, resolved, run, pool);
      }
      if (status != SCT_OK) return status;
    }
    return SCT_OK;
  } catch (const std::bad_alloc&) {
    return SCT_NO_MEMORY;
  }
}
