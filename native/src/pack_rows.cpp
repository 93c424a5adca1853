// Packs weights for the formats "block" and "bitmask" (see blob.h).
#include <algorithm>
#include <new>
#include <vector>

#include "blob.h"
#include "quantise.h"
#include "writer.h"

extern "C" int sct_pack_block(const float* weight, int64_t rows, int64_t cols, int64_t ld, int value, int32_t block,
                              int32_t chunk, int32_t row_block, sct_allocate allocate, void* context) {
  using namespace secateur;
  if (!arguments_are_valid(weight, rows, cols, ld, reinterpret_cast<const void*>(allocate))) return SCT_BAD_ARGUMENT;
  if (value < SCT_F32 || value > SCT_I8 || (block != 4 && block != 8)) return SCT_BAD_ARGUMENT;
  if (chunk < 1 || chunk > kMaxBlockChunk || row_block < 1 || row_block % block) return SCT_BAD_ARGUMENT;
  try {
    std::vector<float> scales;
    if (!row_scales(weight, rows, cols, ld, value, scales)) return SCT_BAD_ARGUMENT;
    BlobWriter writer(SCT_BLOCK, static_cast<uint32_t>(value), rows, cols);
    Header& h = writer.header();
    h.p[0] = static_cast<uint32_t>(block);
    h.p[1] = static_cast<uint32_t>(chunk);
    h.p[2] = static_cast<uint32_t>(row_block);
    std::vector<uint32_t> starts;
    std::vector<uint16_t> columns;
    std::vector<uint8_t> values;
    for (int64_t rb = 0; rb < rows; rb += row_block) {
      for (int64_t c = 0; c < cols; c += chunk) {
        for (int64_t g = rb; g < std::min<int64_t>(rows, rb + row_block); g += block) {
          starts.push_back(static_cast<uint32_t>(columns.size()));
          const int64_t in_group = std::min<int64_t>(block, rows - g);
          for (int64_t k = c; k < std::min<int64_t>(cols, c + chunk); k++) {
            int nonzero = 0;
            for (int64_t r = 0; r < in_group; r++) nonzero += weight[(g + r) * ld + k] != 0.0f;
            if (!nonzero) continue;
            h.nonzeros += nonzero;
            columns.push_back(static_cast<uint16_t>(k - c));
            for (int64_t r = 0; r < block; r++)
              append_value(r < in_group ? weight[(g + r) * ld + k] : 0.0f, value,
                           value == SCT_I8 && r < in_group ? scales[g + r] : 0.0f, values);
          }
        }
      }
    }
    if (columns.size() > UINT32_MAX) return SCT_BAD_ARGUMENT;
    starts.push_back(static_cast<uint32_t>(columns.size()));
    writer.add(starts);
    writer.add(columns, kValueSlack);
    writer.add(values, kValueSlack);
    writer.add(scales);
    return writer.finish(allocate, context);
  } catch (const std::bad_alloc&) {
    return SCT_NO_MEMORY;
  }
}

extern "C" int sct_pack_bitmask(const float* weight, int64_t rows, int64_t cols, int64_t ld, int value,
                                sct_allocate allocate, void* context) {
  using namespace secateur;
  if (!arguments_are_valid(weight, rows, cols, ld, reinterpret_cast<const void*>(allocate))) return SCT_BAD_ARGUMENT;
  if (value != SCT_F32 && value != SCT_BF16 && value != SCT_I8) return SCT_BAD_ARGUMENT;
  try {
    std::vector<float> scales;
    if (!row_scales(weight, rows, cols, ld, value, scales)) return SCT_BAD_ARGUMENT;
    const int64_t words = ceil_div(cols, kBitmaskColumns);
    std::vector<uint64_t> starts, masks(rows * words);
    std::vector<uint8_t> values;
    for (int64_t r = 0; r < rows; r++) {
      starts.push_back(values.size() / value_bytes(value));
      for (int64_t k = 0; k < cols; k++) {
        const float w = weight[r * ld + k];
        if (w == 0.0f) continue;
        masks[r * words + k / 64] |= uint64_t{1} << k % 64;
        append_value(w, value, value == SCT_I8 ? scales[r] : 0.0f, values);
      }
    }
    starts.push_back(values.size() / value_bytes(value));
    BlobWriter writer(SCT_BITMASK, static_cast<uint32_t>(value), rows, cols);
    writer.header().nonzeros = starts.back();
    writer.add(starts);
    writer.add(masks);
    writer.add(values, kValueSlack);
    writer.add(scales);
    return writer.finish(allocate, context);
  } catch (const std::bad_alloc&) {
    return SCT_NO_MEMORY;
  }
}
