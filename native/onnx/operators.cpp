// The operators for single layers, and the calls into ONNX Runtime.
#include "operators.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <new>
#include <thread>

namespace secateur_onnx {

void Runtime::fail(int code, const std::string& text) const {
  throw Failure{ort::CreateStatus::call(api, code, text.c_str())};
}

std::vector<int64_t> Runtime::shape(const OrtValue* value) const {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(ort::GetTensorTypeAndShape::call(api, value, &info));
  size_t rank = 0;
  OrtStatus* status = ort::GetDimensionsCount::call(api, info, &rank);
  std::vector<int64_t> sizes(rank);
  if (!status) status = ort::GetDimensions::call(api, info, sizes.data(), rank);
  ort::ReleaseTensorTypeAndShapeInfo::call<void>(api, info);
  check(status);
  return sizes;
}

int64_t Runtime::int_attribute(const OrtKernelInfo* info, const char* name, int64_t otherwise) const {
  int64_t attribute = 0;
  OrtStatus* status = ort::KernelInfoGetAttribute_int64::call(api, info, name, &attribute);
  if (!status) return attribute;
  ort::ReleaseStatus::call<void>(api, status);
  return otherwise;
}

float Runtime::float_attribute(const OrtKernelInfo* info, const char* name, float otherwise) const {
  float attribute = 0;
  OrtStatus* status = ort::KernelInfoGetAttribute_float::call(api, info, name, &attribute);
  if (!status) return attribute;
  ort::ReleaseStatus::call<void>(api, status);
  return otherwise;
}

const OrtValue* Runtime::input(const OrtKernelContext* context, size_t i) const {
  size_t count = 0;
  check(ort::KernelContext_GetInputCount::call(api, context, &count));
  const OrtValue* value = nullptr;
  if (i < count) check(ort::KernelContext_GetInput::call(api, context, i, &value));
  return value;
}

OrtValue* Runtime::output(OrtKernelContext* context, const std::vector<int64_t>& shape) const {
  OrtValue* value = nullptr;
  check(ort::KernelContext_GetOutput::call(api, context, 0, shape.data(), shape.size(), &value));
  return value;
}

// ONNX Runtime's interface does not say how many threads a session has. A session that is asked for more threads uses
// the threads that it has, and a task that finds nothing left to do returns at once.
int SessionThreads::of_machine() {
  static const int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return threads;
}

int SessionThreads::count_at_work(int most_microseconds) {
  struct Count {
    int most;
    std::chrono::steady_clock::time_point end;
    std::atomic<int> now{0}, highest{0};
  } count{of_machine(), std::chrono::steady_clock::now() + std::chrono::microseconds(most_microseconds)};
  run(
      this,
      [](void* context) {
        auto& c = *static_cast<Count*>(context);
        const int now = ++c.now;
        for (int before = c.highest; now > before && !c.highest.compare_exchange_weak(before, now);) {
        }
        while (c.highest < c.most && std::chrono::steady_clock::now() < c.end) std::this_thread::yield();
        --c.now;
      },
      &count, of_machine());
  return count.highest;
}

void SessionThreads::run(void* threads, void (*task)(void*), void* context, int count) {
  struct Task {
    void (*function)(void*);
    void* context;
  };
  const auto& self = *static_cast<SessionThreads*>(threads);
  Task shared{task, context};
  OrtStatus* status = ort::KernelContext_ParallelFor::call(
      self.runtime->api, self.context,
      [](void* t, size_t) { static_cast<Task*>(t)->function(static_cast<Task*>(t)->context); },
      static_cast<size_t>(count), size_t{0}, static_cast<void*>(&shared));
  if (!status) return;
  ort::ReleaseStatus::call<void>(self.runtime->api, status);
  task(context);
}

Constant::Constant(const Runtime& runtime, const OrtKernelInfo* info, size_t input, size_t align, const char* name) {
  int constant = 0;
  const OrtValue* value = nullptr;
  runtime.check(ort::KernelInfoGetConstantInput_tensor::call(runtime.api, info, input, &constant, &value));
  if (!constant || !value) runtime.fail(ort::kInvalidGraph, std::string(name) + " must be an initializer");
  for (int64_t n : runtime.shape(value)) bytes *= n;
  data = runtime.data<uint8_t>(value);
  if (reinterpret_cast<uintptr_t>(data) % align == 0) return;
  copy.reset(static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64))));
  if (!copy) throw std::bad_alloc();
  std::memcpy(copy.get(), data, static_cast<size_t>(bytes));
  data = copy.get();
}

SparseLinear::SparseLinear(const Runtime& r, const OrtKernelInfo* info)
    : runtime(r),
      packed_(r, info, 1, 8, "the packed weight of SparseLinear"),
      activation_(static_cast<int>(r.int_attribute(info, "activation", SCT_NONE))),
      norm_(static_cast<int>(r.int_attribute(info, "norm", SCT_NO_NORM))),
      epsilon_(r.float_attribute(info, "epsilon", 1e-5f)) {
  if (activation_ < SCT_NONE || activation_ > SCT_SILU)
    runtime.fail(ort::kInvalidGraph, "SparseLinear knows no activation " + std::to_string(activation_));
  if (norm_ < SCT_NO_NORM || norm_ > SCT_RMS_NORM)
    runtime.fail(ort::kInvalidGraph, "SparseLinear knows no norm " + std::to_string(norm_));
  // Model files come from anywhere: no kernel may read or write outside.
  int status = sct_validate(packed_.data, packed_.bytes);
  if (status == SCT_OK) status = sct_describe(packed_.data, packed_.bytes, &info_);
  if (status != SCT_OK) runtime.fail(ort::kInvalidGraph, std::string("SparseLinear: ") + sct_error_text(status));
}

const float* SparseLinear::vector(const OrtKernelContext* context, size_t input, const char* name) const {
  const OrtValue* value = runtime.input(context, input);
  if (value && runtime.shape(value) != std::vector<int64_t>{info_.rows})
    runtime.fail(ort::kInvalidArgument,
                 "the " + std::string(name) + " of SparseLinear has " + std::to_string(info_.rows) + " numbers");
  return runtime.data<float>(value);
}

void SparseLinear::compute(OrtKernelContext* context) const {
  const OrtValue *x = runtime.input(context, 0), *residual = runtime.input(context, 3);
  std::vector<int64_t> shape = runtime.shape(x);
  if (shape.empty() || shape.back() != info_.cols)
    runtime.fail(ort::kInvalidArgument, "SparseLinear takes inputs of " + std::to_string(info_.cols) + " features");
  shape.back() = info_.rows;
  if (residual && runtime.shape(residual) != shape)
    runtime.fail(ort::kInvalidArgument, "the residual of SparseLinear has the shape of its output");
  const OrtValue* gate = runtime.input(context, 6);
  if (gate && runtime.shape(gate) != shape)
    runtime.fail(ort::kInvalidArgument, "the gate of SparseLinear has the shape of its output");
  int64_t tokens = 1;
  for (size_t i = 0; i + 1 < shape.size(); i++) tokens *= shape[i];
  const float* bias = vector(context, 2, "bias");
  const sct_after after{runtime.data<float>(residual),
                        info_.rows,
                        norm_,
                        vector(context, 4, "scale"),
                        vector(context, 5, "shift"),
                        epsilon_,
                        runtime.data<float>(gate),
                        info_.rows};
  OrtValue* out = runtime.output(context, shape);
  if (!tokens) return;
  SessionThreads threads{&runtime, context};
  const int status =
      sct_linear_on(packed_.data, packed_.bytes, runtime.data<float>(x), tokens, info_.cols, bias, activation_,
                    residual || norm_ || gate ? &after : nullptr, runtime.data<float>(out), info_.rows,
                    SessionThreads::of_machine(), SCT_ISA_AUTO, SessionThreads::run, &threads);
  if (status != SCT_OK) runtime.fail(ort::kInvalidArgument, std::string("SparseLinear: ") + sct_error_text(status));
}

void mask_strides(const Runtime& runtime, const OrtValue* mask, const int64_t (&sizes)[4], int64_t (&to)[3]) {
  if (!mask) return;
  const std::vector<int64_t> shape = runtime.shape(mask);
  bool fits = shape.size() == 4 && shape[3] == sizes[3];
  int64_t stride = sizes[3];
  for (int i = 2; fits && i >= 0; i--) {
    fits = shape[i] == sizes[i] || shape[i] == 1;
    to[i] = shape[i] == 1 ? 0 : stride;
    stride *= shape[i];
  }
  if (!fits)
    runtime.fail(ort::kInvalidArgument, "a mask of attention has four dimensions: batch, heads, queries, keys");
}

Attention::Attention(const Runtime& r, const OrtKernelInfo* info)
    : runtime(r),
      heads_(r.int_attribute(info, "heads", 0)),
      kv_heads_(r.int_attribute(info, "kv_heads", heads_)),
      scale_(r.float_attribute(info, "scale", 1.0f)) {
  if (heads_ < 1 || kv_heads_ < 1 || heads_ % kv_heads_)
    runtime.fail(ort::kInvalidGraph, "Attention needs heads, a multiple of kv_heads");
}

namespace {

// q, k, v or the output as heads: sizes, and strides in floats from batch to batch, head to head and token to token.
struct Heads {
  int64_t batch = 0, tokens = 0, width = 0, stride[3] = {};

  Heads(const std::vector<int64_t>& shape, int64_t heads) {
    if (shape.size() == 4 && shape[1] == heads) {
      batch = shape[0], tokens = shape[2], width = shape[3];
      stride[0] = heads * tokens * width, stride[1] = tokens * width, stride[2] = width;
    } else if (shape.size() == 3 && shape[2] % heads == 0) {
      batch = shape[0], tokens = shape[1], width = shape[2] / heads;
      stride[0] = tokens * shape[2], stride[1] = width, stride[2] = shape[2];
    }
  }
};

}  // namespace

void Attention::compute(OrtKernelContext* context) const {
  const OrtValue *q = runtime.input(context, 0), *k = runtime.input(context, 1), *v = runtime.input(context, 2);
  const OrtValue *mask = runtime.input(context, 3), *keep = runtime.input(context, 4);
  const Heads query(runtime.shape(q), heads_), key(runtime.shape(k), kv_heads_), value(runtime.shape(v), kv_heads_);
  if (!query.width || key.width != query.width || value.width != query.width || key.batch != query.batch ||
      value.batch != query.batch || value.tokens != key.tokens)
    runtime.fail(ort::kInvalidArgument,
                 "Attention takes (batch, tokens, heads * width), or (batch, heads, tokens, width), of fitting sizes");
  sct_attention_job job{};
  job.batch = query.batch, job.heads = heads_, job.kv_heads = kv_heads_;
  job.queries = query.tokens, job.keys = key.tokens, job.width = query.width, job.scale = scale_;
  const int64_t sizes[] = {job.batch, heads_, job.queries, job.keys};
  mask_strides(runtime, mask, sizes, job.mask_stride);
  mask_strides(runtime, keep, sizes, job.keep_stride);
  const std::vector<int64_t> shape = {job.batch, job.queries, heads_ * job.width};
  OrtValue* out = runtime.output(context, shape);
  if (!job.batch || !job.queries) return;
  job.q = runtime.data<float>(q), job.k = runtime.data<float>(k), job.v = runtime.data<float>(v);
  job.out = runtime.data<float>(out), job.mask = runtime.data<float>(mask), job.keep = runtime.data<uint8_t>(keep);
  std::copy(query.stride, query.stride + 3, job.q_stride);
  std::copy(key.stride, key.stride + 3, job.k_stride);
  std::copy(value.stride, value.stride + 3, job.v_stride);
  const Heads merged(shape, heads_);
  std::copy(merged.stride, merged.stride + 3, job.out_stride);
  SessionThreads threads{&runtime, context};
  const int status = sct_attention(&job, SessionThreads::of_machine(), SCT_ISA_AUTO, SessionThreads::run, &threads);
  if (status != SCT_OK) runtime.fail(ort::kInvalidArgument, std::string("Attention: ") + sct_error_text(status));
}

Norm::Norm(const Runtime& r, const OrtKernelInfo* info)
    : runtime(r),
      norm_(static_cast<int>(r.int_attribute(info, "norm", SCT_LAYER_NORM))),
      epsilon_(r.float_attribute(info, "epsilon", 1e-5f)) {
  if (norm_ < SCT_NO_NORM || norm_ > SCT_RMS_NORM)
    runtime.fail(ort::kInvalidGraph, "Norm knows no norm " + std::to_string(norm_));
}

void Norm::compute(OrtKernelContext* context) const {
  const OrtValue* x = runtime.input(context, 0);
  const std::vector<int64_t> shape = runtime.shape(x);
  if (shape.empty() || shape.back() < 1) runtime.fail(ort::kInvalidArgument, "Norm takes at least one number a token");
  const int64_t width = shape.back();
  const float* parts[2] = {};
  for (size_t i = 0; i < 2; i++) {
    const OrtValue* part = runtime.input(context, 1 + i);
    if (part && runtime.shape(part) != std::vector<int64_t>{width})
      runtime.fail(ort::kInvalidArgument, "scale and shift of Norm have " + std::to_string(width) + " numbers");
    parts[i] = runtime.data<float>(part);
  }
  int64_t tokens = 1;
  for (size_t i = 0; i + 1 < shape.size(); i++) tokens *= shape[i];
  OrtValue* out = runtime.output(context, shape);
  SessionThreads threads{&runtime, context};
  const int status = sct_norm_on(runtime.data<float>(x), tokens, width, width, norm_, parts[0], parts[1], epsilon_,
                                 runtime.data<float>(out), width, SessionThreads::of_machine(), SCT_ISA_AUTO,
                                 SessionThreads::run, &threads);
  if (status != SCT_OK) runtime.fail(ort::kInvalidArgument, std::string("Norm: ") + sct_error_text(status));
}

void Rotary::compute(OrtKernelContext* context) const {
  const OrtValue *x = runtime.input(context, 0), *cos = runtime.input(context, 1), *sin = runtime.input(context, 2);
  const std::vector<int64_t> shape = runtime.shape(x), angles = runtime.shape(cos);
  if (shape.size() != 4 || shape[3] % 2 || angles.size() != 4 || runtime.shape(sin) != angles ||
      (angles[0] != 1 && angles[0] != shape[0]) || angles[1] != 1 || angles[2] != shape[2] || angles[3] != shape[3])
    runtime.fail(ort::kInvalidArgument,
                 "Rotary takes (batch, heads, tokens, even width), and cos and sin (batch or 1, 1, tokens, width)");
  OrtValue* out = runtime.output(context, shape);
  const int64_t tokens = shape[2], width = shape[3];
  const int64_t stride[] = {shape[1] * tokens * width, tokens * width, width};
  const int status =
      sct_rotary(runtime.data<float>(x), stride, shape[0], shape[1], tokens, width, runtime.data<float>(cos),
                 runtime.data<float>(sin), angles[0] == 1 ? 0 : tokens * width, runtime.data<float>(out), stride);
  if (status != SCT_OK) runtime.fail(ort::kInvalidArgument, std::string("Rotary: ") + sct_error_text(status));
}

}  // namespace secateur_onnx
