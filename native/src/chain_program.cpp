#include <algorithm>

#include "chain.h"

namespace secateur {
namespace {

// The rows of the value that a step writes; negative where the step does not fit the values that it reads.
int64_t rows_of(const sct_step& s, int64_t step, const std::vector<ChainValue>& values, int64_t& tile) {
  const int reads = s.kind == SCT_LINEAR_STEP ? 1 : s.kind == SCT_NORM_STEP ? 2 : 3;
  for (int i = 0; i < 3; i++) {
    const bool optional = i >= reads || (s.kind == SCT_NORM_STEP && i == 1);
    if (s.from[i] > (i < reads ? step : -1) || s.from[i] < (optional ? -1 : 0)) return -1;
  }
  const int64_t rows = values[s.from[0]].rows;
  switch (s.kind) {
    case SCT_LINEAR_STEP: {
      sct_info info;
      if (sct_describe(s.blob, s.bytes, &info) != SCT_OK || info.format != SCT_TILED || info.cols != rows) return -1;
      if (tile && info.p[0] != tile) return -1;
      tile = info.p[0];
      return s.activation < SCT_NONE || s.activation > SCT_SILU ? -1 : info.rows;
    }
    case SCT_NORM_STEP:
      if (s.norm < SCT_NO_NORM || s.norm > SCT_RMS_NORM || s.heads) return -1;
      return s.from[1] >= 0 && values[s.from[1]].rows != rows ? -1 : rows;
    case SCT_ATTENTION_STEP:
      if (s.width < 1 || s.heads < 1 || s.kv_heads < 1 || s.heads % s.kv_heads) return -1;
      for (int i = 0; i < 3; i++) {
        const int64_t read = (i ? s.kv_heads : s.heads) * s.width, rows_of_value = values[s.from[i]].rows;
        if (s.first[i] < 0 || read > rows_of_value || s.first[i] > rows_of_value - read) return -1;
      }
      return s.heads * s.width;
    default:
      return -1;
  }
}

int phase_of(const std::vector<ChainPhase>& phases, int64_t step) {
  int p = 0;
  while (step >= phases[p].end) p++;
  return p;
}

void note_reads(const sct_step* steps, int64_t count, ChainProgram& program) {
  auto written_in = [&](int64_t value) { return value ? phase_of(program.phases, value - 1) : 0; };
  for (int64_t i = 0; i < count; i++) {
    const int phase = phase_of(program.phases, i);
    for (int64_t from : steps[i].from) {
      if (from < 0) continue;
      ChainValue& v = program.values[from];
      v.last = i;
      v.shared |= written_in(from) != phase;
      v.checked |= steps[i].kind == SCT_LINEAR_STEP;
    }
    program.values[i + 1].shared |= steps[i].kind == SCT_ATTENTION_STEP;
  }
}

// Gives every shared value, or every value of a thread's own, an offset at which no other value lies that is still read
// when it is written. Returns the rows that all of them take. Shared values may be overwritten when the phase of their
// last reader is over; within a phase, the steps of a thread run one after another.
int64_t assign_offsets(bool shared, ChainProgram& program) {
  struct Slot {
    int64_t offset, rows, last;
  };
  std::vector<Slot> slots;
  int64_t end = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(program.values.size()); i++) {
    ChainValue& v = program.values[i];
    if (v.shared != shared) continue;
    Slot* best = nullptr;
    for (Slot& s : slots)
      if (s.last < i - 1 && s.rows >= v.rows && (!best || s.rows < best->rows)) best = &s;
    if (!best) {
      slots.push_back({end, v.rows, 0});
      best = &slots.back();
      end += v.rows;
    }
    v.offset = best->offset;
    best->last = v.last < 0 ? static_cast<int64_t>(program.values.size()) : v.last;
  }
  return end;
}

}  // namespace

ChainProgram compile_chain(const sct_step* steps, int64_t count, int64_t width) {
  ChainProgram program;
  program.values.resize(count + 1);
  program.values[0].rows = width;
  program.phases.push_back({0, 0, false});
  for (int64_t i = 0; i < count; i++) {
    if ((program.values[i + 1].rows = rows_of(steps[i], i, program.values, program.tile)) < 1) return {};
    const bool attention = steps[i].kind == SCT_ATTENTION_STEP;
    if (attention) program.widest_head = std::max(program.widest_head, steps[i].width);
    if (attention || program.phases.back().attention) program.phases.push_back({i, i, attention});
    program.phases.back().end = i + 1;
  }
  if (program.phases.back().attention) program.phases.push_back({count, count, false});
  note_reads(steps, count, program);
  program.shared_rows = assign_offsets(true, program);
  program.own_rows = assign_offsets(false, program);
  return program;
}

}  // namespace secateur

extern "C" int64_t sct_chain_rows(const sct_step* steps, int64_t count, int64_t width) {
  if (!steps || count < 1 || width < 1) return -1;
  const secateur::ChainProgram program = secateur::compile_chain(steps, count, width);
  return program.values.empty() ? -1 : program.values.back().rows;
}
