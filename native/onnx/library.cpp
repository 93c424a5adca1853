// The kernels as a custom-operator library of ONNX Runtime: operator SparseLinear of domain "secateur".
//
//   inputs     x (..., in) float, packed (bytes) uint8 (a constant: what sct_pack_* wrote), bias (out) float,
//              optional
//   attribute  activation: a number of sct_activation, 0 by default
//   output     (..., out) float
//
// A session's own threads do the work.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "ort_abi.h"
#include "secateur/kernels.h"

namespace {

const char* const kDomain = "secateur";

struct Failure {
  OrtStatus* status;
};

// Calls into ONNX Runtime; what it refuses is thrown, and caught where it calls us.
struct Runtime {
  const OrtApi* api;

  void check(OrtStatus* status) const {
    if (status) throw Failure{status};
  }
  [[noreturn]] void fail(int code, const std::string& text) const {
    throw Failure{ort::CreateStatus::call(api, code, text.c_str())};
  }
  template <class T>
  T* data(const OrtValue* value) const {
    void* found = nullptr;
    check(ort::GetTensorMutableData::call(api, const_cast<OrtValue*>(value), &found));
    return static_cast<T*>(found);
  }
  std::vector<int64_t> shape(const OrtValue* value) const {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(ort::GetTensorTypeAndShape::call(api, value, &info));
    size_t rank = 0;
    OrtStatus* status = ort::GetDimensionsCount::call(api, info, &rank);
    std::vector<int64_t> found(rank);
    if (!status) status = ort::GetDimensions::call(api, info, found.data(), rank);
    ort::ReleaseTensorTypeAndShapeInfo::call<void>(api, info);
    check(status);
    return found;
  }
  const OrtValue* input(const OrtKernelContext* context, size_t i) const {
    const OrtValue* found = nullptr;
    check(ort::KernelContext_GetInput::call(api, context, i, &found));
    return found;
  }
};

struct Free {
  void operator()(uint8_t* p) const { std::free(p); }
};

struct Kernel {
  Runtime runtime;
  const uint8_t* packed = nullptr;
  std::unique_ptr<uint8_t, Free> copy;  // where the session's own memory is not aligned
  sct_info info{};
  int64_t bytes = 0, activation = 0;

  Kernel(const OrtApi* api, const OrtKernelInfo* node) : runtime{api} {
    if (OrtStatus* status = ort::KernelInfoGetAttribute_int64::call(api, node, "activation", &activation)) {
      ort::ReleaseStatus::call<void>(api, status);
      activation = SCT_NONE;
    }
    if (activation < SCT_NONE || activation > SCT_SILU)
      runtime.fail(ort::kInvalidGraph, "SparseLinear knows no activation " + std::to_string(activation));
    int constant = 0;
    const OrtValue* value = nullptr;
    runtime.check(ort::KernelInfoGetConstantInput_tensor::call(api, node, 1, &constant, &value));
    if (!constant || !value) runtime.fail(ort::kInvalidGraph, "the packed weight of SparseLinear must be an initializer");
    bytes = 1;
    for (int64_t n : runtime.shape(value)) bytes *= n;
    packed = runtime.data<uint8_t>(value);
    if (reinterpret_cast<uintptr_t>(packed) % 8) {
      copy.reset(static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64))));
      if (!copy) throw std::bad_alloc();
      std::memcpy(copy.get(), packed, static_cast<size_t>(bytes));
      packed = copy.get();
    }
    // Model files come from anywhere: no kernel may read or write outside.
    int status = sct_validate(packed, bytes);
    if (status == SCT_OK) status = sct_describe(packed, bytes, &info);
    if (status != SCT_OK) runtime.fail(ort::kInvalidGraph, std::string("SparseLinear: ") + sct_error_text(status));
  }

  void compute(OrtKernelContext* context) const {
    size_t inputs = 0;
    runtime.check(ort::KernelContext_GetInputCount::call(runtime.api, context, &inputs));
    const OrtValue* x = runtime.input(context, 0);
    const OrtValue* bias = inputs > 2 ? runtime.input(context, 2) : nullptr;
    std::vector<int64_t> shape = runtime.shape(x);
    if (shape.empty() || shape.back() != info.cols)
      runtime.fail(ort::kInvalidArgument, "SparseLinear takes inputs of " + std::to_string(info.cols) + " features");
    if (bias && runtime.shape(bias) != std::vector<int64_t>{info.rows})
      runtime.fail(ort::kInvalidArgument, "the bias of SparseLinear has " + std::to_string(info.rows) + " numbers");
    shape.back() = info.rows;
    int64_t tokens = 1;
    for (size_t i = 0; i + 1 < shape.size(); i++) tokens *= shape[i];
    OrtValue* out = nullptr;
    runtime.check(
        ort::KernelContext_GetOutput::call(runtime.api, context, 0, shape.data(), shape.size(), &out));
    if (!tokens) return;
    Fork fork{this, context};
    const int status = sct_linear_on(packed, bytes, runtime.data<float>(x), tokens, info.cols,
                                     bias ? runtime.data<float>(bias) : nullptr, static_cast<int>(activation),
                                     runtime.data<float>(out), info.rows, most_threads(), SCT_ISA_AUTO, run, &fork);
    if (status != SCT_OK) runtime.fail(ort::kInvalidArgument, std::string("SparseLinear: ") + sct_error_text(status));
  }

 private:
  struct Fork {
    const Kernel* kernel;
    const OrtKernelContext* context;
  };
  struct Task {
    void (*function)(void*);
    void* context;
  };

  // The interface does not tell how many threads a session has; it makes no more of them than there are batches,
  // and a task that finds nothing left to do returns at once.
  static int most_threads() {
    static const int found = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    return found;
  }

  static void run(void* pool, void (*task)(void*), void* context, int threads) {
    const auto& fork = *static_cast<Fork*>(pool);
    Task shared{task, context};
    OrtStatus* status = ort::KernelContext_ParallelFor::call(
        fork.kernel->runtime.api, fork.context,
        [](void* t, size_t) { static_cast<Task*>(t)->function(static_cast<Task*>(t)->context); },
        static_cast<size_t>(threads), size_t{0}, static_cast<void*>(&shared));
    if (!status) return;
    ort::ReleaseStatus::call<void>(fork.kernel->runtime.api, status);
    task(context);
  }
};

template <class Body>
OrtStatus* guarded(const OrtApi* api, Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return ort::CreateStatus::call(api, 1, error.what());
  }
}

OrtCustomOp sparse_linear() {
  OrtCustomOp op{};
  op.version = ort::kVersion;
  op.GetName = [](const OrtCustomOp*) { return "SparseLinear"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 3; };
  op.GetInputType = [](const OrtCustomOp*, size_t i) { return i == 1 ? ort::kUint8 : ort::kFloat; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return ort::kFloat; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) { return i == 2 ? ort::kOptional : ort::kRequired; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return ort::kRequired; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return guarded(api, [&] { *kernel = new Kernel(api, info); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const auto* found = static_cast<Kernel*>(kernel);
    return guarded(found->runtime.api, [&] { found->compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1 << 30; };
  return op;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ort::kVersion);
  if (!api) {
    const OrtApi* oldest = base->GetApi(1);
    return ort::CreateStatus::call(oldest, 1, "secateur's operators need ONNX Runtime 1.17 or newer");
  }
  return guarded(api, [&] {
    const Runtime runtime{api};
    static const OrtCustomOp op = sparse_linear();
    // ONNX Runtime keeps a pointer to the domain for as long as any session made with the options lives, so that
    // one is made for the process and never released.
    static OrtCustomOpDomain* const domain = [&] {
      OrtCustomOpDomain* made = nullptr;
      runtime.check(ort::CreateCustomOpDomain::call(api, kDomain, &made));
      runtime.check(ort::CustomOpDomain_Add::call(api, made, &op));
      return made;
    }();
    runtime.check(ort::AddCustomOpDomain::call(api, options, domain));
  });
}
