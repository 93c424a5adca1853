// Packs weights whose blocks of four columns of a row are zero or nonzero together, as int8 (format "quad", see
// blob.h).
#include <algorithm>
#include <new>
#include <numeric>
#include <vector>

#include "blob.h"
#include "quantise.h"
#include "writer.h"

namespace secateur {
namespace {

struct Quads {
  std::vector<TiledBlock> blocks;
  std::vector<TiledClass> classes;
  std::vector<uint32_t> rows;
  std::vector<uint8_t> stream;
};

struct Quad {
  int8_t w[4];
  uint16_t offset;
};

// The quads of one row and chunk that hold a weight that is nonzero as int8 (small weights may round to zero).
std::vector<Quad> quads_of(const int8_t* w, int64_t cols, uint32_t stride) {
  std::vector<Quad> quads;
  for (int64_t k = 0; k < cols; k += 4) {
    Quad q{};
    bool kept = false;
    for (int64_t i = 0; i < std::min<int64_t>(4, cols - k); i++) kept |= (q.w[i] = w[k + i]) != 0;
    q.offset = static_cast<uint16_t>(k / 4 * stride);
    if (kept) quads.push_back(q);
  }
  return quads;
}

// Appends quads in groups of four. An incomplete group comes first: the kernel has a template of its own for it.
void append_groups(const std::vector<Quad>& quads, std::vector<uint8_t>& stream) {
  for (size_t i = 0; i < quads.size();) {
    const size_t n = i == 0 && quads.size() % 4 ? quads.size() % 4 : 4;
    uint8_t group[kQuadGroup] = {};
    for (size_t j = 0; j < n; j++) {
      std::memcpy(group + 4 * j, quads[i + j].w, 4);
      std::memcpy(group + 16 + 2 * j, &quads[i + j].offset, 2);
    }
    stream.insert(stream.end(), group, group + kQuadGroup);
    i += n;
  }
}

void append_block(const int8_t* w, int64_t ld, int64_t rows, int64_t cols, uint32_t stride, Quads& out) {
  std::vector<std::vector<Quad>> quads(rows);
  std::vector<int64_t> order(rows);
  for (int64_t r = 0; r < rows; r++) quads[r] = quads_of(w + r * ld, cols, stride);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return quads[a].size() < quads[b].size(); });
  TiledBlock block{out.stream.size(), static_cast<uint32_t>(out.classes.size()), 0,
                   static_cast<uint32_t>(out.rows.size()), 0};
  for (int64_t r : order) {
    const auto count = static_cast<uint32_t>(quads[r].size());
    if (!count) continue;
    if (out.classes.size() == block.class_begin || out.classes.back().count != count) out.classes.push_back({count, 0});
    out.classes.back().rows++;
    out.rows.push_back(static_cast<uint32_t>(r) * stride);
    append_groups(quads[r], out.stream);
  }
  block.class_count = static_cast<uint32_t>(out.classes.size()) - block.class_begin;
  out.blocks.push_back(block);
}

}  // namespace
}  // namespace secateur

extern "C" int sct_pack_quad(const float* weight, int64_t rows, int64_t cols, int64_t ld, int32_t tile, int32_t chunk,
                             int32_t row_block, sct_allocate allocate, void* context) {
  using namespace secateur;
  if (!arguments_are_valid(weight, rows, cols, ld, reinterpret_cast<const void*>(allocate))) return SCT_BAD_ARGUMENT;
  if (cols > kMaxQuadColumns || tile < 16 || tile > kMaxTile || tile % 16) return SCT_BAD_ARGUMENT;
  if (chunk < 4 || chunk % 4 || row_block < 1) return SCT_BAD_ARGUMENT;
  const uint32_t stride = static_cast<uint32_t>(tile) * 4;
  if ((chunk / 4 - 1) * int64_t{stride} > UINT16_MAX || row_block * int64_t{stride} > UINT32_MAX)
    return SCT_BAD_ARGUMENT;
  try {
    std::vector<float> scales;
    if (!row_scales(weight, rows, cols, ld, SCT_I8, scales)) return SCT_BAD_ARGUMENT;
    std::vector<int8_t> w(rows * cols);
    std::vector<int32_t> sums(rows);
    BlobWriter writer(SCT_QUAD, SCT_I8, rows, cols);
    Header& h = writer.header();
    for (int64_t r = 0; r < rows; r++)
      for (int64_t k = 0; k < cols; k++) {
        sums[r] += w[r * cols + k] = to_i8(weight[r * ld + k], scales[r]);
        h.nonzeros += weight[r * ld + k] != 0.0f;
      }
    h.p[0] = static_cast<uint32_t>(tile);
    h.p[1] = static_cast<uint32_t>(chunk);
    h.p[2] = static_cast<uint32_t>(row_block);
    Quads q;
    for (int64_t r = 0; r < rows; r += row_block)
      for (int64_t k = 0; k < cols; k += chunk)
        append_block(w.data() + r * cols + k, cols, std::min<int64_t>(row_block, rows - r),
                     std::min<int64_t>(chunk, cols - k), stride, q);
    writer.add(q.blocks);
    writer.add(q.classes);
    writer.add(q.rows, kRowSlack * sizeof(uint32_t));
    writer.add(q.stream);
    writer.add(scales);
    writer.add(sums);
    return writer.finish(allocate, context);
  } catch (const std::bad_alloc&) {
    return SCT_NO_MEMORY;
  }
}
