// Runs an ONNX model with the operators of secateur from C++, like an application without Python:
//
//   run_onnx libonnxruntime.so secateur_onnx.so model.onnx BATCH TOKENS WIDTH
//
// x (BATCH, TOKENS, WIDTH) counts up in steps of 1/8 modulo 2; y is printed, one number on each line. ONNX Runtime's
// library is loaded at run time, and only the part of its interface that onnx/ort_abi.h and the entries below declare
// is used, so that no headers are needed. An application has the headers and calls
// options.RegisterCustomOpsLibrary(path).
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../onnx/ort_abi.h"

struct OrtEnv;
struct OrtSession;
struct OrtMemoryInfo;
struct OrtRunOptions;

namespace ort {
using GetErrorMessage = Entry<2, const OrtStatus*>;
using CreateEnv = Entry<3, int, const char*, OrtEnv**>;
using CreateSession = Entry<7, const OrtEnv*, const char*, const OrtSessionOptions*, OrtSession**>;
using Run = Entry<9, OrtSession*, const OrtRunOptions*, const char* const*, const OrtValue* const*, size_t,
                  const char* const*, size_t, OrtValue**>;
using CreateSessionOptions = Entry<10, OrtSessionOptions**>;
using SetIntraOpNumThreads = Entry<24, OrtSessionOptions*, int>;
using RegisterCustomOpsLibrary = Entry<29, OrtSessionOptions*, const char*, void**>;
using CreateTensorWithDataAsOrtValue =
    Entry<49, const OrtMemoryInfo*, void*, size_t, const int64_t*, size_t, int, OrtValue**>;
using CreateCpuMemoryInfo = Entry<69, int, int, OrtMemoryInfo**>;
}  // namespace ort

int main(int count, char** arguments) {
  if (count != 7) return 2;
  void* library = dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL);
  const auto base = library ? reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase")) : nullptr;
  const OrtApi* api = base ? base()->GetApi(ort::kVersion) : nullptr;
  if (!api) return std::fprintf(stderr, "no ONNX Runtime: %s\n", library ? "too old" : dlerror()), 1;
  auto check = [&](OrtStatus* status) {
    if (!status) return;
    std::fprintf(stderr, "%s\n", ort::GetErrorMessage::call<const char*>(api, status));
    std::exit(1);
  };
  OrtEnv* environment = nullptr;
  OrtSessionOptions* options = nullptr;
  OrtSession* session = nullptr;
  OrtMemoryInfo* memory = nullptr;
  void* operators = nullptr;
  check(ort::CreateEnv::call(api, 3, "run_onnx", &environment));
  check(ort::CreateSessionOptions::call(api, &options));
  check(ort::SetIntraOpNumThreads::call(api, options, 2));
  check(ort::RegisterCustomOpsLibrary::call(api, options, arguments[2], &operators));
  check(ort::CreateSession::call(api, environment, arguments[3], options, &session));
  check(ort::CreateCpuMemoryInfo::call(api, 0, 0, &memory));
  const int64_t shape[] = {std::atol(arguments[4]), std::atol(arguments[5]), std::atol(arguments[6])};
  std::vector<float> x(static_cast<size_t>(shape[0] * shape[1] * shape[2]));
  for (size_t i = 0; i < x.size(); i++) x[i] = static_cast<float>(i % 16) / 8;
  OrtValue *in = nullptr, *out = nullptr;
  check(ort::CreateTensorWithDataAsOrtValue::call(api, memory, static_cast<void*>(x.data()), x.size() * 4, shape,
                                                  size_t{3}, ort::kFloat, &in));
  const char *from = "x", *to = "y";
  check(ort::Run::call(api, session, nullptr, &from, &in, size_t{1}, &to, size_t{1}, &out));
  void* y = nullptr;
  check(ort::GetTensorMutableData::call(api, out, &y));
  for (size_t i = 0; i < x.size(); i++) std::printf("%.9g\n", static_cast<double>(static_cast<float*>(y)[i]));
  std::fflush(stdout);
  std::_Exit(0);
}
