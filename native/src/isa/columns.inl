// Activations for the kernels that take few tokens. Included once per instruction set, after tiles.inl.

namespace {

bool pack_columns(const float* x, int64_t ldx, int64_t cols, int tokens, int width, float* out) {
  bool odd = false;
  for (int t = 0; t < tokens; t++) odd |= not_finite(x + t * ldx, cols);
  int64_t k = 0;
  if (width == Simd::TB && tokens == width)
    for (; k + Simd::TB <= cols; k += Simd::TB) Simd::transpose(x + k, ldx, out + k * width, width);
  for (; k < cols; k++)
    for (int t = 0; t < width; t++) out[k * width + t] = t < tokens ? x[t * ldx + k] : 0.0f;
  return odd;
}

}  // namespace
