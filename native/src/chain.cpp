// Runs a chain of layers (sct_chain): as long as there is a sequence for every thread, each thread runs whole
// sequences; the remaining sequences are shared by all threads, phase by phase (see chain.h).
#include "chain.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "blob.h"
#include "pool.h"
#include "scratch.h"
#include "table.h"

namespace secateur {
namespace {

constexpr int64_t kLeastTokens = 32;  // in a tile that is cut smaller than it could be, so that all threads get some

struct ChainRun {
  const sct_chain_job* job;
  const ChainProgram* program;
  const KernelTable* kernels;
  int64_t tile_tokens, tiles;  // tokens in a tile, tiles in a sequence
  std::atomic<bool> not_finite{false};

  int tokens_in(int64_t tile) const {
    return static_cast<int>(std::min(tile_tokens, job->tokens - tile * tile_tokens));
  }
  int64_t queries_in(int64_t tile) const { return ceil_div(tokens_in(tile), kernels->attention_queries); }
  int64_t sequence_floats() const { return tiles * program->shared_rows * program->tile; }
  int64_t own_floats() const {
    return program->own_rows * program->tile +
           (program->widest_head ? kernels->attention_scratch(program->widest_head) : 0);
  }
};

// The addresses of the values of one tile of a sequence.
struct TileValues {
  const ChainRun& chain;
  float *shared, *own;

  float* operator()(int64_t value) const {
    const ChainValue& v = chain.program->values[value];
    return (v.shared ? shared : own) + v.offset * chain.program->tile;
  }
};

void run_linear(const ChainRun& chain, const sct_step& s, const TileValues& at, int64_t from, int64_t to, int tokens,
                bool& not_finite) {
  const auto& h = *reinterpret_cast<const Header*>(s.blob);
  const int64_t tile = chain.program->tile, row_block = h.p[2];
  for (int64_t row = 0; row < h.rows; row += row_block) {
    float* y = at(to) + row * tile;
    chain.kernels->tiled(s.blob, row / row_block, at(from), tokens, s.bias ? s.bias + row : nullptr, y);
    if (s.activation != SCT_NONE || chain.program->values[to].checked)
      not_finite |= chain.kernels->activate_tile(y, std::min<int64_t>(row_block, h.rows - row), static_cast<int>(tile),
                                                 tokens, s.activation);
  }
}

// Runs a phase that is no attention on one tile.
void run_tile(ChainRun& chain, const ChainPhase& phase, int64_t sequence, int64_t tile, float* shared, float* own) {
  const sct_chain_job& job = *chain.job;
  const int tokens = chain.tokens_in(tile), lanes = static_cast<int>(chain.program->tile);
  const int64_t first = sequence * job.tokens + tile * chain.tile_tokens;
  const TileValues at{chain, shared + tile * chain.program->shared_rows * lanes, own};
  bool not_finite = false;
  if (&phase == &chain.program->phases.front())
    not_finite |= chain.kernels->pack_tile(job.x + first * job.width, job.width, job.width, tokens, lanes, at(0));
  for (int64_t i = phase.begin; i < phase.end; i++) {
    const sct_step& s = job.steps[i];
    if (s.kind == SCT_LINEAR_STEP)
      run_linear(chain, s, at, s.from[0], i + 1, tokens, not_finite);
    else
      not_finite |= chain.kernels->norm_tile(at(s.from[0]), s.from[1] < 0 ? nullptr : at(s.from[1]),
                                             chain.program->values[i + 1].rows, lanes, tokens, s.norm, s.scale, s.shift,
                                             s.epsilon, at(i + 1));
  }
  if (&phase == &chain.program->phases.back()) {
    const int64_t rows = chain.program->values.back().rows;
    chain.kernels->unpack_tile(at(job.count), rows, lanes, tokens, SCT_NONE, job.y + first * rows, rows);
  }
  if (not_finite) chain.not_finite.store(true);
}

// The attention of step s, without the addresses and strides of its values.
sct_attention_job attention_of(const sct_chain_job& job, const sct_step& s) {
  sct_attention_job a{};
  a.heads = s.heads, a.kv_heads = s.kv_heads, a.width = s.width, a.keys = job.tokens, a.scale = s.factor;
  a.mask = job.mask, a.keep = job.keep;
  std::copy(job.mask_stride, job.mask_stride + 3, a.mask_stride);
  std::copy(job.keep_stride, job.keep_stride + 3, a.keep_stride);
  return a;
}

// Runs the attention of one head for the queries of one kernel call, from `query` on.
void run_head(ChainRun& chain, const sct_step& s, int64_t step, int64_t sequence, int64_t head, int64_t query,
              float* shared, float* own) {
  const sct_chain_job& job = *chain.job;
  const ChainProgram& program = *chain.program;
  sct_attention_job a = attention_of(job, s);
  const TileValues at{chain, shared, own};
  a.q = at(s.from[0]) + s.first[0] * program.tile;
  a.k = at(s.from[1]) + s.first[1] * program.tile;
  a.v = at(s.from[2]) + s.first[2] * program.tile;
  a.out = at(step + 1);
  for (auto* stride : {a.q_stride, a.k_stride, a.v_stride, a.out_stride}) {
    stride[1] = s.width * program.tile;
    stride[2] = program.shared_rows * program.tile;
  }
  const int64_t left = chain.tokens_in(query / chain.tile_tokens) - query % chain.tile_tokens;
  const int n = static_cast<int>(std::min<int64_t>(chain.kernels->attention_queries, left));
  if (chain.kernels->attention_packed(a, program.tile, chain.tile_tokens, sequence, head, query, n,
                                      own + program.own_rows * program.tile))
    chain.not_finite.store(true);
}

// The number of units of work in a phase of one sequence: tiles, or kernel calls of attention.
int64_t units(const ChainRun& chain, const ChainPhase& phase) {
  if (!phase.attention) return chain.tiles;
  int64_t queries = 0;
  for (int64_t t = 0; t < chain.tiles; t++) queries += chain.queries_in(t);
  return queries * chain.job->steps[phase.begin].heads;
}

// Runs one unit of work of a phase.
void run_unit(ChainRun& chain, const ChainPhase& phase, int64_t sequence, int64_t unit, float* shared, float* own) {
  if (!phase.attention) return run_tile(chain, phase, sequence, unit, shared, own);
  const sct_step& s = chain.job->steps[phase.begin];
  int64_t part = unit / s.heads, tile = 0;
  while (part >= chain.queries_in(tile)) part -= chain.queries_in(tile++);
  run_head(chain, s, phase.begin, sequence, unit % s.heads,
           tile * chain.tile_tokens + part * chain.kernels->attention_queries, shared, own);
}

// Sequences each of which one thread runs.
struct SeparateSequences {
  ChainRun* chain;
  int64_t sequences;
  std::atomic<int64_t> next{0};
};

void separate_task(void* context) {
  auto& job = *static_cast<SeparateSequences*>(context);
  ChainRun& chain = *job.chain;
  float *shared = scratch(Scratch::kShared, chain.sequence_floats()), *own = scratch(Scratch::kOwn, chain.own_floats());
  if (!shared || !own) return;  // the other threads do the work
  for (int64_t s; (s = job.next.fetch_add(1)) < job.sequences;)
    for (const ChainPhase& phase : chain.program->phases)
      for (int64_t u = 0, n = units(chain, phase); u < n; u++) run_unit(chain, phase, s, u, shared, own);
}

// Sequences that all threads run together. Units are claimed in order, and a phase begins when the phase before it is
// done: the units that a thread waits for have been claimed by other threads, which are at work on them.
struct SharedSequences {
  ChainRun* chain;
  int64_t first, sequences;
  float* values;
  std::unique_ptr<std::atomic<int64_t>[]> done;  // units, for each phase
  std::atomic<int64_t> next{0};
};

void shared_task(void* context) {
  auto& job = *static_cast<SharedSequences*>(context);
  ChainRun& chain = *job.chain;
  float* own = scratch(Scratch::kOwn, chain.own_floats());
  if (!own) return;  // the other threads do the work
  const auto& phases = chain.program->phases;
  size_t p = 0;
  int64_t begin = 0, in_phase = units(chain, phases[0]), before = 0;
  for (;;) {
    const int64_t i = job.next.fetch_add(1);
    for (; i >= begin + in_phase * job.sequences; in_phase = units(chain, phases[p])) {
      begin += before = in_phase * job.sequences;
      if (++p == phases.size()) return;
    }
    if (p)
      for (unsigned spins = 0; job.done[p - 1].load(std::memory_order_acquire) < before;) relax(spins);
    const int64_t s = (i - begin) / in_phase;
    run_unit(chain, phases[p], job.first + s, (i - begin) % in_phase, job.values + s * chain.sequence_floats(), own);
    job.done[p].fetch_add(1, std::memory_order_release);
  }
}

int run_chain(ChainRun& chain, int threads, const CallerThreads& on) {
  const int64_t batch = chain.job->batch;
  SeparateSequences separate{&chain, batch / threads * threads};
  if (separate.sequences) run_parallel(threads, separate_task, &separate, on);
  if (separate.next.load() < separate.sequences) return SCT_NO_MEMORY;
  if (separate.sequences == batch) return SCT_OK;
  const size_t phases = chain.program->phases.size();
  SharedSequences shared{&chain, separate.sequences, batch - separate.sequences, nullptr,
                         std::unique_ptr<std::atomic<int64_t>[]>(new std::atomic<int64_t>[phases]())};
  shared.values = scratch(Scratch::kShared, shared.sequences * chain.sequence_floats());
  if (!shared.values) return SCT_NO_MEMORY;
  run_parallel(threads, shared_task, &shared, on);
  return shared.done[phases - 1].load() < chain.tiles * shared.sequences ? SCT_NO_MEMORY : SCT_OK;
}

// Runs the chain step by step on values (batch, tokens, rows). Unlike tiles, these spread NaN as a dense product does.
int run_steps(const sct_chain_job& job, const ChainProgram& program, int threads, int isa, const CallerThreads& on) {
  const int64_t tokens = job.batch * job.tokens;
  std::vector<int64_t> before(job.count + 1);
  for (int64_t v = 1; v < job.count; v++) before[v + 1] = before[v] + program.values[v].rows;
  float* memory = scratch(Scratch::kSteps, before[job.count] * tokens);
  if (!memory) return SCT_NO_MEMORY;
  auto at = [&](int64_t v) {
    return v == 0 ? const_cast<float*>(job.x) : v == job.count ? job.y : memory + before[v] * tokens;
  };
  for (int64_t i = 0; i < job.count; i++) {
    const sct_step& s = job.steps[i];
    const int64_t rows = program.values[i + 1].rows;
    float* y = at(i + 1);
    int status = SCT_OK;
    if (s.kind == SCT_LINEAR_STEP) {
      const int64_t cols = program.values[s.from[0]].rows;
      status = sct_linear_on(s.blob, s.bytes, at(s.from[0]), tokens, cols, s.bias, s.activation, nullptr, y, rows,
                             threads, isa, on.run, on.pool);
    } else if (s.kind == SCT_NORM_STEP) {
      std::copy(at(s.from[0]), at(s.from[0]) + tokens * rows, y);
      for (int64_t t = 0; t < tokens; t++)
        kernel_table(isa).finish(y + t * rows, rows, nullptr, s.from[1] < 0 ? nullptr : at(s.from[1]) + t * rows,
                                 s.norm, s.scale, s.shift, s.epsilon);
    } else {
      sct_attention_job a = attention_of(job, s);
      a.batch = job.batch, a.queries = job.tokens, a.out = y;
      const float** heads[] = {&a.q, &a.k, &a.v};
      int64_t* strides[] = {a.q_stride, a.k_stride, a.v_stride, a.out_stride};
      for (int j = 0; j < 4; j++) {
        const int64_t value_rows = j < 3 ? program.values[s.from[j]].rows : rows;
        if (j < 3) *heads[j] = at(s.from[j]) + s.first[j];
        strides[j][0] = job.tokens * value_rows, strides[j][1] = s.width, strides[j][2] = value_rows;
      }
      status = sct_attention(&a, threads, isa, on.run, on.pool);
    }
    if (status != SCT_OK) return status;
  }
  return SCT_OK;
}

// Chooses the number of tokens in a tile: as many as fit, or fewer where all threads then get equally much work.
void cut_into_tiles(ChainRun& chain, int threads) {
  const int64_t tokens = chain.job->tokens;
  chain.tiles = ceil_div(tokens, chain.program->tile);
  const int64_t left = chain.job->batch % threads;
  if (left && left * chain.tiles % threads) {
    const int64_t finer = round_up(chain.tiles, threads);
    if (tokens / finer >= kLeastTokens) chain.tiles = finer;
  }
  chain.tile_tokens = round_up(ceil_div(tokens, chain.tiles), chain.kernels->width);
  chain.tiles = ceil_div(tokens, chain.tile_tokens);
}

}  // namespace
}  // namespace secateur

extern "C" int sct_chain(const sct_chain_job* job, int threads, int isa, sct_run_function run, void* pool) {
  using namespace secateur;
  if (!job || !job->steps || job->count < 1 || job->width < 1 || job->batch < 0 || job->tokens < 0 || threads < 1)
    return SCT_BAD_ARGUMENT;
  const int resolved = sct_resolve_isa(isa);
  if (resolved < 0) return SCT_UNSUPPORTED_ISA;
  try {
    const ChainProgram program = compile_chain(job->steps, job->count, job->width);
    if (program.values.empty() || !program.tile) return SCT_BAD_ARGUMENT;
    if (!job->batch || !job->tokens) return SCT_OK;
    if (!job->x || !job->y) return SCT_BAD_ARGUMENT;
    ChainRun chain{job, &program, &kernel_table(resolved), 0, 0};
    cut_into_tiles(chain, threads);
    // With many threads and few tiles, run_steps is faster: its threads share the rows of each layer.
    if (job->batch >= threads || 2 * job->batch * chain.tiles > threads) {
      const int status = run_chain(chain, threads, {run, pool});
      if (status != SCT_OK || !chain.not_finite.load()) return status;
    }
    return run_steps(*job, program, threads, resolved, {run, pool});
  } catch (const std::bad_alloc&) {
    return SCT_NO_MEMORY;
  }
}
