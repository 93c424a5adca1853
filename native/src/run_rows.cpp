// Computes a call with few tokens: weights are read once and in order, and threads share ranges of rows.
#include <algorithm>
#include <atomic>

#include "blob.h"
#include "linear_call.h"
#include "pool.h"
#include "scratch.h"
#include "table.h"

namespace secateur {
namespace {

constexpr int64_t kBitmaskRows = 64;   // rows of a bitmask or nm weight that a thread takes at a time
constexpr int64_t kPanelTokens = 256;  // tokens at a time, which bounds the packed copy of the activations

struct RowJob {
  const LinearCall* call;
  const float* x;
  int64_t unit_rows, units, columns;
  std::atomic<int64_t> next{0};
};

void row_task(void* context) {
  auto& job = *static_cast<RowJob*>(context);
  const LinearCall& c = *job.call;
  const bool block = c.h->format == SCT_BLOCK;
  float* sums = block ? scratch(Scratch::kOwn, round_up(std::min<int64_t>(job.unit_rows, c.h->rows), 8) * 8) : nullptr;
  if (block && !sums) return;  // the other threads do the work
  for (int64_t i; (i = job.next.fetch_add(1)) < job.units;) {
    const int64_t row = i * job.unit_rows, end = std::min<int64_t>(row + job.unit_rows, c.h->rows);
    const float* bias = c.bias ? c.bias + row : nullptr;
    for (int64_t t = 0; t < c.tokens;) {
      const int width = pass_width(c.tokens - t), n = static_cast<int>(std::min<int64_t>(width, c.tokens - t));
      const float* x = job.x + t * job.columns;
      float* y = c.y + t * c.ldy + row;
      if (block)
        c.kernels->block_rows(c.blob, i, x, width, n, bias, c.activation, sums, y, c.ldy);
      else
        (c.h->format == SCT_NM ? c.kernels->nm_rows : c.kernels->bitmask_rows)(c.blob, row, end, x, width, n, bias,
                                                                               c.activation, y, c.ldy);
      t += width;
    }
  }
}

int run_panel(const LinearCall& c) {
  const bool block = c.h->format == SCT_BLOCK;
  RowJob job;
  job.call = &c;
  job.unit_rows = block ? c.h->p[2] : kBitmaskRows;
  job.units = ceil_div(c.h->rows, job.unit_rows);
  job.columns = block ? c.h->cols : round_up(c.h->cols, kBitmaskColumns);
  float* packed = scratch(Scratch::kShared, (c.tokens + 7) * job.columns);
  if (!packed) return SCT_NO_MEMORY;
  const uint32_t order = c.h->format == SCT_NM ? uint32_t{SCT_F32} : c.h->value;
  bool not_finite = false;
  for (int64_t t = 0; t < c.tokens;) {
    const int width = pass_width(c.tokens - t), n = static_cast<int>(std::min<int64_t>(width, c.tokens - t));
    const float* x = c.x + t * c.ldx;
    float* to = packed + t * job.columns;
    not_finite |= block ? c.kernels->pack_columns(x, c.ldx, c.h->cols, n, width, to)
                        : c.kernels->pack_masked(x, c.ldx, c.h->cols, n, width, order, to);
    t += width;
  }
  job.x = packed;
  run_parallel(static_cast<int>(std::min<int64_t>(c.threads, job.units)), row_task, &job, c.on);
  if (job.next.load() < job.units) return SCT_NO_MEMORY;
  if (not_finite) propagate_not_finite(c);
  if (c.after) finish_tokens(c, 0, c.tokens);
  return SCT_OK;
}

}  // namespace

int run_rows(const LinearCall& c) { return run_in_panels(c, kPanelTokens, run_panel); }

}  // namespace secateur
