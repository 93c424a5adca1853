// A chain of layers, taken apart: in which order its steps run, and where their values lie.
#pragma once
#include <cstdint>
#include <vector>

#include "secateur/kernels.h"

namespace secateur {

// Of a step's output, or of x.
struct ChainValue {
  int64_t rows = 0;
  int64_t last = -1;     // step that reads it last
  bool shared = false;   // read in another phase than it is written in: threads share it
  bool checked = false;  // a linear layer reads it, so that NaN has to be noticed
  int64_t offset = 0;    // rows from the start of the shared or of a thread's own part of a tile
};

// Steps [begin, end) of one kind: one attention, which reads all tokens of a sequence, or any number of other steps, which
// treat tokens alike, so that a thread takes a tile through all of them. The first and the last phase are of the latter.
struct ChainPhase {
  int64_t begin, end;
  bool attention;
};

struct ChainProgram {
  std::vector<ChainValue> values;
  std::vector<ChainPhase> phases;
  int64_t tile = 0, shared_rows = 0, own_rows = 0, widest_head = 0;
};

// Empty values where steps do not fit together.
ChainProgram compile_chain(const sct_step* steps, int64_t count, int64_t width);

}  // namespace secateur
