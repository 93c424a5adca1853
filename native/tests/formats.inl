// Checks of the nm and quad formats; part of test_kernels.cpp.

// N:M in every value type against the weight that sct_unpack returns, which in float32 is the weight itself.
void check_nm(int isa, int rows, int cols, int tokens, double density, int keep, int of, int threads) {
  auto w = random_floats(static_cast<size_t>(rows) * cols, 1, density);
  for (int o = 0; o < rows; o++)
    for (int k = 0, kept = 0; k < cols; k++) {
      if (k % of == 0) kept = 0;
      if (w[o * cols + k] != 0.0f && ++kept > keep) w[o * cols + k] = 0;
    }
  const auto x = random_floats(static_cast<size_t>(tokens) * cols, 2);
  const auto bias = random_floats(rows, 3);
  for (int value = SCT_F32; value <= SCT_I8; value++) {
    Blob blob;
    CHECK(sct_pack_nm(w.data(), rows, cols, cols, value, keep, of, allocate, &blob) == SCT_OK);
    CHECK(sct_validate(bytes_of(blob), size_of(blob)) == SCT_OK);
    std::vector<float> back(w.size()), y(static_cast<size_t>(tokens) * rows);
    CHECK(sct_unpack(bytes_of(blob), size_of(blob), back.data()) == SCT_OK);
    CHECK(value != SCT_F32 || back == w);
    CHECK(sct_linear(bytes_of(blob), size_of(blob), x.data(), tokens, cols, bias.data(), SCT_NONE, y.data(), rows,
                     threads, isa) == SCT_OK);
    for (int t = 0; t < tokens; t++)
      for (int o = 0; o < rows; o++) {
        double sum = bias[o], size = std::fabs(bias[o]);
        for (int k = 0; k < cols; k++) {
          const double term = static_cast<double>(x[t * cols + k]) * back[o * cols + k];
          sum += term;
          size += std::fabs(term);
        }
        CHECK(std::fabs(y[static_cast<size_t>(t) * rows + o] - sum) < 1e-6 * (size + 1));
      }
  }
}

// The quad format against its integer sums, which every instruction set computes exactly.
void check_quads(int isa, int rows, int cols, int tokens, double density, int tile, int chunk, int threads) {
  auto w = random_floats(static_cast<size_t>(rows) * cols, 1);
  const auto keep = random_floats(static_cast<size_t>(rows) * cols, 4, density);
  for (int o = 0; o < rows; o++)
    for (int k = 0; k < cols; k++)
      if (keep[o * cols + k / 4 * 4] == 0.0f) w[o * cols + k] = 0;
  const auto x = random_floats(static_cast<size_t>(tokens) * cols, 2);
  Blob blob;
  CHECK(sct_pack_quad(w.data(), rows, cols, cols, tile, chunk, 16, allocate, &blob) == SCT_OK);
  CHECK(sct_validate(bytes_of(blob), size_of(blob)) == SCT_OK);
  std::vector<float> back(w.size()), y(static_cast<size_t>(tokens) * rows);
  CHECK(sct_unpack(bytes_of(blob), size_of(blob), back.data()) == SCT_OK);
  CHECK(sct_linear(bytes_of(blob), size_of(blob), x.data(), tokens, cols, nullptr, SCT_NONE, y.data(), rows, threads,
                   isa) == SCT_OK);
  for (int t = 0; t < tokens; t++) {
    float low = 0, high = 0;
    for (int k = 0; k < cols; k++) low = std::fmin(low, x[t * cols + k]), high = std::fmax(high, x[t * cols + k]);
    const float step = high / 255.0f - low / 255.0f, inverse = 1.0f / step;
    const int zero = static_cast<int>(std::nearbyint(-low * inverse));
    for (int o = 0; o < rows; o++) {
      float most = 0;
      for (int k = 0; k < cols; k++) most = std::fmax(most, std::fabs(w[o * cols + k]));
      const float scale = most / 127;
      int sum = 0;
      for (int k = 0; k < cols; k++) {
        const int q = scale > 0 ? static_cast<int>(std::nearbyint(w[o * cols + k] / scale)) : 0;
        CHECK(back[o * cols + k] == static_cast<float>(q) * scale);
        const int level = static_cast<int>(std::nearbyint(x[t * cols + k] * inverse)) + zero;
        sum += (std::max(0, std::min(255, level)) - zero) * q;
      }
      CHECK(y[static_cast<size_t>(t) * rows + o] == static_cast<float>(sum) * (scale * step));
    }
  }
}
