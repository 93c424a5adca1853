// The part of ONNX Runtime's C interface that a custom operator needs, so that the build does not need ONNX Runtime's
// headers (its wheels have none).
//
// OrtApi is a table of function pointers that only ever grows at its end, so the index of a function never changes.
// OrtCustomOp grows in the same way and states its version. Both are as of version 17 (ONNX Runtime 1.17, January 2024;
// include/onnxruntime/core/session/onnxruntime_c_api.h). tests/runtime/test_onnx_library.py calls every function below.
#pragma once
#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;
struct OrtCustomOp;

struct OrtApi {
  const void* function[275];
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

namespace ort {

constexpr uint32_t kVersion = 17;
constexpr int kInvalidArgument = 2, kInvalidGraph = 10;       // OrtErrorCode
constexpr int kFloat = 1, kUint8 = 2, kInt64 = 7, kBool = 9;  // ONNXTensorElementDataType
constexpr int kRequired = 0, kOptional = 1;                   // OrtCustomOpInputOutputCharacteristic

// A function of the table: its index, and its type.
template <int INDEX, class... Arguments>
struct Entry {
  template <class Result = OrtStatus*>
  static Result call(const OrtApi* api, Arguments... arguments) {
    return reinterpret_cast<Result (*)(Arguments...)>(const_cast<void*>(api->function[INDEX]))(arguments...);
  }
};

using CreateStatus = Entry<0, int, const char*>;
using CreateCustomOpDomain = Entry<26, const char*, OrtCustomOpDomain**>;
using CustomOpDomain_Add = Entry<27, OrtCustomOpDomain*, const OrtCustomOp*>;
using AddCustomOpDomain = Entry<28, OrtSessionOptions*, OrtCustomOpDomain*>;
using GetTensorMutableData = Entry<51, OrtValue*, void**>;
using GetDimensionsCount = Entry<61, const OrtTensorTypeAndShapeInfo*, size_t*>;
using GetDimensions = Entry<62, const OrtTensorTypeAndShapeInfo*, int64_t*, size_t>;
using GetTensorTypeAndShape = Entry<65, const OrtValue*, OrtTensorTypeAndShapeInfo**>;
using KernelInfoGetAttribute_float = Entry<85, const OrtKernelInfo*, const char*, float*>;
using KernelInfoGetAttribute_int64 = Entry<86, const OrtKernelInfo*, const char*, int64_t*>;
using KernelContext_GetInputCount = Entry<88, const OrtKernelContext*, size_t*>;
using KernelContext_GetInput = Entry<90, const OrtKernelContext*, size_t, const OrtValue**>;
using KernelContext_GetOutput = Entry<91, OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**>;
using ReleaseStatus = Entry<93, OrtStatus*>;
using ReleaseTensorTypeAndShapeInfo = Entry<99, OrtTensorTypeAndShapeInfo*>;
using KernelInfoGetConstantInput_tensor = Entry<249, const OrtKernelInfo*, size_t, int*, const OrtValue**>;
using KernelContext_ParallelFor = Entry<274, const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*>;

}  // namespace ort

struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  // Read only from version 18 on.
  void* later[4];
};
