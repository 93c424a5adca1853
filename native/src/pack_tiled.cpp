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
constexpr uint32_t kWorthSharing = 8;   // two rows form a pair where they share one column in so many
constexpr uint32_t kWorthFilling =
    24;  // rows of so many nonzeros are filled up to whole groups: fewer counts, longer runs
constexpr int32_t kMostCarried = 48;  // columns; where 10% are nonzero, four or five of these are

struct Entry {
  int32_t column;
  float value;
};
using Entries = std::vector<Entry>;  // in the order of columns

// The part of a row block that one chunk sees: columns [begin, end).
struct Part {
  const float* w;
  int64_t ld;
  int32_t begin, end;
  uint32_t stride, value;

  int32_t cols() const { return end - begin; }
};

// Adds columns whose weight is zero until there are `count` entries; adds none where there are too few such columns.
void fill(const Part& part, int32_t row, size_t count, Entries& entries) {
  const size_t before = entries.size();
  for (int32_t k = part.begin; entries.size() < count && k < part.end; k++)
    if (part.w[row * part.ld + k] == 0.0f) entries.push_back({k, 0.0f});
  if (entries.size() < count) entries.resize(before);
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.column < b.column; });
}

void append_values(const Part& part, const Entry* entries, size_t n, std::vector<uint8_t>& stream) {
  const size_t at = stream.size(), size = part.value == SCT_F32 ? 4 : 2;
  stream.resize(at + 4 * size);  // zeros
  for (size_t i = 0; i < n; i++) {
    const uint16_t h = to_bf16(entries[i].value);
    if (size == 4)
      std::memcpy(&stream[at + 4 * i], &entries[i].value, 4);
    else
      std::memcpy(&stream[at + 2 * i], &h, 2);
  }
}

void append_offsets(const Part& part, const Entry* entries, size_t n, std::vector<uint8_t>& stream) {
  uint16_t offsets[4] = {};
  for (size_t i = 0; i < n; i++) offsets[i] = static_cast<uint16_t>((entries[i].column - part.begin) * part.stride);
  const auto* bytes = reinterpret_cast<const uint8_t*>(offsets);
  stream.insert(stream.end(), bytes, bytes + sizeof offsets);
}

// Appends the groups of rows that have equally many entries each, a group of each row in turn. An incomplete group
// comes first: the kernel has a template of its own for it, before the loop over whole groups.
void append_rows(const Part& part, const Entries* const* rows, int together, std::vector<uint8_t>& stream) {
  const size_t count = rows[0]->size();
  for (size_t i = 0; i < count;) {
    const size_t n = i == 0 && count % 4 ? count % 4 : 4;
    for (int r = 0; r < together; r++) {
      append_values(part, &(*rows[r])[i], n, stream);
      append_offsets(part, &(*rows[r])[i], n, stream);
    }
    i += n;
  }
}

// Appends two rows with equally many entries. The first `shared` columns that both rows keep go to shared groups.
void append_pair(const Part& part, const Entries& first, const Entries& second, uint32_t shared,
                 std::vector<uint8_t>& stream) {
  Entries both[2], own[2];
  for (size_t i = 0, j = 0; i < first.size() || j < second.size();) {
    const int32_t a = i < first.size() ? first[i].column : INT32_MAX;
    const int32_t b = j < second.size() ? second[j].column : INT32_MAX;
    const bool together = a == b && both[0].size() < shared;
    if (a <= b) (together ? both : own)[0].push_back(first[i++]);
    if (b <= a) (together ? both : own)[1].push_back(second[j++]);
  }
  const Entries* const rows[2] = {&own[0], &own[1]};
  append_rows(part, rows, 2, stream);
  for (size_t i = 0; i < both[0].size(); i += 4) {
    append_values(part, &both[0][i], 4, stream);
    append_values(part, &both[1][i], 4, stream);
    append_offsets(part, &both[0][i], 4, stream);
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

// Appends n rows with equally many entries: pairs, by falling number of shared columns, then single rows.
void append_equal(const Part& part, const std::vector<Entries>& rows, const int32_t* order, int32_t n, Tiled& out) {
  const auto count = static_cast<uint32_t>(rows[order[0]].size());
  const int64_t words = ceil_div(part.cols(), 64);
  std::vector<uint64_t> bits(n * words);
  for (int32_t i = 0; i < n; i++)
    for (const Entry& e : rows[order[i]])
      bits[i * words + (e.column - part.begin) / 64] |= uint64_t{1} << (e.column - part.begin) % 64;
  std::vector<bool> paired(n);
  for (const RowPair& p : pair_rows(bits, n, words)) {
    const int32_t two[2] = {order[p.first], order[p.second]};
    const uint32_t shared = p.both / 4 * 4;
    if (shared * kWorthSharing < count) break;
    add_run(count, shared, 2, out);
    append_pair(part, rows[two[0]], rows[two[1]], shared, out.stream);
    for (int32_t row : two) add_row(row, part, out);
    paired[p.first] = paired[p.second] = true;
  }
  for (int32_t i = 0; i < n; i++) {
    if (paired[i]) continue;
    const Entries* const single = &rows[order[i]];
    add_run(count, 0, 1, out);
    append_rows(part, &single, 1, out.stream);
    add_row(order[i], part, out);
  }
}

void append_block(const Part& part, const std::vector<Entries>& rows, bool first_chunk, Tiled& out) {
  std::vector<int32_t> order(rows.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return rows[a].size() < rows[b].size(); });
  out.blocks.push_back(
      {out.stream.size(), static_cast<uint32_t>(out.runs.size()), 0, static_cast<uint32_t>(out.rows.size()), 0});
  for (size_t i = 0; i < order.size();) {
    size_t j = i;
    while (j < order.size() && j - i < kPairedAtATime && rows[order[j]].size() == rows[order[i]].size()) j++;
    // The first chunk initialises every accumulator; later chunks need not visit rows without nonzeros.
    if (!rows[order[i]].empty() || first_chunk) append_equal(part, rows, &order[i], static_cast<int32_t>(j - i), out);
    i = j;
  }
  out.blocks.back().class_count = static_cast<uint32_t>(out.runs.size()) - out.blocks.back().class_begin;
}

// The number of columns of the chunk before that a chunk sees: offsets must still fit in 16 bits.
int32_t carried_columns(int32_t chunk, uint32_t stride) {
  return std::min(kMostCarried, static_cast<int32_t>(UINT16_MAX / stride) + 1 - chunk);
}

// Makes the groups of a row whole. The entries of an incomplete group go to the next chunk if that sees their columns,
// which start at `next`; otherwise zeros fill the group.
void make_whole(const Part& part, int32_t row, int32_t next, Entries& entries, Entries& waiting) {
  const size_t over = entries.size() % 4;
  if (!over) return;
  const auto last = entries.end() - static_cast<std::ptrdiff_t>(over);
  if (last->column >= next) {
    waiting.assign(last, entries.end());
    entries.erase(last, entries.end());
  } else if (entries.size() >= kWorthFilling) {
    fill(part, row, entries.size() + 4 - over, entries);
  }
}

void append_row_block(const float* w, int64_t ld, int32_t rows, int64_t cols, const Header& h, Tiled& out) {
  const uint32_t stride = h.p[0] * 4;
  const int64_t chunk = h.p[1], chunks = ceil_div(cols, chunk);
  std::vector<Entries> waiting(rows);
  for (int64_t c = 0; c < chunks; c++) {
    const int64_t end = std::min(cols, (c + 1) * chunk);
    const Part part{w, ld, static_cast<int32_t>(first_seen(h, c)), static_cast<int32_t>(end), stride, h.value};
    const int64_t next = c + 1 < chunks ? first_seen(h, c + 1) : INT32_MAX;
    std::vector<Entries> kept(rows);
    kept.swap(waiting);
    for (int32_t r = 0; r < rows; r++) {
      for (int64_t k = c * chunk; k < end; k++)
        if (const float v = w[r * ld + k]; v != 0.0f) {
          kept[r].push_back({static_cast<int32_t>(k), v});
          out.nonzeros++;
        }
      make_whole(part, r, static_cast<int32_t>(next), kept[r], waiting[r]);
    }
    append_block(part, kept, c == 0, out);
  }
}

}  // namespace
}  // namespace secateur

extern "C" int sct_pack_tiled(const float* weight, int64_t rows, int64_t cols, int64_t ld, int value, int32_t tile,
                              int32_t chunk, int32_t row_block, sct_allocate allocate, void* context) {
  using namespace secateur;
  if (!weight || !allocate || rows < 1 || cols < 1 || ld < cols || rows > INT32_MAX || cols > INT32_MAX)
    return SCT_BAD_ARGUMENT;
  if (value != SCT_F32 && value != SCT_BF16) return SCT_BAD_ARGUMENT;
  if (tile < 16 || tile > kMaxTile || tile % 16 || chunk < 1 || row_block < 1) return SCT_BAD_ARGUMENT;
  if (static_cast<int64_t>(chunk - 1) * tile * 4 > UINT16_MAX) return SCT_BAD_ARGUMENT;
  if (static_cast<int64_t>(row_block) * tile * 4 > UINT32_MAX) return SCT_BAD_ARGUMENT;
  try {
    Tiled t;
    BlobWriter writer(SCT_TILED, static_cast<uint32_t>(value), rows, cols);
    Header& h = writer.header();
    h.p[0] = static_cast<uint32_t>(tile);
    h.p[1] = static_cast<uint32_t>(chunk);
    h.p[2] = static_cast<uint32_t>(row_block);
    h.p[3] = kTiledLayout;
    h.carried = static_cast<uint64_t>(carried_columns(chunk, h.p[0] * 4));
    for (int64_t r = 0; r < rows; r += row_block)
      append_row_block(weight + r * ld, ld, static_cast<int32_t>(std::min<int64_t>(row_block, rows - r)), cols, h, t);
    h.nonzeros = t.nonzeros;
    writer.add(t.blocks);
    writer.add(t.runs);
    writer.add(t.rows, kRowSlack * sizeof(uint32_t));
    writer.add(t.stream);
    return writer.finish(allocate, context);
  } catch (const std::bad_alloc&) {
    return SCT_NO_MEMORY;
  }
}
