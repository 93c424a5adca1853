// SparseChain: reads and validates its steps when the model is loaded, and runs them.
#include "chain.h"

#include "secateur/steps.h"

namespace secateur_onnx {

using secateur::kStepFields;
using secateur::read_steps;

SparseChain::SparseChain(const Runtime& r, const OrtKernelInfo* info)
    : runtime(r), packed_(r, info, 1, 64, "what SparseChain has packed"), width_(r.int_attribute(info, "width", 0)) {
  int constant[2] = {};
  const OrtValue* table[2] = {};
  for (size_t i : {0, 1}) {
    runtime.check(ort::KernelInfoGetConstantInput_tensor::call(runtime.api, info, i + 2, &constant[i], &table[i]));
    if (!constant[i] || !table[i]) runtime.fail(ort::kInvalidGraph, "the steps of SparseChain must be initializers");
  }
  const std::vector<int64_t> shape = runtime.shape(table[0]);
  if (shape.size() != 2 || shape[0] < 1 || shape[1] != kStepFields || runtime.shape(table[1]) != std::vector{shape[0]})
    runtime.fail(ort::kInvalidGraph, "the steps of SparseChain have " + std::to_string(kStepFields) + " fields each");
  auto weight = [&](int64_t offset, int64_t bytes) {
    const uint8_t* blob = part(offset, bytes);
    // Model files come from anywhere: no kernel may read or write outside.
    const int status = sct_validate(blob, bytes);
    if (status != SCT_OK) runtime.fail(ort::kInvalidGraph, std::string("SparseChain: ") + sct_error_text(status));
    return blob;
  };
  auto numbers = [&](int64_t offset, int64_t count) { return vector(offset, count); };
  steps_ =
      read_steps(runtime.data<int64_t>(table[0]), runtime.data<float>(table[1]), shape[0], width_, weight, numbers);
  rows_ = sct_chain_rows(steps_.data(), static_cast<int64_t>(steps_.size()), width_);
  if (rows_ < 1) runtime.fail(ort::kInvalidGraph, "the steps of SparseChain do not fit together");
  for (const sct_step& s : steps_) {
    if (s.kind == SCT_ATTENTION_STEP && !heads_) heads_ = s.heads;
    if (s.kind == SCT_ATTENTION_STEP && s.heads != heads_)
      runtime.fail(ort::kInvalidGraph, "every attention of SparseChain has the same heads");
  }
}

const uint8_t* SparseChain::part(int64_t offset, int64_t bytes) const {
  if (offset < 0 || offset % 64 || bytes < 0 || bytes > packed_.bytes || offset > packed_.bytes - bytes)
    runtime.fail(ort::kInvalidGraph, "SparseChain points outside of what it has packed");
  return packed_.data + offset;
}

const float* SparseChain::vector(int64_t offset, int64_t numbers) const {
  return offset < 0 ? nullptr : reinterpret_cast<const float*>(part(offset, numbers * 4));
}

int SparseChain::threads(SessionThreads& session_threads) const {
  if (threads_.load() >= SessionThreads::of_machine()) return threads_.load();
  // A count may miss threads that sleep or are busy: the first count takes long, and later ones become ever rarer.
  const uint64_t call = calls_.fetch_add(1);
  if (call < 4 || (call & (call - 1)) == 0)
    threads_.store(std::max(threads_.load(), session_threads.count_at_work(call ? 200 : 5000)));
  return threads_.load();
}

void SparseChain::compute(OrtKernelContext* context) const {
  const OrtValue *x = runtime.input(context, 0), *mask = runtime.input(context, 4), *keep = runtime.input(context, 5);
  std::vector<int64_t> shape = runtime.shape(x);
  if (shape.size() != 3 || shape[2] != width_)
    runtime.fail(ort::kInvalidArgument, "SparseChain takes (batch, tokens, " + std::to_string(width_) + ")");
  sct_chain_job job{};
  job.x = runtime.data<float>(x);
  job.batch = shape[0], job.tokens = shape[1], job.width = width_;
  job.steps = steps_.data(), job.count = static_cast<int64_t>(steps_.size());
  job.mask = runtime.data<float>(mask), job.keep = runtime.data<uint8_t>(keep);
  const int64_t sizes[] = {job.batch, heads_, job.tokens, job.tokens};
  mask_strides(runtime, mask, sizes, job.mask_stride);
  mask_strides(runtime, keep, sizes, job.keep_stride);
  shape[2] = rows_;
  job.y = runtime.data<float>(runtime.output(context, shape));
  SessionThreads threads{&runtime, context};
  const int status = sct_chain(&job, this->threads(threads), SCT_ISA_AUTO, SessionThreads::run, &threads);
  if (status != SCT_OK) runtime.fail(ort::kInvalidArgument, std::string("SparseChain: ") + sct_error_text(status));
}

}  // namespace secateur_onnx
