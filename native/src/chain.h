// The program of a chain of layers: in which phases its steps run, and where their values lie.
#pragma once
#include <cstdint>
#include <vector>

#include "secateur/kernels.h"

namespace secateur {

// The output of a step, or x.
struct ChainValue {
  int64_t rows = 0;
  int64_t last = -1;     // the last step that reads the value
  bool shared = false;   // read in another phase than written, so threads share the value
  bool checked = false;  // a linear layer reads the value, so NaN has to be noticed
  int64_t offset = 0;    // rows from the start of the shared, or of a thread's own, part of a tile
};

// Steps [begin, end) that run without waiting for other threads: either one attention, which reads all tokens of a
// sequence, or any number of other steps, which treat each token separately, so that a thread takes a tile through all
// of them. The first and the last phase are of the second kind.
struct ChainPhase {
  int64_t begin, end;
  bool attention;
};

struct ChainProgram {
  std::vector<ChainValue> values;
  std::vector<ChainPhase> phases;
  int64_t tile = 0, shared_rows = 0, own_rows = 0, widest_head = 0;
};

// The program of a chain whose x has `width` numbers a token. Its values are empty where steps do not fit together.
ChainProgram compile_chain(const sct_step* steps, int64_t count, int64_t width);

}  // namespace secateur
