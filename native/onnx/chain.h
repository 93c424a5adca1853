// The operator for a chain of sparse layers.
#pragma once
#include <atomic>

#include "operators.h"

namespace secateur_onnx {

// Linear layers, norms and attention of an encoder in one call (sct_chain)
//
//   inputs      x (batch, tokens, in); packed (bytes) uint8, a constant, in which weights, biases, scales and shifts lie at
//               multiples of 64; steps (count, kStepFields) int64 and numbers (count) float, constants, as in
//               secateur/steps.h, with offsets into packed for places; and where there are: mask and keep, as for
//               Attention, the same for all
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
  int threads(Threads& of_session) const;

  const Constant packed_;
  std::vector<sct_step> steps_;
  int64_t heads_ = 0;
  const int64_t width_;  // numbers a token in x
  int64_t rows_ = 0;     // and in y
  // How tokens are cut depends on the threads of the session, which the interface does not tell.
  mutable std::atomic<int> threads_{1};
  mutable std::atomic<uint64_t> calls_{0};
};

}  // namespace secateur_onnx
