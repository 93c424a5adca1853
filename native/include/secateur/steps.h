// Reads steps (sct_step) from a table of numbers, for the Python module and the operators of ONNX Runtime.
#ifndef SECATEUR_STEPS_H_
#define SECATEUR_STEPS_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "secateur/kernels.h"

namespace secateur {

// Each step is a row of the table: kind; from[3]; first[3]; the weight's address and bytes (-1 and rows: see
// sct_token); the addresses of bias, scale and shift, -1 where there is none; activation; norm; heads; kv_heads; width.
// What an address means is up to the user of the table. With each row goes one number: the epsilon of a norm, or the
// factor by which attention multiplies scores.
constexpr int64_t kStepFields = 17;
constexpr int64_t kMostSteps = 1 << 20;  // sums over the values of so many steps stay below 2^63

// The steps of a table of `count` rows; x has `width` numbers a token. `weight(address, bytes)` and
// `vector(address, numbers)` return pointers, and check that so much lies there. Returns no steps where there are too
// many, or a step reads a value that does not exist or holds an impossible number; sct_chain_rows and sct_token_floats
// check whether steps fit together.
template <class Weight, class Vector>
std::vector<sct_step> read_steps(const int64_t* table, const float* numbers, int64_t count, int64_t width,
                                 Weight weight, Vector vector) {
  std::vector<sct_step> steps;
  std::vector<int64_t> rows{width};
  if (count < 1 || count > kMostSteps || width < 1 || width > INT32_MAX) return {};
  steps.reserve(count), rows.reserve(count + 1);
  for (int64_t i = 0; i < count; i++, table += kStepFields) {
    sct_step s{};
    for (int64_t field : {table[0], table[12], table[13], table[14], table[15], table[16]})
      if (field < 0 || field > INT32_MAX) return {};
    s.kind = static_cast<int>(table[0]);
    std::copy(table + 1, table + 4, s.from);
    std::copy(table + 4, table + 7, s.first);
    s.activation = static_cast<int>(table[12]), s.norm = static_cast<int>(table[13]);
    s.heads = table[14], s.kv_heads = table[15], s.width = table[16];
    s.epsilon = s.factor = numbers[i];
    if (s.from[0] < 0 || s.from[0] > i) return {};
    int64_t rows_written = rows[s.from[0]];
    if (s.kind == SCT_LINEAR_STEP && table[7] == -1) {
      rows_written = s.bytes = table[8];  // see sct_token
    } else if (s.kind == SCT_LINEAR_STEP) {
      s.blob = weight(table[7], table[8]), s.bytes = table[8];
      sct_info info;
      if (sct_describe(s.blob, s.bytes, &info) != SCT_OK) return {};
      rows_written = info.rows;
    } else if (s.kind == SCT_ATTENTION_STEP) {
      if (std::min(s.heads, s.width) < 1) return {};
      rows_written = s.heads * s.width;
    }
    if (rows_written < 1 || rows_written > INT32_MAX) return {};
    const int64_t normed = s.kind == SCT_NORM_STEP && s.heads ? s.width : rows_written;
    s.bias = vector(table[9], rows_written), s.scale = vector(table[10], normed), s.shift = vector(table[11], normed);
    steps.push_back(s), rows.push_back(rows_written);
  }
  return steps;
}

}  // namespace secateur

#endif
