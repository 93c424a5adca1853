// The layout of packed weights in memory: one header, then sections at byte offsets from the start.
//
// tiled   For many tokens, any pattern of zeros. Activations are packed [tile][cols][tile tokens]. In each (row block,
//         column chunk), the rows are sorted by their number of nonzeros, and nonzeros come in groups of four: four
//         values, then four u16 offsets into the chunk of packed activations (column * tile * 4 bytes). Two rows with
//         equally many nonzeros may form a pair: the columns that both rows keep then stand in shared groups (four
//         values of the first row, four of the second, four offsets). Nonzeros of a row, and shared ones, are in the
//         order of columns. So that its groups are whole, a row may leave its last nonzeros of a chunk to the next
//         chunk, which sees `carried` columns of the chunk before it; offsets count from there.
//         Sections: blocks, classes, rows, stream.
// block   For any number of tokens, where `block` rows of a column are zero or nonzero together. Order: row block,
//         column chunk, group of `block` rows, column.
//         Sections: starts (index of the first block of each (row block, chunk, group), and the total), u16 columns
//         within the chunk, values (`block` for each column; rows past the end are zero), a float32 scale for each row
//         (int8 only).
// bitmask For few tokens, any pattern of zeros.
//         Sections: starts (u64 index of each row's first value, and the total), masks (one bit for each column, rows
//         padded to 64 columns), values, a float32 scale for each row (int8 only).
// quad    For many tokens, int8, where four columns of a row (from a multiple of four on) are zero or nonzero together.
//         Like tiled without pairs, with a quad in place of a weight: a group is four quads of int8, then four u16
//         offsets (quad * tile * 4 bytes). Rows without quads are left out.
//         Sections: blocks, classes, rows, stream, a float32 scale for each row, an int32 sum of the weights of each
//         row.
// nm      For few tokens, where at most `keep` of every `of` columns of a row (from a multiple of `of` on) are nonzero;
//         exactly `keep` are stored. Sixteen rows lie side by side; rows past the end are zero. Each sixteen rows have,
//         for each period of groups that fills whole words (the last period may be cut short): words [words][16] of the
//         columns within their groups, 16 fields of 2 bits or 10 of 3 bits from the low end; values [groups *
//         keep][16].
//         Sections: all of these, a float32 scale for each row (int8 only).
#pragma once
#include <algorithm>
#include <cstdint>

#include "secateur/kernels.h"

namespace secateur {

constexpr char kMagic[8] = {'S', 'E', 'C', 'P', 'A', 'C', 'K', '1'};
constexpr int64_t kAlign = 64;  // bytes, of sections inside a blob
constexpr int kMaxTile = 128;   // tokens
constexpr int kRowSlack = 16;   // row offsets past the end, which prefetching reads

struct Header {
  char magic[8];
  uint32_t format, value;
  uint32_t rows, cols;
  uint64_t nonzeros;
  uint64_t bytes;
  uint32_t p[4];
  uint64_t section[7];  // section i spans section[i] .. section[i + 1]
  uint64_t carried;     // tiled: columns of the chunk before that a chunk sees
  uint64_t reserved;
};
static_assert(sizeof(Header) == 128, "the header is part of the file format");

struct TiledBlock {  // one (row block, chunk)
  uint64_t stream;   // byte offset into the stream section
  uint32_t class_begin, class_count;
  uint32_t row_begin, pad;
};
static_assert(sizeof(TiledBlock) == 24, "part of the file format");

struct TiledClass {  // `rows` consecutive rows with `count` nonzeros each
  uint32_t count, rows;
};

// `rows` consecutive rows of the tiled format with `count` nonzeros each, as single rows or in pairs. A single row is
// stored as its groups, the incomplete group first. A pair is stored as groups of the first row's own nonzeros and of
// the second's in turn, the incomplete groups first, then shared / 4 shared groups.
struct TiledRun {
  uint32_t count;
  uint16_t shared;    // of `count`, those in shared groups; a multiple of four
  uint16_t together;  // rows that are stored together: 1, or 2 for pairs
  uint32_t rows;      // a multiple of `together`
};
static_assert(sizeof(TiledRun) == 12, "part of the file format");

constexpr uint32_t kTiledLayout = 3;  // Header::p[3]; 2 in files of versions that carry no nonzeros over

// The first column that chunk c of a tiled weight sees.
inline int64_t first_seen(const Header& h, int64_t c) {
  return std::max<int64_t>(0, c * int64_t{h.p[1]} - static_cast<int64_t>(h.carried));
}

// Bytes of a group of four nonzeros of one row.
constexpr int group_bytes(uint32_t value) { return value == SCT_F32 ? 24 : 16; }
// Bytes of a group that two rows share.
constexpr int shared_bytes(uint32_t value) { return value == SCT_F32 ? 40 : 24; }

// Bytes that a run takes in the stream.
inline uint64_t run_bytes(const TiledRun& c, uint64_t group, uint64_t shared_group) {
  return c.rows * ((uint64_t{c.count} - c.shared + 3) / 4 * group) + c.rows / 2 * (c.shared / 4u * shared_group);
}

constexpr int value_bytes(uint32_t value) { return value == SCT_F32 ? 4 : value == SCT_I8 ? 1 : 2; }

constexpr int kValueSlack = 64;      // bytes past the values, so that whole vectors may be loaded
constexpr int kBitmaskColumns = 64;  // columns of a bitmask row are padded to a multiple of this
constexpr int kMaxBlockChunk = 65536;
constexpr int kNmRows = 16;
constexpr int kMostKept = 4;
constexpr int kQuadGroup = 24;          // bytes of four quads and their offsets
constexpr int kMaxQuadColumns = 65536;  // sums of uint8 times int8 stay below 2^31

template <class T>
const T* section(const uint8_t* blob, int i) {
  return reinterpret_cast<const T*>(blob + reinterpret_cast<const Header*>(blob)->section[i]);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Sizes in the block format, and where the groups of a (row block, chunk) lie.
struct BlockShape {
  int64_t block, chunk, row_block, chunks, row_blocks;

  explicit BlockShape(const Header& h)
      : block(h.p[0]),
        chunk(h.p[1]),
        row_block(h.p[2]),
        chunks(ceil_div(h.cols, chunk)),
        row_blocks(ceil_div(h.rows, row_block)),
        rows(h.rows) {}
  int64_t rows_in(int64_t rb) const { return std::min(row_block, rows - rb * row_block); }
  int64_t groups_in(int64_t rb) const { return ceil_div(rows_in(rb), block); }
  // Index of the first group in the starts section.
  int64_t first(int64_t rb, int64_t c) const { return rb * (row_block / block) * chunks + c * groups_in(rb); }
  int64_t groups() const { return first(row_blocks - 1, chunks); }

 private:
  int64_t rows;
};

constexpr bool nm_is_known(int64_t keep, int64_t of) {
  return (of == 4 && (keep == 1 || keep == 2)) || (of == 8 && keep == 4);
}
constexpr int nm_fields(int of) { return of == 4 ? 16 : 10; }                      // in a word
constexpr int nm_words(int keep, int of) { return nm_fields(of) % keep ? 2 : 1; }  // in a period

// Sizes in the nm format.
struct NmShape {
  int64_t keep, bits, fields, words, period, groups, value, row_sets;

  explicit NmShape(const Header& h)
      : keep(h.p[0]),
        bits(h.p[1] == 4 ? 2 : 3),
        fields(nm_fields(static_cast<int>(h.p[1]))),
        words(nm_words(static_cast<int>(h.p[0]), static_cast<int>(h.p[1]))),
        period(words * fields / keep),
        groups(ceil_div(h.cols, h.p[1])),
        value(value_bytes(h.value)),
        row_sets(ceil_div(h.rows, kNmRows)) {}
  // Of kNmRows rows.
  int64_t bytes() const { return (ceil_div(groups, period) * words * 4 + groups * keep * value) * kNmRows; }
  int64_t stream_bytes() const { return row_sets * bytes(); }
};

}  // namespace secateur
