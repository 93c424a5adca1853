// Memory that a thread keeps from call to call.
#pragma once
#include <cstdint>

namespace secateur {

enum class Scratch : int {
  kShared,  // what the calling thread prepares for all threads: packed activations, values of a chain
  kOwn,     // what one thread works on: outputs of a tile, scores of attention
  kSteps,   // values between the steps of a chain, each of which uses the other two buffers
  kCount
};

// A buffer of the calling thread that grows, and that its next call for the same use returns again; null when memory is
// out.
float* scratch(Scratch use, int64_t floats);

}  // namespace secateur
