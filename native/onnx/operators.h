// The operators, and how they call ONNX Runtime.
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

// Calls into ONNX Runtime; what it refuses is thrown, and caught where it calls us.
struct Runtime {
  const OrtApi* api;

  void check(OrtStatus* status) const {
    if (status) throw Failure{status};
  }
  [[noreturn]] void fail(int code, const std::string& text) const;
  std::vector<int64_t> shape(const OrtValue* value) const;
  int64_t whole(const OrtKernelInfo* info, const char* name, int64_t otherwise) const;
  float real(const OrtKernelInfo* info, const char* name, float otherwise) const;

  // Null where an optional input is left out.
  const OrtValue* input(const OrtKernelContext* context, size_t i) const;
  OrtValue* output(OrtKernelContext* context, const std::vector<int64_t>& shape) const;

  template <class T>
  T* data(const OrtValue* value) const {
    if (!value) return nullptr;
    void* found = nullptr;
    check(ort::GetTensorMutableData::call(api, const_cast<OrtValue*>(value), &found));
    return static_cast<T*>(found);
  }
};

// The threads of the session that runs a kernel, as a sct_run_function.
struct Threads {
  const Runtime* runtime;
  const OrtKernelContext* context;

  static int most();  // that the machine has
  // Threads that are at work at once when all are called: what the session has, or fewer on a busy machine.
  int seen(int most_microseconds);
  static void run(void* threads, void (*task)(void*), void* context, int count);
};

// Memory of a kernel's own.
struct Free {
  void operator()(uint8_t* p) const { std::free(p); }
};
using Owned = std::unique_ptr<uint8_t, Free>;

// The bytes of an input that is a constant, at a multiple of `align`: where the session keeps them, or copied.
struct Constant {
  const uint8_t* data = nullptr;
  int64_t bytes = 1;
  Owned copy;

  Constant(const Runtime& runtime, const OrtKernelInfo* info, size_t input, size_t align, const char* name);
};

// Floats between the batches, heads and queries of a mask (batch, heads, queries, keys), 0 where it has size 1. Left as
// they are where there is no mask.
void mask_strides(const Runtime& runtime, const OrtValue* mask, const int64_t (&sizes)[4], int64_t (&to)[3]);

// y = norm(activation(x w^T + bias) * gate + residual)
//
//   inputs      x (..., in), packed (bytes) uint8, a constant, as sct_pack_* writes it; and where there are: bias (out),
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

// softmax(scale q k^T + mask) v, head by head
//
//   inputs      q (batch, queries, heads * width), k and v (batch, keys, kv_heads * width), or each of them (batch, its
//               heads, tokens, width); and where there are: mask, added, and keep, false for keys left out, both of four
//               dimensions that are those of (batch, heads, queries, keys) or 1, the keys in full
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

// norm(x) over the last dimension
//
//   inputs      x (..., width); and where there are: scale (width) and shift (width)
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

// Rotary positions: x cos + turned(x) sin, where turned(x) is the second half of the last dimension, negated, before the
// first
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
