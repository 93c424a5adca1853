// Packs weights with at most `keep` nonzeros in every `of` columns of a row (N:M, format "nm", see blob.h).
#include <algorithm>
#include <new>
#include <vector>

#include "blob.h"
#include "quantise.h"
#include "writer.h"

namespace secateur {
namespace {

// The columns of a group that are stored: its nonzeros, then zeros up to `keep`. Returns false when the group has too
// many nonzeros.
bool columns_of(const float* w, int64_t cols, int keep, int of, int (&out)[kMostKept]) {
  int n = 0;
  for (int k = 0; k < std::min<int64_t>(of, cols); k++) {
    if (w[k] == 0.0f) continue;
    if (n == keep) return false;
    out[n++] = k;
  }
  for (int k = 0; n < keep; k++)
    if (std::find(out, out + n, k) == out + n) out[n++] = k;
  return true;
}

}  // namespace
}  // namespace secateur

extern "C" int sct_pack_nm(const float* weight, int64_t rows, int64_t cols, int64_t ld, int value, int32_t keep,
                           int32_t of, sct_allocate allocate, void* context) {
  using namespace secateur;
  if (!arguments_are_valid(weight, rows, cols, ld, reinterpret_cast<const void*>(allocate))) return SCT_BAD_ARGUMENT;
  if (value < SCT_F32 || value > SCT_I8 || !nm_is_known(keep, of)) return SCT_BAD_ARGUMENT;
  try {
    std::vector<float> scales;
    if (!row_scales(weight, rows, cols, ld, value, scales)) return SCT_BAD_ARGUMENT;
    BlobWriter writer(SCT_NM, static_cast<uint32_t>(value), rows, cols);
    Header& h = writer.header();
    h.p[0] = static_cast<uint32_t>(keep);
    h.p[1] = static_cast<uint32_t>(of);
    const NmShape s(h);
    std::vector<uint8_t> stream;
    stream.reserve(s.stream_bytes());
    for (int64_t first = 0; first < rows; first += kNmRows) {
      for (int64_t g = 0; g < s.groups; g += s.period) {
        const int64_t groups = std::min<int64_t>(s.period, s.groups - g);
        std::vector<uint32_t> words(s.words * kNmRows);
        std::vector<uint8_t> values;
        std::vector<float> lanes(groups * keep * kNmRows);
        for (int64_t lane = 0; lane < std::min<int64_t>(kNmRows, rows - first); lane++)
          for (int64_t i = 0; i < groups; i++) {
            const int64_t k = (g + i) * of;
            const float* w = weight + (first + lane) * ld + k;
            int kept[kMostKept];
            if (!columns_of(w, cols - k, keep, of, kept)) return SCT_BAD_ARGUMENT;
            for (int j = 0; j < keep; j++) {
              const int64_t f = i * keep + j;
              words[f / s.fields * kNmRows + lane] |= static_cast<uint32_t>(kept[j]) << f % s.fields * s.bits;
              if (k + kept[j] >= cols) continue;
              lanes[f * kNmRows + lane] = w[kept[j]];
              h.nonzeros += w[kept[j]] != 0.0f;
            }
          }
        for (size_t i = 0; i < lanes.size(); i++) {
          const int64_t row = first + static_cast<int64_t>(i) % kNmRows;
          append_value(lanes[i], value, value == SCT_I8 && row < rows ? scales[row] : 0.0f, values);
        }
        const auto* raw = reinterpret_cast<const uint8_t*>(words.data());
        stream.insert(stream.end(), raw, raw + words.size() * sizeof(uint32_t));
        stream.insert(stream.end(), values.begin(), values.end());
      }
    }
    writer.add(stream, kValueSlack);
    writer.add(scales);
    return writer.finish(allocate, context);
  } catch (const std::bad_alloc&) {
    return SCT_NO_MEMORY;
  }
}
