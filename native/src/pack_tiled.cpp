// Packs an unstructured sparse weight for many tokens (format "tiled", see blob.h).
#include <algorithm>
#include <new>
#include <numeric>
#include <vector>

#include "blob.h"
#include "convert.h"
#include "pair_rows.h"
#include "writer.h"

namespace secateur {
namespace {

struct Tiled {
  std::vector<TiledBlock> blocks;
  std::vector<TiledRun> runs;
  std::vector<uint32_t> rows;
  std::vector<uint8_t> stream;
  uint64_t nonzeros = 0;
};

constexpr size_t kPairedAtATime = 256;  // rows that are compared with each other
constexpr uint32_t kWorthSharing = 8;   // two rows go together where they share one column in so many
constexpr uint32_t kWorthFilling = 24;  // rows of so many nonzeros get zeros up to whole groups: fewer counts, longer runs

// Where a block's weights lie.
struct Part {
  const float* w;
  int64_t ld;
  int32_t rows, cols;
  uint32_t stride, value;

  const float* row(int32_t r) const { return w + r * ld; }
};

using Columns = std::vector<int32_t>;

// How many weights are stored of a row with `n` nonzeros.
uint32_t stored(uint32_t n, int32_t cols) {
  const uint32_t whole = (n + 3) / 4 * 4;
  return n >= kWorthFilling && whole <= static_cast<uint32_t>(cols) ? whole : n;
}

// Fills up with columns that are not kept, whose weight is zero.
void fill(const float* row, size_t count, Columns& columns) {
  for (int32_t k = 0; columns.size() < count; k++)
    if (row[k] == 0.0f) columns.push_back(k);
}

void append_values(const Part& part, int32_t row, const int32_t* columns, size_t n, std::vector<uint8_t>& stream) {
  const size_t at = stream.size(), size = part.value == SCT_F32 ? 4 : 2;
  stream.resize(at + 4 * size);  // zeros
  for (size_t i = 0; i < n; i++) {
    const float v = part.row(row)[columns[i]];
    const uint16_t h = to_bf16(v);
    if (size == 4)
      std::memcpy(&stream[at + 4 * i], &v, 4);
    else
      std::memcpy(&stream[at + 2 * i], &h, 2);
  }
}

void append_offsets(const Part& part, const int32_t* columns, size_t n, std::vector<uint8_t>& stream) {
  uint16_t offsets[4] = {};
  for (size_t i = 0; i < n; i++) offsets[i] = static_cast<uint16_t>(columns[i] * part.stride);
  const auto* bytes = reinterpret_cast<const uint8_t*>(offsets);
  stream.insert(stream.end(), bytes, bytes + sizeof offsets);
}

// Groups of rows that have equally many columns each, in turn. The incomplete group, if any, comes first: the kernel
// then runs it with its own template and falls into the loop over whole groups.
void append_rows(const Part& part, const int32_t* rows, const Columns* columns, int together,
                 std::vector<uint8_t>& stream) {
  const size_t count = columns[0].size();
  for (size_t i = 0; i < count;) {
    const size_t n = i == 0 && count % 4 ? count % 4 : 4;
    for (int r = 0; r < together; r++) {
      append_values(part, rows[r], &columns[r][i], n, stream);
      append_offsets(part, &columns[r][i], n, stream);
    }
    i += n;
  }
}

Columns columns_of(const Part& part, int32_t row, uint32_t count) {
  Columns columns;
  for (int32_t k = 0; k < part.cols; k++)
    if (part.row(row)[k] != 0.0f) columns.push_back(k);
  fill(part.row(row), count, columns);
  return columns;
}

// Two rows of `count` weights each, with the first `shared` of the columns that both keep in shared groups.
void append_pair(const Part& part, const int32_t (&rows)[2], uint32_t count, uint32_t shared,
                 std::vector<uint8_t>& stream) {
  Columns both, own[2];
  for (int32_t k = 0; k < part.cols; k++) {
    const bool a = part.row(rows[0])[k] != 0.0f, b = part.row(rows[1])[k] != 0.0f;
    if (a && b && both.size() < shared) {
      both.push_back(k);
      continue;
    }
    if (a) own[0].push_back(k);
    if (b) own[1].push_back(k);
  }
  for (int r = 0; r < 2; r++) fill(part.row(rows[r]), count - shared, own[r]);
  append_rows(part, rows, own, 2, stream);
  for (size_t i = 0; i < both.size(); i += 4) {
    append_values(part, rows[0], &both[i], 4, stream);
    append_values(part, rows[1], &both[i], 4, stream);
    append_offsets(part, &both[i], 4, stream);
  }
}

void add_run(uint32_t count, uint32_t shared, int together, Tiled& out) {
  const TiledRun next{count, static_cast<uint16_t>(shared), static_cast<uint16_t>(together), 0};
  if (out.runs.size() > out.blocks.back().class_begin) {
    const TiledRun& last = out.runs.back();
    if (last.count == next.count && last.shared == next.shared && last.together == next.together) return;
  }
  out.runs.push_back(next);
}

void add_row(int32_t row, const Part& part, Tiled& out) {
  out.rows.push_back(static_cast<uint32_t>(row) * part.stride);
  out.runs.back().rows++;
}

// Rows with `count` stored weights each: pairs by falling number of shared columns, then who is left alone.
void append_equal(const Part& part, const int32_t* rows, int32_t n, uint32_t count, Tiled& out) {
  const int64_t words = ceil_div(part.cols, 64);
  std::vector<uint64_t> bits(n * words);
  for (int32_t i = 0; i < n; i++)
    for (int32_t k = 0; k < part.cols; k++)
      if (part.row(rows[i])[k] != 0.0f) bits[i * words + k / 64] |= uint64_t{1} << k % 64;
  std::vector<bool> paired(n);
  for (const RowPair& p : pair_rows(bits, n, words)) {
    const int32_t two[2] = {rows[p.first], rows[p.second]};
    const uint32_t shared = p.both / 4 * 4;
    if (shared * kWorthSharing < count) break;
    add_run(count, shared, 2, out);
    append_pair(part, two, count, shared, out.stream);
    for (int32_t row : two) add_row(row, part, out);
    paired[p.first] = paired[p.second] = true;
  }
  for (int32_t i = 0; i < n; i++) {
    if (paired[i]) continue;
    const Columns columns = columns_of(part, rows[i], count);
    add_run(count, 0, 1, out);
    append_rows(part, &rows[i], &columns, 1, out.stream);
    add_row(rows[i], part, out);
  }
}

void append_block(const Part& part, bool first_chunk, Tiled& out) {
  std::vector<uint32_t> count(part.rows);
  std::vector<int32_t> order(part.rows);
  for (int32_t r = 0; r < part.rows; r++) {
    const auto n = std::count_if(part.row(r), part.row(r) + part.cols, [](float v) { return v != 0.0f; });
    out.nonzeros += static_cast<uint64_t>(n);
    count[r] = stored(static_cast<uint32_t>(n), part.cols);
  }
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return count[a] < count[b]; });

  out.blocks.push_back({out.stream.size(), static_cast<uint32_t>(out.runs.size()), 0,
                        static_cast<uint32_t>(out.rows.size()), 0});
  for (size_t i = 0; i < order.size();) {
    size_t j = i;
    while (j < order.size() && j - i < kPairedAtATime && count[order[j]] == count[order[i]]) j++;
    // The first chunk initialises every accumulator; later chunks need not visit rows without nonzeros.
    if (count[order[i]] || first_chunk)
      append_equal(part, &order[i], static_cast<int32_t>(j - i), count[order[i]], out);
    i = j;
  }
  out.blocks.back().class_count = static_cast<uint32_t>(out.runs.size()) - out.blocks.back().class_begin;
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
        append_block({weight + r * ld + k, ld, static_cast<int32_t>(std::min<int64_t>(row_block, rows - r)),
                      static_cast<int32_t>(std::min<int64_t>(chunk, cols - k)), stride,
                      static_cast<uint32_t>(value)},
                     k == 0, t);
    BlobWriter writer(SCT_TILED, static_cast<uint32_t>(value), rows, cols);
    Header& h = writer.header();
    h.nonzeros = t.nonzeros;
    h.p[0] = static_cast<uint32_t>(tile);
    h.p[1] = static_cast<uint32_t>(chunk);
    h.p[2] = static_cast<uint32_t>(row_block);
    h.p[3] = kTiledLayout;
    writer.add(t.blocks);
    writer.add(t.runs);
    writer.add(t.rows, kRowSlack * sizeof(uint32_t));
    writer.add(t.stream);
    return writer.finish(allocate, context);
  } catch (const std::bad_alloc&) {
    return SCT_NO_MEMORY;
  }
}
