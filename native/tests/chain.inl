// Checks of chains of layers; part of test_kernels.cpp.

// The weights, vectors and steps of small encoder layers.
struct ChainParts {
  static constexpr int kWidth = 24, kHeads = 4, kFeatures = 40;
  std::vector<Blob> blobs;
  std::vector<std::vector<float>> vectors;
  std::vector<sct_step> steps;

  void linear(int rows, int cols, int64_t from, int activation, int tile, int row_block) {
    const auto w = random_floats(static_cast<size_t>(rows) * cols, static_cast<unsigned>(steps.size()), 0.3);
    blobs.emplace_back();
    CHECK(sct_pack_tiled(w.data(), rows, cols, cols, SCT_F32, tile, 16, row_block, allocate, &blobs.back()) == SCT_OK);
    vectors.push_back(random_floats(rows, 99));
    sct_step s{};
    s.kind = SCT_LINEAR_STEP, s.activation = activation;
    s.from[0] = from, s.from[1] = s.from[2] = -1;
    s.blob = bytes_of(blobs.back()), s.bytes = size_of(blobs.back()), s.bias = vectors.back().data();
    steps.push_back(s);
  }
  void norm(int64_t a, int64_t b, int kind) {
    vectors.push_back(random_floats(kWidth, 7));
    sct_step s{};
    s.kind = SCT_NORM_STEP, s.norm = kind, s.epsilon = 1e-5f;
    s.from[0] = a, s.from[1] = b, s.from[2] = -1;
    if (kind) s.scale = s.shift = vectors.back().data();
    steps.push_back(s);
  }
  // q, k and v are values; keys and values start at rows at_k and at_v.
  void attention(int64_t q, int64_t k, int64_t v, int64_t at_k, int64_t at_v, int kv_heads) {
    sct_step s{};
    s.kind = SCT_ATTENTION_STEP, s.heads = kHeads, s.kv_heads = kv_heads, s.width = kWidth / kHeads, s.factor = 0.4f;
    s.from[0] = q, s.from[1] = k, s.from[2] = v, s.first[1] = at_k, s.first[2] = at_v;
    steps.push_back(s);
  }
};

// Two encoder layers: with norms after the sums and a linear layer each for q, k and v; or with norms before the
// layers, one linear layer for q, k and v, and keys and values that two heads share.
ChainParts encoder(bool norms_first, int tile) {
  constexpr int W = ChainParts::kWidth, F = ChainParts::kFeatures;
  ChainParts c;
  c.blobs.reserve(16), c.vectors.reserve(32);  // steps point into them
  for (int64_t x = 0, layer = 0; layer < 2; layer++) {
    auto value = [&] { return static_cast<int64_t>(c.steps.size()); };
    int64_t in = x;
    if (norms_first) {
      c.norm(x, -1, SCT_RMS_NORM), in = value();
      c.linear(2 * W, W, in, SCT_NONE, tile, 20);
      c.attention(value(), value(), value(), W, W + W / 2, 2);
    } else {
      for (int i = 0; i < 3; i++) c.linear(W, W, in, SCT_NONE, tile, 16);
      c.attention(value() - 2, value() - 1, value(), 0, 0, 4);
    }
    c.linear(W, W, value(), SCT_NONE, tile, 24);
    c.norm(value(), x, norms_first ? SCT_NO_NORM : SCT_LAYER_NORM);
    const int64_t sum = value();
    if (norms_first) c.norm(sum, -1, SCT_LAYER_NORM);
    c.linear(F, W, value(), SCT_GELU, tile, 12);
    c.linear(W, F, value(), SCT_NONE, tile, 24);
    c.norm(value(), sum, norms_first ? SCT_NO_NORM : SCT_LAYER_NORM);
    x = value();
  }
  return c;
}

// The output of the chain, computed step by step.
std::vector<float> step_by_step(const sct_chain_job& job, const std::vector<int64_t>& rows, int isa) {
  const int64_t tokens = job.batch * job.tokens;
  std::vector<std::vector<float>> values{{job.x, job.x + tokens * job.width}};
  for (int64_t i = 0; i < job.count; i++) {
    const sct_step& s = job.steps[i];
    const auto& x = values[s.from[0]];
    std::vector<float> y(tokens * rows[i + 1]);
    if (s.kind == SCT_LINEAR_STEP) {
      CHECK(sct_linear(s.blob, s.bytes, x.data(), tokens, rows[s.from[0]], s.bias, s.activation, y.data(), rows[i + 1],
                       1, isa) == SCT_OK);
    } else if (s.kind == SCT_NORM_STEP) {
      for (int64_t t = 0; t < tokens; t++) {
        const int64_t n = rows[i + 1];
        double mean = 0, square = 0;
        for (int64_t j = 0; j < n; j++) {
          y[t * n + j] = x[t * n + j] + (s.from[1] < 0 ? 0 : values[s.from[1]][t * n + j]);
          mean += y[t * n + j] / static_cast<double>(n);
        }
        if (s.norm != SCT_LAYER_NORM) mean = 0;
        for (int64_t j = 0; j < n; j++)
          square += (y[t * n + j] - mean) * (y[t * n + j] - mean) / static_cast<double>(n);
        for (int64_t j = 0; j < n && s.norm; j++)
          y[t * n + j] =
              static_cast<float>((y[t * n + j] - mean) / std::sqrt(square + s.epsilon) * s.scale[j] + s.shift[j]);
      }
    } else {
      sct_attention_job a{};
      a.batch = job.batch, a.queries = a.keys = job.tokens, a.width = s.width;
      a.heads = s.heads, a.kv_heads = s.kv_heads, a.scale = s.factor, a.out = y.data();
      a.q = x.data() + s.first[0], a.k = values[s.from[1]].data() + s.first[1],
      a.v = values[s.from[2]].data() + s.first[2];
      const int64_t value_rows[] = {rows[s.from[0]], rows[s.from[1]], rows[s.from[2]], rows[i + 1]};
      int64_t* strides[] = {a.q_stride, a.k_stride, a.v_stride, a.out_stride};
      for (int j = 0; j < 4; j++)
        strides[j][0] = job.tokens * value_rows[j], strides[j][1] = s.width, strides[j][2] = value_rows[j];
      a.keep = job.keep, a.mask = job.mask;
      std::copy(job.keep_stride, job.keep_stride + 3, a.keep_stride);
      std::copy(job.mask_stride, job.mask_stride + 3, a.mask_stride);
      CHECK(sct_attention(&a, 1, isa, nullptr, nullptr) == SCT_OK);
    }
    values.push_back(y);
  }
  return values.back();
}

void check_chain(int isa, int batch, int tokens, int tile, bool norms_first, bool masked, bool not_finite,
                 int threads) {
  const ChainParts c = encoder(norms_first, tile);
  auto x = random_floats(static_cast<size_t>(batch) * tokens * ChainParts::kWidth, 5);
  if (not_finite) x[ChainParts::kWidth * (tokens - 1) + 3] = std::numeric_limits<float>::infinity();
  std::vector<uint8_t> keep(static_cast<size_t>(batch) * tokens, 1);
  for (size_t i = 0; i < keep.size(); i++) keep[i] = i % 5 != 2;
  const auto mask = random_floats(static_cast<size_t>(tokens) * tokens, 6);
  sct_chain_job job{};
  job.x = x.data(), job.batch = batch, job.tokens = tokens, job.width = ChainParts::kWidth;
  job.steps = c.steps.data(), job.count = static_cast<int64_t>(c.steps.size());
  if (masked) {
    job.keep = keep.data(), job.keep_stride[0] = tokens;
    job.mask = mask.data(), job.mask_stride[2] = tokens;
  }
  std::vector<int64_t> rows{job.width};
  for (int64_t i = 1; i <= job.count; i++) rows.push_back(sct_chain_rows(job.steps, i, job.width));
  CHECK(rows.back() == ChainParts::kWidth);
  std::vector<float> y(x.size());
  job.y = y.data();
  CHECK(sct_chain(&job, threads, isa, nullptr, nullptr) == SCT_OK);
  const auto expected = step_by_step(job, rows, isa);
  for (size_t i = 0; i < y.size(); i++)
    CHECK(std::isnan(expected[i]) ? std::isnan(y[i])
                                  : std::abs(y[i] - expected[i]) < 2e-4 * (1 + std::abs(expected[i])));
}

void check_chain_errors() {
  ChainParts c = encoder(false, 16);
  const auto count = static_cast<int64_t>(c.steps.size());
  CHECK(sct_chain_rows(c.steps.data(), count, ChainParts::kWidth) == ChainParts::kWidth);
  CHECK(sct_chain_rows(c.steps.data(), count, ChainParts::kWidth + 1) < 0);
  CHECK(sct_chain_rows(nullptr, count, ChainParts::kWidth) < 0);
  auto broken = [&](auto change) {
    auto steps = c.steps;
    change(steps);
    return sct_chain_rows(steps.data(), count, ChainParts::kWidth) < 0;
  };
  CHECK(broken([](auto& s) { s[0].from[0] = 1; }));   // its own output
  CHECK(broken([](auto& s) { s[0].from[1] = 0; }));   // a linear step reads one value
  CHECK(broken([](auto& s) { s[3].from[2] = -1; }));  // attention reads three
  CHECK(broken([](auto& s) { s[3].heads = 5; }));
  CHECK(broken([](auto& s) { s[3].first[1] = 1; }));  // keys end outside
  CHECK(broken([](auto& s) { s[5].norm = 9; }));
  CHECK(broken([](auto& s) { s[6].activation = -1; }));
  CHECK(broken([](auto& s) { s[6].bytes--; }));
  CHECK(broken([](auto& s) { s[4].kind = 3; }));
  const ChainParts other = encoder(false, 32);
  CHECK(broken([&](auto& s) { s[4] = other.steps[4]; }));  // another tile
}
