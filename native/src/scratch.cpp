#include "scratch.h"

#include <cstdlib>
#include <memory>

#include "blob.h"

namespace secateur {
namespace {

struct Free {
  void operator()(float* p) const { std::free(p); }
};

}  // namespace

float* scratch(Scratch use, int64_t floats) {
  struct Buffer {
    std::unique_ptr<float, Free> data;
    int64_t floats = 0;
  };
  static thread_local Buffer buffers[static_cast<int>(Scratch::kCount)];
  Buffer& b = buffers[static_cast<int>(use)];
  if (b.floats < floats) {
    b.floats = 0;
    b.data.reset();
    const int64_t bytes = round_up(floats * 4 + 4096, 4096);
    b.data.reset(static_cast<float*>(std::aligned_alloc(4096, static_cast<size_t>(bytes))));
    if (!b.data) return nullptr;
    b.floats = floats;
  }
  return b.data.get();
}

}  // namespace secateur
