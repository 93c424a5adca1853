// Walks over the stored weights of a blob: visit(blob, f) calls f(row, column, value).
#pragma once
#include <algorithm>
#include <cstring>

#include "blob.h"
#include "convert.h"

namespace secateur {

inline float stored_value(const uint8_t* values, int64_t i, uint32_t type) {
  if (type == SCT_F32) {
    float f;
    std::memcpy(&f, values + 4 * i, 4);
    return f;
  }
  uint16_t h;
  std::memcpy(&h, values + 2 * i, 2);
  return from_bf16(h);
}

template <class F>
void visit(const uint8_t* blob, F f) {
  const auto& h = *reinterpret_cast<const Header*>(blob);
  const int64_t stride = static_cast<int64_t>(h.p[0]) * 4, chunk = h.p[1], row_block = h.p[2];
  const int64_t chunks = ceil_div(h.cols, chunk), n = ceil_div(h.rows, row_block) * chunks;
  const int bytes = group_bytes(h.value);
  for (int64_t b = 0; b < n; b++) {
    const TiledBlock& block = section<TiledBlock>(blob, 0)[b];
    const uint8_t* p = section<uint8_t>(blob, 3) + block.stream;
    const uint32_t* row = section<uint32_t>(blob, 2) + block.row_begin;
    for (uint32_t c = 0; c < block.class_count; c++) {
      const TiledClass cls = section<TiledClass>(blob, 1)[block.class_begin + c];
      for (uint32_t r = 0; r < cls.rows; r++, row++) {
        for (uint32_t i = 0, rest = cls.count % 4; i < cls.count; p += bytes) {
          const uint32_t in_group = i == 0 && rest ? rest : 4;
          for (uint32_t j = 0; j < in_group; j++, i++) {
            uint16_t at;
            std::memcpy(&at, p + bytes - 8 + 2 * j, 2);
            f(b / chunks * row_block + *row / stride, b % chunks * chunk + at / stride,
              stored_value(p, j, h.value));
          }
        }
      }
    }
  }
}

}  // namespace secateur
