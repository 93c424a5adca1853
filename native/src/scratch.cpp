#include "scratch.h"

#include <cstdlib>
#include <memory>

#include "blob.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace secateur {
namespace {

struct Free {
  void operator()(float* p) const { std::free(p); }
};

// A buffer has more room than is asked for. Under AddressSanitizer what lies past that must not be touched.
void limit([[maybe_unused]] float* data, [[maybe_unused]] int64_t floats, [[maybe_unused]] int64_t room) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(data, static_cast<size_t>(floats * 4));
  __asan_poison_memory_region(data + floats, static_cast<size_t>((room - floats) * 4));
#endif
}

}  // namespace

float* scratch(Scratch use, int64_t floats) {
  struct Buffer {
    std::unique_ptr<float, Free> data;
    int64_t floats = 0, room = 0;
  };
  static thread_local Buffer buffers[static_cast<int>(Scratch::kCount)];
  Buffer& b = buffers[static_cast<int>(use)];
  if (b.floats < floats) {
    b.floats = 0;
    b.data.reset();
    const int64_t bytes = round_up(floats * 4 + 4096, 4096);
    b.data.reset(static_cast<float*>(std::aligned_alloc(4096, static_cast<size_t>(bytes))));
    if (!b.data) return nullptr;
    b.floats = floats, b.room = bytes / 4;
  }
  limit(b.data.get(), floats, b.room);
  return b.data.get();
}

}  // namespace secateur
