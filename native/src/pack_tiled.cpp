// Packs an unstructured sparse weight for many tokens (format "tiled", see blob.h).
#include <algorithm>
#include <new>
#include <numeric>
#include <vector>

#include "blob.h"
#include "convert.h"
#include "writer.h"

namespace secateur {
namespace {

struct Tiled {
  std::vector<TiledBlock> blocks;
  std::vector<TiledClass> classes;
  std::vector<uint32_t> rows;
  std::vector<uint8_t> stream;
  uint64_t nonzeros = 0;
};

// One row's nonzeros of a chunk. The incomplete group, if any, comes first: the kernel then runs it with its
// own template and falls into the loop over whole groups.
void append_row(const float* w, int32_t cols, uint32_t count, uint32_t stride, uint32_t value,
                std::vector<uint8_t>& stream) {
  float values[4] = {};
  uint16_t offsets[4] = {};
  uint32_t filled = 0, flush_at = count % 4 ? count % 4 : 4;
  auto flush = [&] {
    uint8_t group[24];
    if (value == SCT_F32) {
      std::memcpy(group, values, 16);
    } else {
      for (int i = 0; i < 4; i++) {
        uint16_t h = to_bf16(values[i]);
        std::memcpy(group + 2 * i, &h, 2);
      }
    }
    int at = group_bytes(value) - 8;
    std::memcpy(group + at, offsets, 8);
    stream.insert(stream.end(), group, group + at + 8);
    std::fill(values, values + 4, 0.0f);
    std::fill(offsets, offsets + 4, uint16_t{0});
    filled = 0;
    flush_at = 4;
  };
  for (int32_t k = 0; k < cols; k++) {
    if (w[k] == 0.0f) continue;
    values[filled] = w[k];
    offsets[filled] = static_cast<uint16_t>(k * stride);
    if (++filled == flush_at) flush();
  }
}

void append_block(const float* w, int64_t ld, int32_t rows, int32_t cols, uint32_t stride, uint32_t value,
                  bool first_chunk, Tiled& out) {
  std::vector<uint32_t> count(rows);
  std::vector<int32_t> order(rows);
  for (int32_t r = 0; r < rows; r++)
    count[r] = static_cast<uint32_t>(
        std::count_if(w + r * ld, w + r * ld + cols, [](float v) { return v != 0.0f; }));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return count[a] < count[b]; });

  TiledBlock block{out.stream.size(), static_cast<uint32_t>(out.classes.size()), 0,
                   static_cast<uint32_t>(out.rows.size()), 0};
  for (size_t i = 0; i < order.size();) {
    size_t j = i;
    while (j < order.size() && count[order[j]] == count[order[i]]) j++;
    // The first chunk initialises every accumulator; later chunks need not visit rows without nonzeros.
    if (count[order[i]] || first_chunk) {
      out.classes.push_back({count[order[i]], static_cast<uint32_t>(j - i)});
      for (size_t r = i; r < j; r++) {
        out.rows.push_back(static_cast<uint32_t>(order[r]) * stride);
        out.nonzeros += count[order[r]];
        append_row(w + order[r] * ld, cols, count[order[r]], stride, value, out.stream);
      }
    }
    i = j;
  }
  block.class_count = static_cast<uint32_t>(out.classes.size()) - block.class_begin;
  out.blocks.push_back(block);
}

}  // namespace
}  // namespace secateur

extern "C" int sct_pack_tiled(const float* weight, int64_t rows, int64_t cols, int64_t ld, int value,
                              int32_t tile, int32_t chunk, int32_t row_block, sct_allocate allocate,
                              void* context) {
  using namespace secateur;
  if (!weight || !allocate || rows < 1 || cols < 1 || ld < cols || rows > INT32_MAX || cols > INT32_MAX)
    return SCT_BAD_ARGUMENT;
  if (value != SCT_F32 && value != SCT_BF16) return SCT_BAD_ARGUMENT;
  if (tile < 16 || tile > kMaxTile || tile % 16 || chunk < 1 || row_block < 1) return SCT_BAD_ARGUMENT;
  if (static_cast<int64_t>(chunk - 1) * tile * 4 > UINT16_MAX) return SCT_BAD_ARGUMENT;
  if (static_cast<int64_t>(row_block) * tile * 4 > UINT32_MAX) return SCT_BAD_ARGUMENT;
  try {
    Tiled t;
    const uint32_t stride = static_cast<uint32_t>(tile) * 4;
    for (int64_t r = 0; r < rows; r += row_block)
      for (int64_t k = 0; k < cols; k += chunk)
        append_block(weight + r * ld + k, ld, static_cast<int32_t>(std::min<int64_t>(row_block, rows - r)),
                     static_cast<int32_t>(std::min<int64_t>(chunk, cols - k)), stride,
                     static_cast<uint32_t>(value), k == 0, t);
    BlobWriter writer(SCT_TILED, static_cast<uint32_t>(value), rows, cols);
    Header& h = writer.header();
    h.nonzeros = t.nonzeros;
    h.p[0] = static_cast<uint32_t>(tile);
    h.p[1] = static_cast<uint32_t>(chunk);
    h.p[2] = static_cast<uint32_t>(row_block);
    writer.add(t.blocks);
    writer.add(t.classes);
    writer.add(t.rows, kRowSlack * sizeof(uint32_t));
    writer.add(t.stream);
    return writer.finish(allocate, context);
  } catch (const std::bad_alloc&) {
    return SCT_NO_MEMORY;
  }
}
