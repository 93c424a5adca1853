#include "validate.h"

#include <array>
#include <cstring>
#include <vector>

#include "visit.h"

namespace secateur {
namespace {

bool sections_in_order(const Header& h) {
  uint64_t at = sizeof(Header);
  for (uint64_t s : h.section) {
    if (s < at || s > h.bytes || s % kAlign) return false;
    at = s;
  }
  return h.section[6] == h.bytes;
}

// The columns that the rows of a row block name. A chunk of the tiled format sees at most 1024 columns, the last of
// which are new, so that only the last columns of each row are kept.
class NamedColumns {
 public:
  explicit NamedColumns(int64_t rows) : rows_(static_cast<size_t>(rows)) {}

  // Notes a weight; false where its row has named the column before with a weight that is not zero. Such a pair of
  // weights would be added up by the kernels, while one of them would stand in the dense weight.
  bool add(int64_t row, int64_t column, bool nonzero) {
    Row& r = rows_[static_cast<size_t>(row)];
    const int64_t word = column / 64;
    for (r.last = std::max(r.last, word - kWords); r.last < word;) r.bits[static_cast<size_t>(++r.last % kWords)] = 0;
    uint64_t& bits = r.bits[static_cast<size_t>(word % kWords)];
    const uint64_t bit = uint64_t{1} << column % 64;
    if (bits & bit) return false;
    if (nonzero) bits |= bit;
    return true;
  }

 private:
  static constexpr int64_t kWords = 32;
  struct Row {
    int64_t last = -1;
    std::array<uint64_t, kWords> bits{};
  };
  std::vector<Row> rows_;
};

// Whether no row of a tiled weight, all of whose indices are valid, names a column twice.
bool columns_differ(const uint8_t* blob) {
  const auto& h = *reinterpret_cast<const Header*>(blob);
  const int64_t row_block = std::min<int64_t>(h.p[2], h.rows);
  int64_t block = 0;
  bool differ = true;
  NamedColumns named(row_block);
  visit_tiled(blob, [&](int64_t row, int64_t column, float value) {
    if (row / row_block != block) {
      block = row / row_block;
      named = NamedColumns(row_block);
    }
    differ &= named.add(row % row_block, column, value != 0.0f);
  });
  return differ;
}

// Every index that a kernel follows must stay inside its section, row and column offsets inside the tile.
bool tiled_is_valid(const uint8_t* blob) {
  const auto& h = *reinterpret_cast<const Header*>(blob);
  const uint64_t tile = h.p[0], chunk = h.p[1], row_block = h.p[2], stride = tile * 4;
  if (tile < 16 || tile > kMaxTile || tile % 16 || !chunk || !row_block) return false;
  if (h.carried > UINT16_MAX || (chunk + h.carried - 1) * stride > UINT16_MAX) return false;
  if (row_block * stride > UINT32_MAX) return false;
  const uint64_t chunks = (h.cols + chunk - 1) / chunk, blocks = (h.rows + row_block - 1) / row_block;
  const uint64_t runs = (h.section[2] - h.section[1]) / sizeof(TiledRun);
  const uint64_t row_slots = (h.section[3] - h.section[2]) / 4, stream = h.section[4] - h.section[3];
  if ((h.section[1] - h.section[0]) / sizeof(TiledBlock) < blocks * chunks) return false;
  std::vector<bool> seen;
  for (uint64_t b = 0; b < blocks * chunks; b++) {
    const TiledBlock& block = section<TiledBlock>(blob, 0)[b];
    const uint64_t rows = std::min<uint64_t>(row_block, h.rows - b / chunks * row_block);
    const uint64_t cols = std::min<uint64_t>((b % chunks + 1) * chunk, h.cols) - first_seen(h, b % chunks);
    if (block.class_begin > runs || block.class_count > runs - block.class_begin) return false;
    uint64_t row = block.row_begin, at = block.stream, visited = 0;
    seen.assign(rows, false);
    for (uint32_t c = 0; c < block.class_count; c++) {
      const TiledRun run = section<TiledRun>(blob, 1)[block.class_begin + c];
      if (run.count > cols || run.rows > rows || row + run.rows + kRowSlack > row_slots) return false;
      if (run.together != 1 && run.together != 2) return false;
      if (run.rows % run.together || run.shared % 4 || run.shared > (run.together == 2 ? run.count : 0)) return false;
      for (uint32_t r = 0; r < run.rows; r++, row++) {
        const uint64_t offset = section<uint32_t>(blob, 2)[row];
        if (offset % stride || offset / stride >= rows || seen[offset / stride]) return false;
        seen[offset / stride] = true;
      }
      visited += run.rows;
      const uint64_t bytes = group_bytes(h.value), shared = shared_bytes(h.value);
      const uint64_t own = (run.count - run.shared + 3) / 4 * run.together;  // groups
      if (at > stream || run_bytes(run, bytes, shared) > stream - at) return false;
      for (uint32_t r = 0; r < run.rows; r += run.together) {
        for (uint64_t g = 0; g < own + run.shared / 4; g++) {
          at += g < own ? bytes : shared;
          uint16_t offsets[4];
          std::memcpy(offsets, section<uint8_t>(blob, 3) + at - sizeof offsets, sizeof offsets);
          for (uint16_t o : offsets)
            if (o % stride || o / stride >= cols) return false;
        }
      }
    }
    if (b % chunks == 0 && visited != rows) return false;
  }
  return columns_differ(blob);
}

uint64_t section_bytes(const Header& h, int i) { return h.section[i + 1] - h.section[i]; }

bool has_scales(const Header& h, int i) {
  return h.value != SCT_I8 || section_bytes(h, i) >= static_cast<uint64_t>(h.rows) * sizeof(float);
}

bool block_is_valid(const uint8_t* blob) {
  const auto& h = *reinterpret_cast<const Header*>(blob);
  if ((h.p[0] != 4 && h.p[0] != 8) || h.p[1] < 1 || h.p[1] > kMaxBlockChunk) return false;
  if (h.p[2] < 1 || h.p[2] > INT32_MAX || h.p[2] % h.p[0]) return false;
  const BlockShape s(h);
  const auto groups = static_cast<uint64_t>(s.groups());
  if (section_bytes(h, 0) / sizeof(uint32_t) < groups + 1) return false;
  const auto* start = section<uint32_t>(blob, 0);
  const uint64_t total = start[groups];
  if (section_bytes(h, 1) < total * sizeof(uint16_t) + kValueSlack) return false;
  if (section_bytes(h, 2) < total * s.block * value_bytes(h.value) + kValueSlack) return false;
  if (start[0] || !has_scales(h, 3)) return false;
  for (int64_t rb = 0; rb < s.row_blocks; rb++) {
    for (int64_t c = 0; c < s.chunks; c++) {
      const int64_t first = s.first(rb, c), cols = std::min<int64_t>(s.chunk, h.cols - c * s.chunk);
      for (int64_t g = first; g < first + s.groups_in(rb); g++) {
        if (start[g + 1] < start[g] || start[g + 1] > total) return false;
        for (uint64_t i = start[g]; i < start[g + 1]; i++) {
          const auto* column = section<uint16_t>(blob, 1) + i;
          if (*column >= cols || (i > start[g] && *column <= column[-1])) return false;
        }
      }
    }
  }
  return true;
}

bool bitmask_is_valid(const uint8_t* blob) {
  const auto& h = *reinterpret_cast<const Header*>(blob);
  const int64_t words = ceil_div(h.cols, kBitmaskColumns), rest = h.cols % kBitmaskColumns;
  const auto rows = static_cast<uint64_t>(h.rows);
  if (section_bytes(h, 0) / sizeof(uint64_t) < rows + 1) return false;
  if (section_bytes(h, 1) / sizeof(uint64_t) / words < rows) return false;
  if (!has_scales(h, 3)) return false;
  const auto *start = section<uint64_t>(blob, 0), *mask = section<uint64_t>(blob, 1);
  uint64_t at = 0;
  for (uint64_t r = 0; r < rows; r++, mask += words) {
    if (start[r] != at) return false;
    for (int64_t k = 0; k < words; k++) at += __builtin_popcountll(mask[k]);
    if (rest && mask[words - 1] >> rest) return false;
  }
  return start[rows] == at && section_bytes(h, 2) >= at * value_bytes(h.value) + kValueSlack;
}

// Like tiled_is_valid, with quads in place of columns; rows may be left out.
bool quad_is_valid(const uint8_t* blob) {
  const auto& h = *reinterpret_cast<const Header*>(blob);
  const uint64_t tile = h.p[0], chunk = h.p[1], row_block = h.p[2], stride = tile * 4;
  if (tile < 16 || tile > kMaxTile || tile % 16 || chunk < 4 || chunk % 4 || !row_block) return false;
  if (h.cols > kMaxQuadColumns || (chunk / 4 - 1) * stride > UINT16_MAX || row_block * stride > UINT32_MAX)
    return false;
  const uint64_t chunks = (h.cols + chunk - 1) / chunk, blocks = (h.rows + row_block - 1) / row_block;
  const uint64_t classes = section_bytes(h, 1) / sizeof(TiledClass), row_slots = section_bytes(h, 2) / 4;
  const uint64_t stream = section_bytes(h, 3);
  if (section_bytes(h, 0) / sizeof(TiledBlock) / chunks < blocks || row_slots < kRowSlack) return false;
  if (!has_scales(h, 4) || section_bytes(h, 5) / sizeof(int32_t) < h.rows) return false;
  std::vector<int64_t> sums(h.rows);
  std::vector<bool> seen, named;
  for (uint64_t b = 0; b < blocks * chunks; b++) {
    const TiledBlock& block = section<TiledBlock>(blob, 0)[b];
    const uint64_t first_row = b / chunks * row_block, rows = std::min<uint64_t>(row_block, h.rows - first_row);
    const uint64_t first_column = b % chunks * chunk,
                   quads = (std::min<uint64_t>(chunk, h.cols - first_column) + 3) / 4;
    if (block.class_begin > classes || block.class_count > classes - block.class_begin) return false;
    uint64_t row = block.row_begin, at = block.stream;
    seen.assign(rows, false);
    for (uint32_t c = 0; c < block.class_count; c++) {
      const TiledClass cls = section<TiledClass>(blob, 1)[block.class_begin + c];
      if (!cls.count || cls.count > quads || cls.rows > rows || row + cls.rows + kRowSlack > row_slots) return false;
      const uint64_t groups = (static_cast<uint64_t>(cls.count) + 3) / 4;
      if (at > stream || groups * cls.rows * kQuadGroup > stream - at) return false;
      for (uint32_t r = 0; r < cls.rows; r++, row++) {
        const uint64_t offset = section<uint32_t>(blob, 2)[row];
        if (offset % stride || offset / stride >= rows || seen[offset / stride]) return false;
        seen[offset / stride] = true;
        named.assign(quads, false);
        for (uint64_t g = 0; g < groups; g++, at += kQuadGroup) {
          uint16_t offsets[4];
          int8_t weights[16];
          std::memcpy(weights, section<uint8_t>(blob, 3) + at, sizeof weights);
          std::memcpy(offsets, section<uint8_t>(blob, 3) + at + sizeof weights, sizeof offsets);
          const uint64_t count = g == 0 && cls.count % 4 ? cls.count % 4 : 4;
          for (uint64_t i = 0; i < 4; i++) {
            const uint64_t quad = offsets[i] / stride;
            if (offsets[i] % stride || quad >= quads || (i < count && named[quad])) return false;
            if (i >= count) continue;
            named[quad] = true;
            for (uint64_t k = 0; k < 4; k++) {
              sums[first_row + offset / stride] += weights[4 * i + k];
              if (weights[4 * i + k] && first_column + 4 * quad + k >= h.cols) return false;
            }
          }
        }
      }
    }
  }
  for (uint64_t r = 0; r < h.rows; r++)
    if (section<int32_t>(blob, 5)[r] != sums[r]) return false;
  return true;
}

// No index can be out of its group. The columns of a group differ, and a column past the end has a weight of zero.
bool nm_is_valid(const uint8_t* blob) {
  const auto& h = *reinterpret_cast<const Header*>(blob);
  if (!nm_is_known(h.p[0], h.p[1]) || !has_scales(h, 1)) return false;
  const NmShape s(h);
  const uint64_t bytes = section_bytes(h, 0);
  if (bytes < kValueSlack || (bytes - kValueSlack) / s.bytes() < static_cast<uint64_t>(s.row_sets)) return false;
  bool valid = true;
  int64_t in_group = 0, named = 0;  // of the row and group that is visited: stored weights, and a bit for each column
  visit_nm(blob, [&](int64_t, int64_t column, float value) {
    if (in_group == s.keep) in_group = named = 0;
    const int64_t bit = int64_t{1} << column % h.p[1];
    valid &= !(named & bit) && (column < h.cols || value == 0.0f);
    named |= bit, in_group++;
  });
  return valid;
}

}  // namespace

bool format_is_known(const Header& h) {
  switch (h.format) {
    case SCT_TILED:
      return h.value <= SCT_BF16;
    case SCT_BLOCK:
      return h.value <= SCT_I8;
    case SCT_BITMASK:
      return h.value == SCT_F32 || h.value == SCT_BF16 || h.value == SCT_I8;
    case SCT_NM:
      return h.value <= SCT_I8;
    case SCT_QUAD:
      return h.value == SCT_I8;
    default:
      return false;
  }
}

bool is_valid(const uint8_t* blob) {
  const auto& h = *reinterpret_cast<const Header*>(blob);
  if (!sections_in_order(h)) return false;
  switch (h.format) {
    case SCT_BLOCK:
      return block_is_valid(blob);
    case SCT_BITMASK:
      return bitmask_is_valid(blob);
    case SCT_NM:
      return nm_is_valid(blob);
    case SCT_QUAD:
      return quad_is_valid(blob);
    default:
      return tiled_is_valid(blob);
  }
}

}  // namespace secateur
