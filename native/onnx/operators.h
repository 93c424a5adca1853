// The operators for single layers, and the calls into ONNX Runtime that all operators share.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "ort_abi.h"
#include "secateur/kernels.h"

namespace secateur_onnx {

struct Failure {
  OrtStatus* status;
};

// Calls into ONNX Runtime. A failed call throws Failure, which library.cpp catches where ONNX Runtime calls us.
struct Runtime {
  const OrtApi* api;

  void check(OrtStatus* status) const {
    if (status) throw Failure{status};
  }
  [[noreturn]] void fail(int code, const std::string& text) const;
  std::vector<int64_t> shape(const OrtValue* value) const;
  int64_t int_attribute(const OrtKernelInfo* info, const char* name, int64_t otherwise) const;
  float float_attribute(const OrtKernelInfo* info, const char* name, float otherwise) const;

  // An input of the operator; null where an optional input is left out.
  const OrtValue* input(const OrtKernelContext* context, size_t i) const;
  OrtValue* output(OrtKernelContext* context, const std::vector<int64_t>& shape) const;

  template <class T>
  T* data(const OrtValue* value) const {
    if (!value) return nullptr;
    void* address = nullptr;
    check(ort::GetTensorMutableData::call(api, const_cast<OrtValue*>(value), &address));
    return static_cast<T*>(address);
  }
};

// The threads of the session that runs a kernel. `run` is their sct_run_function.
struct SessionThreads {
  const Runtime* runtime;
  const OrtKernelContext* context;

  // The number of threads that the machine runs at once.
  static int of_machine();
  // Counts the threads that work at once when the session is asked for as many as the machine has, for at most so many
  // microseconds: the threads of the session, or fewer on a busy machine.
  int count_at_work(int most_microseconds);
  static void run(void* threads, void (*task)(void*), void* context, int count);
};

struct Free {
  void operator()(uint8_t* p) const { std::free(p); }
};
using Owned = std::unique_ptr<uint8_t, Free>;

// The bytes of a constant input, at an address that is a multiple of `align`: in the session's memory, or in a copy.
struct Constant {
  const uint8_t* data = nullptr;
  int64_t bytes = 1;
  Owned copy;

  Constant(const Runtime& runtime, const OrtKernelInfo* info, size_t input, size_t align, const char* name);
};

// Writes the strides of a mask (batch, heads, queries, keys) to `to`: floats from batch to batch, head to head and
// query to query, 0 where the mask has size 1. Without a mask, leaves `to` as it is.
void mask_strides(const Runtime& runtime, const OrtValue* mask, const int64_t (&sizes)[4], int64_t (&to)[3]);

// y = norm(activation(x w^T + bias) * gate + residual)
//
//   inputs      x (..., in); packed (bytes) uint8, a constant, which sct_pack_* has written; optional: bias (out),
//               residual (..., out), scale (out) and shift (out) of the norm, gate (..., out)
//   attributes  activation: a sct_activation; norm: a sct_norm; epsilon
class SparseLinear {
 public:
  static constexpr const char* kName = "SparseLinear";
  static constexpr int kInputs[] = {ort::kFloat, ort::kUint8, ort::kFloat, ort::kFloat,
                                    ort::kFloat, ort::kFloat, ort::kFloat};
  static constexpr size_t kRequired = 2;

  SparseLinear(const Runtime& runtime, const OrtKernelInfo* info);
  void compute(OrtKernelContext* context) const;
  const Runtime runtime;

 private:
  const float* vector(const OrtKernelContext* context, size_t input, const char* name) const;

  const Constant packed_;
  sct_info info_{};
  int activation_, norm_;
  float epsilon_;
};

// out = softmax(scale q k^T + mask) v, head by head
//
//   inputs      q (batch, queries, heads * width), k and v (batch, keys, kv_heads * width), or each of them (batch, its
//               heads, tokens, width); optional: mask, which is added, and keep, which is false for keys to leave out,
//               both of four dimensions (batch, heads, queries, keys), the first three of which may be 1
//   attributes  heads, kv_heads, scale
//   output      (batch, queries, heads * width)
class Attention {
 public:
  static constexpr const char* kName = "Attention";
  static constexpr int kInputs[] = {ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kBool};
  static constexpr size_t kRequired = 3;

  Attention(const Runtime& runtime, const OrtKernelInfo* info);
  void compute(OrtKernelContext* context) const;
  const Runtime runtime;

 private:
  int64_t heads_, kv_heads_;
  float scale_;
};

// y = norm(x) over the last dimension
//
//   inputs      x (..., width); optional: scale (width) and shift (width)
//   attributes  norm: a sct_norm; epsilon
class Norm {
 public:
  static constexpr const char* kName = "Norm";
  static constexpr int kInputs[] = {ort::kFloat, ort::kFloat, ort::kFloat};
  static constexpr size_t kRequired = 1;

  Norm(const Runtime& runtime, const OrtKernelInfo* info);
  void compute(OrtKernelContext* context) const;
  const Runtime runtime;

 private:
  int norm_;
  float epsilon_;
};

// Rotary position embedding: y = x cos + rotate_half(x) sin, where rotate_half(x) is the second half of the last
// dimension, negated, followed by the first half
//
//   inputs      x (batch, heads, tokens, width), cos and sin (batch or 1, 1, tokens, width)
class Rotary {
 public:
  static constexpr const char* kName = "Rotary";
  static constexpr int kInputs[] = {ort::kFloat, ort::kFloat, ort::kFloat};
  static constexpr size_t kRequired = 3;

  Rotary(const Runtime& r, const OrtKernelInfo*) : runtime(r) {}
  void compute(OrtKernelContext* context) const;
  const Runtime runtime;
};

}  // namespace secateur_onnx
