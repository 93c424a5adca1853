// The kernels as a custom-operator library of ONNX Runtime, with operators of the domain "secateur". They run on the
// threads of the session.
#include "chain.h"
#include "operators.h"

#include <exception>

namespace secateur_onnx {
namespace {

// Calls body and turns exceptions into a status of ONNX Runtime.
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

// The description of an operator for ONNX Runtime, made from the constants and functions of its class.
template <class Kernel>
OrtCustomOp described() {
  OrtCustomOp op{};
  op.version = ort::kVersion;
  op.GetName = [](const OrtCustomOp*) { return Kernel::kName; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU
  op.GetInputTypeCount = [](const OrtCustomOp*) { return sizeof(Kernel::kInputs) / sizeof(int); };
  op.GetInputType = [](const OrtCustomOp*, size_t i) { return Kernel::kInputs[i]; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return ort::kFloat; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) {
    return i < Kernel::kRequired ? ort::kRequired : ort::kOptional;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return ort::kRequired; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return guarded(api, [&] { *kernel = new Kernel(Runtime{api}, info); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const auto* typed_kernel = static_cast<Kernel*>(kernel);
    return guarded(typed_kernel->runtime.api, [&] { typed_kernel->compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1 << 30; };
  return op;
}

}  // namespace
}  // namespace secateur_onnx

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  using namespace secateur_onnx;
  const OrtApi* api = base->GetApi(ort::kVersion);
  if (!api) return ort::CreateStatus::call(base->GetApi(1), 1, "secateur's operators need ONNX Runtime 1.17 or newer");
  return guarded(api, [&] {
    const Runtime runtime{api};
    static const OrtCustomOp operators[] = {described<SparseLinear>(), described<Attention>(), described<SparseChain>(),
                                            described<Norm>(), described<Rotary>()};
    // Sessions keep pointers into the domain, so the process makes one domain and never releases it.
    static OrtCustomOpDomain* const domain = [&] {
      OrtCustomOpDomain* made = nullptr;
      runtime.check(ort::CreateCustomOpDomain::call(api, "secateur", &made));
      for (const OrtCustomOp& op : operators) runtime.check(ort::CustomOpDomain_Add::call(api, made, &op));
      return made;
    }();
    runtime.check(ort::AddCustomOpDomain::call(api, options, domain));
  });
}
