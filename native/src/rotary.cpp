// Rotary position embedding (sct_rotary): rotates each head by the angles of its token.
#include "secateur/kernels.h"

extern "C" int sct_rotary(const float* x, const int64_t x_stride[3], int64_t batch, int64_t heads, int64_t tokens,
                          int64_t width, const float* cos, const float* sin, int64_t turn_stride, float* y,
                          const int64_t y_stride[3]) {
  if (batch < 0 || heads < 0 || tokens < 0 || width < 2 || width % 2 || !x_stride || !y_stride || turn_stride < 0)
    return SCT_BAD_ARGUMENT;
  if (!batch || !heads || !tokens) return SCT_OK;
  if (!x || !cos || !sin || !y) return SCT_BAD_ARGUMENT;
  const int64_t half = width / 2;
  for (int64_t b = 0; b < batch; b++)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t t = 0; t < tokens; t++) {
        const float* from = x + b * x_stride[0] + h * x_stride[1] + t * x_stride[2];
        float* to = y + b * y_stride[0] + h * y_stride[1] + t * y_stride[2];
        const float *c = cos + b * turn_stride + t * width, *s = sin + b * turn_stride + t * width;
        for (int64_t i = 0; i < half; i++) {
          const float low = from[i], high = from[half + i];
          to[i] = low * c[i] - high * s[i];
          to[half + i] = high * c[half + i] + low * s[half + i];
        }
      }
  return SCT_OK;
}
