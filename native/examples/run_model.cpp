// Runs a model of `secateur export --to onnx --sparse` with ONNX Runtime's own C++ interface and no Python:
//
//     run_model secateur_onnx.so model.onnx BATCH TOKENS
//
// The first input counts from 1 to 97 over and over (token ids), other integer inputs are 1 (masks, types), float
// inputs are sines. Prints the first numbers of every float output and the median time of a run on one thread.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

static int run(const char* library, const char* model, int64_t batch, int64_t tokens) {
  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "run_model");
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(1);
  options.RegisterCustomOpsLibrary(library);
  Ort::Session session(env, model, options);
  std::printf("ONNX Runtime %s\n", OrtGetApiBase()->GetVersionString());

  const Ort::AllocatorWithDefaultOptions allocator;
  std::vector<std::string> names;
  std::vector<Ort::Value> inputs;
  for (size_t i = 0; i < session.GetInputCount(); i++) {
    names.push_back(session.GetInputNameAllocated(i, allocator).get());
    const Ort::TypeInfo type = session.GetInputTypeInfo(i);
    const auto port = type.GetTensorTypeAndShapeInfo();
    std::vector<int64_t> shape = port.GetShape();
    for (size_t d = 0; d < shape.size(); d++)
      if (shape[d] < 0) shape[d] = d ? tokens : batch;  // sizes left open at export
    Ort::Value value = Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), port.GetElementType());
    const auto count = static_cast<int64_t>(value.GetTensorTypeAndShapeInfo().GetElementCount());
    for (int64_t n = 0; n < count; n++) {
      const int64_t whole = i ? 1 : 1 + n % 97;
      switch (port.GetElementType()) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
          value.GetTensorMutableData<int64_t>()[n] = whole;
          break;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
          value.GetTensorMutableData<int32_t>()[n] = int32_t(whole);
          break;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
          value.GetTensorMutableData<float>()[n] = std::sin(float(n));
          break;
        default:
          throw Ort::Exception("the input " + names[i] + " is neither int64, int32 nor float", ORT_FAIL);
      }
    }
    inputs.push_back(std::move(value));
  }
  const size_t gives = session.GetOutputCount();
  for (size_t i = 0; i < gives; i++) names.push_back(session.GetOutputNameAllocated(i, allocator).get());
  std::vector<const char*> texts;
  for (const std::string& name : names) texts.push_back(name.c_str());

  std::vector<Ort::Value> outputs;
  std::vector<double> times;
  for (int turn = 0; turn < 21; turn++) {
    const auto start = std::chrono::steady_clock::now();
    outputs = session.Run(Ort::RunOptions(), texts.data(), inputs.data(), inputs.size(), &texts[inputs.size()], gives);
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  for (size_t i = 0; i < outputs.size(); i++) {
    const auto port = outputs[i].GetTensorTypeAndShapeInfo();
    std::printf("%s:", texts[inputs.size() + i]);
    const size_t count = port.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? port.GetElementCount() : 0;
    for (size_t n = 0; n < std::min(count, size_t{8}); n++) std::printf(" %.9g", outputs[i].GetTensorData<float>()[n]);
    std::printf(count > 8 ? " ...\n" : "\n");
  }
  std::nth_element(times.begin(), times.begin() + 10, times.end());
  std::printf("median of 21 runs: %.2f ms\n", times[10]);
  return 0;
}

int main(int count, char** words) try {
  if (count == 5) return run(words[1], words[2], std::atoll(words[3]), std::atoll(words[4]));
  std::fprintf(stderr, "usage: run_model LIBRARY MODEL BATCH TOKENS\n");
  return 2;
} catch (const std::exception& error) {
  std::fprintf(stderr, "run_model: %s\n", error.what());
  return 1;
}
