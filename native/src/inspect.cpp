// Describes, validates and unpacks packed weights.
#include <new>

#include "blob.h"
#include "validate.h"
#include "visit.h"

namespace secateur {
namespace {

int check_header(const uint8_t* blob, int64_t bytes) {
  if (!blob) return SCT_BAD_ARGUMENT;
  if (reinterpret_cast<uintptr_t>(blob) % 8) return SCT_MISALIGNED;
  if (bytes < static_cast<int64_t>(sizeof(Header))) return SCT_BAD_BLOB;
  const auto& h = *reinterpret_cast<const Header*>(blob);
  if (std::memcmp(h.magic, kMagic, sizeof kMagic) || h.bytes != static_cast<uint64_t>(bytes)) return SCT_BAD_BLOB;
  if (!format_is_known(h)) return SCT_BAD_BLOB;
  if (h.format == SCT_TILED && h.p[3] != kTiledLayout) return SCT_OTHER_LAYOUT;
  if (h.rows < 1 || h.cols < 1 || h.rows > INT32_MAX || h.cols > INT32_MAX) return SCT_BAD_BLOB;
  if (h.nonzeros > uint64_t{h.rows} * h.cols) return SCT_BAD_BLOB;
  return SCT_OK;
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
    case SCT_OTHER_LAYOUT:
      return "this packed weight was written by another version of secateur; pack the weight again";
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
  try {
    return is_valid(blob) ? SCT_OK : SCT_BAD_BLOB;
  } catch (const std::bad_alloc&) {
    return SCT_NO_MEMORY;
  }
}

extern "C" int sct_unpack(const uint8_t* blob, int64_t bytes, float* weight) {
  using namespace secateur;
  if (!weight) return SCT_BAD_ARGUMENT;
  const int status = sct_validate(blob, bytes);
  if (status != SCT_OK) return status;
  const auto& h = *reinterpret_cast<const Header*>(blob);
  std::memset(weight, 0, sizeof(float) * h.rows * h.cols);
  visit(blob, [&](int64_t r, int64_t k, float v) { weight[r * h.cols + k] = v; });
  return SCT_OK;
}
