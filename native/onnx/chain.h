// The operator for a chain of sparse layers.
#pragma once
#include <atomic>

#include "operators.h"

namespace secateur_onnx {

// Linear layers, norms and attention of an encoder in one call (sct_chain)
//
//   inputs      x (batch, tokens, in); packed (bytes) uint8, a constant, in which weights, biases, scales and shifts
//               lie at multiples of 64; steps (count, kStepFields) int64 and numbers (count) float, the constant table
//               of secateur/steps.h, whose addresses are offsets into packed; optional: mask and keep as for Attention,
//               which every attention of the chain uses
//   attributes  width: in
//   output      (batch, tokens, rows of the last step)
class SparseChain {
 public:
  static constexpr const char* kName = "SparseChain";
  static constexpr int kInputs[] = {ort::kFloat, ort::kUint8, ort::kInt64, ort::kFloat, ort::kFloat, ort::kBool};
  static constexpr size_t kRequired = 4;

  SparseChain(const Runtime& runtime, const OrtKernelInfo* info);
  void compute(OrtKernelContext* context) const;
  const Runtime runtime;

 private:
  const uint8_t* part(int64_t offset, int64_t bytes) const;
  const float* vector(int64_t offset, int64_t numbers) const;
  int threads(SessionThreads& session_threads) const;

  const Constant packed_;
  std::vector<sct_step> steps_;
  int64_t heads_ = 0;
  const int64_t width_;  // numbers a token in x
  int64_t rows_ = 0;     // numbers a token in y
  // The number of threads of the session, as far as known: it decides how tokens are cut into tiles.
  mutable std::atomic<int> threads_{1};
  mutable std::atomic<uint64_t> calls_{0};
};

}  // namespace secateur_onnx
