// Visits the stored weights of a blob: visit(blob, f) calls f(row, column, value) for each. visit_nm also visits
// columns past the end, which the last group of a row may store.
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
  if (type == SCT_I8) return static_cast<float>(static_cast<int8_t>(values[i]));
  uint16_t h;
  std::memcpy(&h, values + 2 * i, 2);
  return type == SCT_BF16 ? from_bf16(h) : from_f16(h);
}

template <class F>
void visit_tiled(const uint8_t* blob, F f) {
  const auto& h = *reinterpret_cast<const Header*>(blob);
  const int64_t stride = static_cast<int64_t>(h.p[0]) * 4, chunk = h.p[1], row_block = h.p[2];
  const int64_t chunks = ceil_div(h.cols, chunk), n = ceil_div(h.rows, row_block) * chunks;
  const int bytes = group_bytes(h.value);
  for (int64_t b = 0; b < n; b++) {
    const TiledBlock& block = section<TiledBlock>(blob, 0)[b];
    const uint8_t* p = section<uint8_t>(blob, 3) + block.stream;
    const uint32_t* row = section<uint32_t>(blob, 2) + block.row_begin;
    for (uint32_t c = 0; c < block.class_count; c++) {
      const TiledRun run = section<TiledRun>(blob, 1)[block.class_begin + c];
      const uint32_t together = run.together == 2 ? 2 : 1;
      for (uint32_t r = 0; r < run.rows; r += together, row += together) {
        // The first n nonzeros of the group of four at p, whose offsets are at `offsets`; `member` is the row of the
        // pair.
        auto visit_group = [&](const uint8_t* offsets, uint32_t member, uint32_t n) {
          for (uint32_t j = 0; j < n; j++) {
            uint16_t at;
            std::memcpy(&at, offsets + 2 * j, 2);
            f(b / chunks * row_block + row[member] / stride, first_seen(h, b % chunks) + at / stride,
              stored_value(p, j, h.value));
          }
        };
        const uint32_t own = run.count - run.shared;
        for (uint32_t i = 0; i < own;) {
          const uint32_t n = i == 0 && own % 4 ? own % 4 : 4;
          for (uint32_t member = 0; member < together; member++, p += bytes) visit_group(p + bytes - 8, member, n);
          i += n;
        }
        for (uint32_t i = 0; i < run.shared; i += 4, p += bytes) {
          visit_group(p + 2 * (bytes - 8), 0, 4);
          p += bytes - 8;
          visit_group(p + bytes - 8, 1, 4);
        }
      }
    }
  }
}

template <class F>
void visit_block(const uint8_t* blob, F f) {
  const auto& h = *reinterpret_cast<const Header*>(blob);
  const BlockShape s(h);
  const auto* columns = section<uint16_t>(blob, 1);
  const auto* values = section<uint8_t>(blob, 2);
  const auto* scales = section<float>(blob, 3);
  for (int64_t rb = 0; rb < s.row_blocks; rb++) {
    for (int64_t c = 0; c < s.chunks; c++) {
      const uint32_t* start = section<uint32_t>(blob, 0) + s.first(rb, c);
      for (int64_t g = 0; g < s.groups_in(rb); g++) {
        const int64_t row = rb * s.row_block + g * s.block;
        for (int64_t i = start[g]; i < start[g + 1]; i++)
          for (int64_t r = 0; r < s.block && row + r < h.rows; r++)
            f(row + r, c * s.chunk + columns[i],
              stored_value(values, i * s.block + r, h.value) * (h.value == SCT_I8 ? scales[row + r] : 1.0f));
      }
    }
  }
}

template <class F>
void visit_bitmask(const uint8_t* blob, F f) {
  const auto& h = *reinterpret_cast<const Header*>(blob);
  const int64_t words = ceil_div(h.cols, kBitmaskColumns);
  for (int64_t r = 0; r < h.rows; r++) {
    uint64_t at = section<uint64_t>(blob, 0)[r];
    const float scale = h.value == SCT_I8 ? section<float>(blob, 3)[r] : 1.0f;
    for (int64_t k = 0; k < words; k++)
      for (uint64_t m = section<uint64_t>(blob, 1)[r * words + k]; m; m &= m - 1, at++)
        f(r, k * 64 + __builtin_ctzll(m),
          stored_value(section<uint8_t>(blob, 2), static_cast<int64_t>(at), h.value) * scale);
  }
}

template <class F>
void visit_quad(const uint8_t* blob, F f) {
  const auto& h = *reinterpret_cast<const Header*>(blob);
  const int64_t stride = static_cast<int64_t>(h.p[0]) * 4, chunk = h.p[1], row_block = h.p[2];
  const int64_t chunks = ceil_div(h.cols, chunk), n = ceil_div(h.rows, row_block) * chunks;
  for (int64_t b = 0; b < n; b++) {
    const TiledBlock& block = section<TiledBlock>(blob, 0)[b];
    const uint8_t* p = section<uint8_t>(blob, 3) + block.stream;
    const uint32_t* at = section<uint32_t>(blob, 2) + block.row_begin;
    for (uint32_t c = 0; c < block.class_count; c++) {
      const TiledClass cls = section<TiledClass>(blob, 1)[block.class_begin + c];
      for (uint32_t r = 0; r < cls.rows; r++, at++) {
        const int64_t row = b / chunks * row_block + *at / stride;
        for (uint32_t i = 0, in_group = cls.count % 4; i < cls.count; i += in_group, in_group = 4, p += kQuadGroup) {
          if (!in_group) in_group = 4;
          for (uint32_t j = 0; j < in_group; j++) {
            uint16_t offset;
            std::memcpy(&offset, p + 16 + 2 * j, 2);
            const int64_t column = b % chunks * chunk + offset / stride * 4;
            for (int64_t k = 0; k < 4 && column + k < h.cols; k++)
              f(row, column + k, stored_value(p, 4 * j + k, SCT_I8) * section<float>(blob, 4)[row]);
          }
        }
      }
    }
  }
}

template <class F>
void visit_nm(const uint8_t* blob, F f) {
  const auto& h = *reinterpret_cast<const Header*>(blob);
  const NmShape s(h);
  const auto* p = section<uint8_t>(blob, 0);
  for (int64_t first = 0; first < h.rows; first += kNmRows)
    for (int64_t g = 0; g < s.groups; g += s.period) {
      const int64_t fields = std::min(s.period, s.groups - g) * s.keep;
      const uint8_t* values = p + s.words * kNmRows * 4;
      for (int64_t lane = 0; lane < std::min<int64_t>(kNmRows, h.rows - first); lane++) {
        const float scale = h.value == SCT_I8 ? section<float>(blob, 1)[first + lane] : 1.0f;
        for (int64_t i = 0; i < fields; i++) {
          uint32_t word;
          std::memcpy(&word, p + (i / s.fields * kNmRows + lane) * 4, 4);
          const int64_t k = (g + i / s.keep) * h.p[1] + (word >> i % s.fields * s.bits & (h.p[1] - 1));
          f(first + lane, k, stored_value(values, i * kNmRows + lane, h.value) * scale);
        }
      }
      p = values + fields * kNmRows * s.value;
    }
}

template <class F>
void visit(const uint8_t* blob, F f) {
  switch (reinterpret_cast<const Header*>(blob)->format) {
    case SCT_BLOCK:
      return visit_block(blob, f);
    case SCT_BITMASK:
      return visit_bitmask(blob, f);
    case SCT_NM:
      return visit_nm(blob, [&](int64_t row, int64_t column, float value) {
        if (column < reinterpret_cast<const Header*>(blob)->cols) f(row, column, value);
      });
    case SCT_QUAD:
      return visit_quad(blob, f);
    default:
      return visit_tiled(blob, f);
  }
}

}  // namespace secateur
