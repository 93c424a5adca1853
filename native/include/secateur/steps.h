// How a table of numbers describes the steps of a chain (sct_step), for the programs that keep one.
#ifndef SECATEUR_STEPS_H_
#define SECATEUR_STEPS_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "secateur/kernels.h"

namespace secateur {

// A row a step: kind; from[3]; first[3]; the weight's place and bytes (-1 and rows: see sct_token); places of bias, scale
// and shift, -1 without; activation; norm; heads; kv_heads; width. What a place means is up to the keeper of the table.
// Beside a row stands one number: a norm's epsilon, or what attention multiplies scores by.
constexpr int64_t kStepFields = 17;

// The steps of a table of `count` rows over values of `width` numbers a token. `weight(place, bytes)` and
// `vector(place, numbers)` give the addresses, and see to it that as much lies there. Empty where the values that steps
// read do not exist; whether steps fit together otherwise is for sct_chain_rows to tell.
template <class Weight, class Vector>
std::vector<sct_step> read_steps(const int64_t* table, const float* numbers, int64_t count, int64_t width, Weight weight,
                                 Vector vector) {
  std::vector<sct_step> steps;
  std::vector<int64_t> rows{width};
  steps.reserve(count), rows.reserve(count + 1);
  for (int64_t i = 0; i < count; i++, table += kStepFields) {
    sct_step s{};
    s.kind = static_cast<int>(table[0]);
    std::copy(table + 1, table + 4, s.from);
    std::copy(table + 4, table + 7, s.first);
    s.activation = static_cast<int>(table[12]), s.norm = static_cast<int>(table[13]);
    s.heads = table[14], s.kv_heads = table[15], s.width = table[16];
    s.epsilon = s.factor = numbers[i];
    if (s.from[0] < 0 || s.from[0] > i) return {};
    int64_t wide = rows[s.from[0]];
    if (s.kind == SCT_LINEAR_STEP && table[7] == -1) {
      wide = s.bytes = table[8];  // see sct_token
    } else if (s.kind == SCT_LINEAR_STEP) {
      s.blob = weight(table[7], table[8]), s.bytes = table[8];
      sct_info info;
      if (sct_describe(s.blob, s.bytes, &info) != SCT_OK) return {};
      wide = info.rows;
    } else if (s.kind == SCT_ATTENTION_STEP) {
      if (std::min(s.heads, s.width) < 1 || std::max({s.heads, s.kv_heads, s.width}) > INT32_MAX) return {};
      wide = s.heads * s.width;
    }
    if (wide < 1 || wide > INT32_MAX) return {};
    const int64_t normed = s.kind == SCT_NORM_STEP && s.heads ? s.width : wide;
    s.bias = vector(table[9], wide), s.scale = vector(table[10], normed), s.shift = vector(table[11], normed);
    steps.push_back(s), rows.push_back(wide);
  }
  return steps;
}

}  // namespace secateur

#endif
