// Describes, checks and unpacks packed weights.
#include <new>
#include <vector>

#include "blob.h"
#include "visit.h"

namespace secateur {
namespace {

int check_header(const uint8_t* blob, int64_t bytes) {
  if (!blob) return SCT_BAD_ARGUMENT;
  if (reinterpret_cast<uintptr_t>(blob) % 8) return SCT_MISALIGNED;
  if (bytes < static_cast<int64_t>(sizeof(Header))) return SCT_BAD_BLOB;
  const auto& h = *reinterpret_cast<const Header*>(blob);
  if (std::memcmp(h.magic, kMagic, sizeof kMagic) || h.bytes != static_cast<uint64_t>(bytes))
    return SCT_BAD_BLOB;
  if (h.format != SCT_TILED || h.value > SCT_BF16) return SCT_BAD_BLOB;
  if (h.rows < 1 || h.cols < 1 || h.rows > INT32_MAX || h.cols > INT32_MAX) return SCT_BAD_BLOB;
  return SCT_OK;
}

bool sections_in_order(const Header& h) {
  uint64_t at = sizeof(Header);
  for (uint64_t s : h.section) {
    if (s < at || s > h.bytes || s % kAlign) return false;
    at = s;
  }
  return h.section[6] == h.bytes;
}

// Every index that a kernel follows must stay inside its section; row and column offsets inside the tile.
bool tiled_is_sound(const uint8_t* blob) {
  const auto& h = *reinterpret_cast<const Header*>(blob);
  const uint64_t tile = h.p[0], chunk = h.p[1], row_block = h.p[2], stride = tile * 4;
  if (tile < 16 || tile > kMaxTile || tile % 16 || !chunk || !row_block) return false;
  if ((chunk - 1) * stride > UINT16_MAX || row_block * stride > UINT32_MAX) return false;
  const uint64_t chunks = (h.cols + chunk - 1) / chunk, blocks = (h.rows + row_block - 1) / row_block;
  const uint64_t classes = (h.section[2] - h.section[1]) / sizeof(TiledClass);
  const uint64_t row_slots = (h.section[3] - h.section[2]) / 4, stream = h.section[4] - h.section[3];
  if ((h.section[1] - h.section[0]) / sizeof(TiledBlock) < blocks * chunks) return false;
  std::vector<bool> seen(row_block);
  for (uint64_t b = 0; b < blocks * chunks; b++) {
    const TiledBlock& block = section<TiledBlock>(blob, 0)[b];
    const uint64_t rows = std::min<uint64_t>(row_block, h.rows - b / chunks * row_block);
    const uint64_t cols = std::min<uint64_t>(chunk, h.cols - b % chunks * chunk);
    if (block.class_begin > classes || block.class_count > classes - block.class_begin) return false;
    uint64_t row = block.row_begin, at = block.stream, visited = 0;
    seen.assign(row_block, false);
    for (uint32_t c = 0; c < block.class_count; c++) {
      const TiledClass cls = section<TiledClass>(blob, 1)[block.class_begin + c];
      const uint64_t groups = (static_cast<uint64_t>(cls.count) + 3) / 4;
      if (cls.count > cols || cls.rows > rows || row + cls.rows + kRowSlack > row_slots) return false;
      for (uint32_t r = 0; r < cls.rows; r++, row++) {
        const uint64_t offset = section<uint32_t>(blob, 2)[row];
        if (offset % stride || offset / stride >= rows || seen[offset / stride]) return false;
        seen[offset / stride] = true;
      }
      visited += cls.rows;
      const uint64_t end = at + groups * cls.rows * group_bytes(h.value);
      if (at > stream || end > stream) return false;
      for (; at < end; at += group_bytes(h.value)) {
        uint16_t offsets[4];
        std::memcpy(offsets, section<uint8_t>(blob, 3) + at + group_bytes(h.value) - 8, 8);
        for (uint16_t o : offsets)
          if (o % stride || o / stride >= cols) return false;
      }
    }
    if (b % chunks == 0 && visited != rows) return false;
  }
  return true;
}

}  // namespace
}  // namespace secateur

extern "C" const char* sct_error_text(int status) {
  switch (status) {
    case SCT_OK:
      return "no error";
    case SCT_BAD_ARGUMENT:
      return "an argument is null, negative or out of range";
    case SCT_BAD_BLOB:
      return "this is not a packed weight, or it is damaged; pack the weight again";
    case SCT_NO_MEMORY:
      return "out of memory";
    case SCT_UNSUPPORTED_ISA:
      return "this CPU or this build lacks the instruction set that was asked for (argument isa or "
             "SECATEUR_ISA)";
    case SCT_MISALIGNED:
      return "a packed weight must start at a multiple of 8 bytes; copy it to fresh memory";
    default:
      return "unknown error";
  }
}

extern "C" int sct_describe(const uint8_t* blob, int64_t bytes, sct_info* info) {
  using namespace secateur;
  if (!info) return SCT_BAD_ARGUMENT;
  const int status = check_header(blob, bytes);
  if (status != SCT_OK) return status;
  const auto& h = *reinterpret_cast<const Header*>(blob);
  *info = {h.rows,
           h.cols,
           static_cast<int64_t>(h.nonzeros),
           bytes,
           static_cast<int32_t>(h.format),
           static_cast<int32_t>(h.value),
           {}};
  for (int i = 0; i < 4; i++) info->p[i] = static_cast<int32_t>(h.p[i]);
  return SCT_OK;
}

extern "C" int sct_validate(const uint8_t* blob, int64_t bytes) {
  using namespace secateur;
  const int status = check_header(blob, bytes);
  if (status != SCT_OK) return status;
  const auto& h = *reinterpret_cast<const Header*>(blob);
  if (!sections_in_order(h)) return SCT_BAD_BLOB;
  try {
    return tiled_is_sound(blob) ? SCT_OK : SCT_BAD_BLOB;
  } catch (const std::bad_alloc&) {
    return SCT_NO_MEMORY;
  }
}

extern "C" int sct_unpack(const uint8_t* blob, int64_t bytes, float* weight) {
  using namespace secateur;
  if (!weight) return SCT_BAD_ARGUMENT;
  const int status = check_header(blob, bytes);
  if (status != SCT_OK) return status;
  const auto& h = *reinterpret_cast<const Header*>(blob);
  std::memset(weight, 0, sizeof(float) * h.rows * h.cols);
  visit(blob, [&](int64_t r, int64_t k, float v) { weight[r * h.cols + k] = v; });
  return SCT_OK;
}
