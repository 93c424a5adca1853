// Multiplies activations by a packed weight (sct_linear): checks arguments, chooses the runner, propagates NaN.
#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "blob.h"
#include "linear_call.h"
#include "visit.h"

namespace secateur {
namespace {

constexpr double kMacsPerThread = 200000;  // less work than this is not worth waking a thread

// Computes a token that uint8 cannot hold in float32, without c.after.
void compute_in_float(const LinearCall& c, int64_t t) {
  const int64_t rows = c.h->rows, width = c.kernels->width;
  std::vector<float> y(rows * width);
  for (int64_t o = 0; o < rows; o++) y[o * width] = c.bias ? c.bias[o] : 0.0f;
  const float* x = c.x + t * c.ldx;
  visit(c.blob, [&](int64_t row, int64_t k, float v) { y[row * width] += v != 0.0f ? v * x[k] : 0.0f; });
  c.kernels->unpack_tile(y.data(), rows, static_cast<int>(width), 1, c.activation, c.y + t * c.ldy, c.ldy);
}

}  // namespace

// 0 * infinity and 0 * NaN are NaN: output o of a token keeps its value only if the weight is nonzero at every column
// where the token is not finite.
void propagate_not_finite(const LinearCall& c) {
  std::vector<int32_t> hits(c.h->rows);
  std::vector<char> not_finite(c.h->cols);
  for (int64_t t = 0; t < c.tokens; t++) {
    int32_t n = 0;
    for (int64_t k = 0; k < c.h->cols; k++) n += not_finite[k] = !std::isfinite(c.x[t * c.ldx + k]);
    if (!n) continue;
    if (c.h->format == SCT_QUAD) compute_in_float(c, t);
    std::fill(hits.begin(), hits.end(), 0);
    visit(c.blob, [&](int64_t row, int64_t k, float v) { hits[row] += not_finite[k] && v != 0.0f; });
    for (int64_t o = 0; o < c.h->rows; o++)
      if (hits[o] < n) c.y[t * c.ldy + o] = std::numeric_limits<float>::quiet_NaN();
  }
}

int run_in_panels(const LinearCall& c, int64_t panel_tokens, int (*run_panel)(const LinearCall& panel)) {
  for (int64_t t = 0; t < c.tokens; t += panel_tokens) {
    LinearCall panel = c;
    panel.x += t * c.ldx;
    panel.y += t * c.ldy;
    panel.tokens = std::min(panel_tokens, c.tokens - t);
    sct_after after;
    if (c.after) {
      after = *c.after;
      if (after.residual) after.residual += t * after.ld;
      if (after.gate) after.gate += t * after.gate_ld;
      panel.after = &after;
    }
    const int status = run_panel(panel);
    if (status != SCT_OK) return status;
  }
  return SCT_OK;
}

void finish_tokens(const LinearCall& c, int64_t begin, int64_t end) {
  const sct_after& a = *c.after;
  for (int64_t t = begin; t < end; t++)
    c.kernels->finish(c.y + t * c.ldy, c.h->rows, a.gate ? a.gate + t * a.gate_ld : nullptr,
                      a.residual ? a.residual + t * a.ld : nullptr, a.norm, a.scale, a.shift, a.epsilon);
}

}  // namespace secateur

extern "C" int sct_linear(const uint8_t* blob, int64_t bytes, const float* x, int64_t tokens, int64_t ldx,
                          const float* bias, int activation, float* y, int64_t ldy, int threads, int isa) {
  return sct_linear_on(blob, bytes, x, tokens, ldx, bias, activation, nullptr, y, ldy, threads, isa, nullptr, nullptr);
}

extern "C" int sct_linear_on(const uint8_t* blob, int64_t bytes, const float* x, int64_t tokens, int64_t ldx,
                             const float* bias, int activation, const sct_after* after, float* y, int64_t ldy,
                             int threads, int isa, sct_run_function run, void* pool) {
  using namespace secateur;
  sct_info info;
  const int status = sct_describe(blob, bytes, &info);
  if (status != SCT_OK) return status;
  if (tokens < 0 || threads < 1 || activation < SCT_NONE || activation > SCT_SILU) return SCT_BAD_ARGUMENT;
  if (tokens == 0) return SCT_OK;
  if (!x || !y || ldx < info.cols || ldy < info.rows) return SCT_BAD_ARGUMENT;
  if (after && (after->norm < SCT_NO_NORM || after->norm > SCT_RMS_NORM || (after->residual && after->ld < info.rows) ||
                (after->gate && after->gate_ld < info.rows)))
    return SCT_BAD_ARGUMENT;
  const int resolved = sct_resolve_isa(isa);
  if (resolved < 0) return SCT_UNSUPPORTED_ISA;
  const double macs = static_cast<double>(info.nonzeros) * static_cast<double>(tokens);
  const int worthwhile = static_cast<int>(std::min(1024.0, 1 + macs / kMacsPerThread));
  LinearCall call{blob,
                  reinterpret_cast<const Header*>(blob),
                  &kernel_table(resolved),
                  x,
                  tokens,
                  ldx,
                  bias,
                  activation,
                  y,
                  ldy,
                  std::min(threads, worthwhile),
                  {run, pool},
                  after};
  try {
    const bool by_rows =
        info.format == SCT_BITMASK || info.format == SCT_NM || (info.format == SCT_BLOCK && tokens <= kFewTokens);
    return by_rows ? run_rows(call) : run_tiles(call);
  } catch (const std::bad_alloc&) {
    return SCT_NO_MEMORY;
  }
}
