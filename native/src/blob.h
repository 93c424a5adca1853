// The layout of packed weights in memory: one header, then sections at byte offsets from the start.
//
// tiled   For many tokens. Activations are packed [tile][cols][tile tokens]; per (row block, column chunk)
// the rows
//         are sorted by their number of nonzeros, and nonzeros come in groups of four: values, then u16
//         offsets into the chunk of packed activations (column * tile * 4 bytes). Sections: blocks, classes,
//         rows, stream.
#pragma once
#include <cstdint>

#include "secateur/kernels.h"

namespace secateur {

constexpr char kMagic[8] = {'S', 'E', 'C', 'P', 'A', 'C', 'K', '1'};
constexpr int64_t kAlign = 64;  // of sections inside a blob
constexpr int kMaxTile = 128;   // tokens
constexpr int kRowSlack = 16;   // row offsets past the end, so that prefetching may read ahead

struct Header {
  char magic[8];
  uint32_t format, value;
  uint32_t rows, cols;
  uint64_t nonzeros;
  uint64_t bytes;
  uint32_t p[4];
  uint64_t section[7];  // section i spans section[i] .. section[i + 1]
  uint64_t reserved[2];
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

// Bytes of a group of four nonzeros: values, then four u16 offsets.
constexpr int group_bytes(uint32_t value) { return value == SCT_F32 ? 24 : 16; }

template <class T>
const T* section(const uint8_t* blob, int i) {
  return reinterpret_cast<const T*>(blob + reinterpret_cast<const Header*>(blob)->section[i]);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace secateur
