// Finds the rows of a chunk that share the most columns, for the tiled format, which stores such rows as pairs.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace secateur {

struct RowPair {
  int32_t first, second;  // positions in the list of rows
  uint32_t both;          // columns that both keep
};

// Pairs up n rows by the bits of their columns (n, words), the pair with the most shared columns first. Where n is odd,
// one row stays single. Time and memory grow with n * n.
inline std::vector<RowPair> pair_rows(const std::vector<uint64_t>& bits, int32_t n, int64_t words) {
  std::vector<std::vector<RowPair>> by_both(words * 64 + 1);
  for (int32_t i = 0; i < n; i++)
    for (int32_t j = i + 1; j < n; j++) {
      uint32_t both = 0;
      for (int64_t k = 0; k < words; k++)
        both += static_cast<uint32_t>(__builtin_popcountll(bits[i * words + k] & bits[j * words + k]));
      by_both[both].push_back({i, j, both});
    }
  std::vector<bool> taken(n);
  std::vector<RowPair> pairs;
  for (auto equal = by_both.rbegin(); equal != by_both.rend(); ++equal)
    for (const RowPair& p : *equal) {
      if (taken[p.first] || taken[p.second]) continue;
      taken[p.first] = taken[p.second] = true;
      pairs.push_back(p);
    }
  return pairs;
}

}  // namespace secateur
