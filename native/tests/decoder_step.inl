// Checks of the decoder step (sct_token); part of test_kernels.cpp.

// The weights and steps of a small decoder block: a norm; q, k and v, of which q and k are rotated; attention; a linear
// layer that adds the residual; a gated feed-forward part that adds it, too.
struct DecoderStepParts {
  static constexpr int kWidth = 32, kHeads = 4, kKeyHeads = 2, kHead = 8, kFeatures = 40;
  std::vector<Blob> blobs;
  std::vector<float> vector = random_floats(kFeatures, 5);
  std::vector<sct_step> steps;

  int64_t add(int kind, int64_t a, int64_t b = -1, int64_t c = -1) {
    sct_step s{};
    s.kind = kind, s.from[0] = a, s.from[1] = b, s.from[2] = c;
    if (kind == SCT_NORM_STEP) s.norm = SCT_RMS_NORM, s.scale = vector.data(), s.epsilon = 1e-5f;
    if (kind == SCT_ROTARY_STEP || kind == SCT_ATTENTION_STEP) s.width = kHead, s.kv_heads = kKeyHeads, s.factor = 0.3f;
    steps.push_back(s);
    return static_cast<int64_t>(steps.size());
  }
  int64_t linear(int rows, int cols, int activation, int64_t x, int64_t gate = -1, int64_t residual = -1) {
    const auto w = random_floats(static_cast<size_t>(rows) * cols, static_cast<unsigned>(steps.size()), 0.3);
    blobs.emplace_back();
    CHECK(sct_pack_bitmask(w.data(), rows, cols, cols, SCT_F32, allocate, &blobs.back()) == SCT_OK);
    const int64_t value = add(SCT_LINEAR_STEP, x, gate, residual);
    sct_step& s = steps.back();
    s.activation = activation, s.bias = vector.data(), s.blob = bytes_of(blobs.back()), s.bytes = size_of(blobs.back());
    return value;
  }

  DecoderStepParts() {
    blobs.reserve(16);
    const int64_t in = add(SCT_NORM_STEP, 0);
    const int64_t q = linear(kWidth, kWidth, SCT_NONE, in), k = linear(kKeyHeads * kHead, kWidth, SCT_NONE, in);
    const int64_t v = linear(kKeyHeads * kHead, kWidth, SCT_NONE, in);
    const int64_t heads_q = add(SCT_NORM_STEP, q);
    steps.back().heads = kHeads, steps.back().width = kHead;
    const int64_t rotated_q = add(SCT_ROTARY_STEP, heads_q);
    steps.back().heads = kHeads;
    const int64_t rotated_k = add(SCT_ROTARY_STEP, k);
    steps.back().heads = kKeyHeads;
    const int64_t attended = add(SCT_ATTENTION_STEP, rotated_q, rotated_k, v);
    steps.back().heads = kHeads;
    const int64_t sum = linear(kWidth, kWidth, SCT_NONE, attended, -1, 0);
    const int64_t norm = add(SCT_NORM_STEP, sum);
    const int64_t gate = linear(kFeatures, kWidth, SCT_SILU, norm),
                  up = linear(kFeatures, kWidth, SCT_NONE, norm, gate);
    const int64_t product = add(SCT_GATE_STEP, up, gate);
    const int64_t down = linear(kWidth, kFeatures, SCT_NONE, product);
    add(SCT_NORM_STEP, down, sum);
  }
};

// sct_token against the functions for single steps.
void check_decoder_step(int isa, int batch, int keys, int threads) {
  const DecoderStepParts parts;
  const auto count = static_cast<int64_t>(parts.steps.size());
  constexpr int W = DecoderStepParts::kWidth, H = DecoderStepParts::kHead;
  const int64_t floats = sct_token_floats(parts.steps.data(), count, W);
  CHECK(floats == 7 * W + 3 * DecoderStepParts::kKeyHeads * H + 3 * DecoderStepParts::kFeatures + 2 * W);
  if (floats < 0) return;
  const auto x = random_floats(static_cast<size_t>(batch) * W, 1);
  const auto cos = random_floats(H, 2), sin = random_floats(H, 3);
  const auto k = random_floats(static_cast<size_t>(batch) * DecoderStepParts::kKeyHeads * keys * H, 8), v = k;
  std::vector<float> got(static_cast<size_t>(floats) * batch), expected(got.size());
  sct_token_job job{};
  job.steps = parts.steps.data(), job.count = count, job.width = W, job.batch = batch;
  job.x = x.data(), job.values = got.data(), job.cos = cos.data(), job.sin = sin.data();
  job.k = k.data(), job.v = v.data(), job.keys = keys;
  for (auto* stride : {job.k_stride, job.v_stride})
    stride[0] = int64_t{DecoderStepParts::kKeyHeads} * keys * H, stride[1] = int64_t{keys} * H, stride[2] = H;
  CHECK(sct_token(&job, 0, 7, threads, isa, nullptr, nullptr) == SCT_OK);
  CHECK(sct_token(&job, 7, count, threads, isa, nullptr, nullptr) == SCT_OK);
  std::vector<int64_t> rows{W}, first{0};
  int64_t at = 0;
  for (int64_t i = 0; i < count; i++) {
    const sct_step& s = parts.steps[i];
    sct_info info{};
    if (s.kind == SCT_LINEAR_STEP) CHECK(sct_describe(s.blob, s.bytes, &info) == SCT_OK);
    const int64_t rows_written = s.kind == SCT_LINEAR_STEP ? info.rows : rows[s.from[0]];
    auto value = [&](int64_t n) { return n < 0 ? nullptr : n == 0 ? x.data() : expected.data() + first[n]; };
    float* y = expected.data() + at;
    const float *a = value(s.from[0]), *b = value(s.from[1]), *c = value(s.from[2]);
    if (s.kind == SCT_LINEAR_STEP) {
      CHECK(sct_linear(s.blob, s.bytes, a, batch, rows[s.from[0]], s.bias, s.activation, y, rows_written, 1, isa) ==
            SCT_OK);
      for (int64_t n = 0; n < batch * rows_written; n++) y[n] = y[n] * (b ? b[n] : 1.0f) + (c ? c[n] : 0.0f);
    } else if (s.kind == SCT_NORM_STEP) {
      const int64_t width = s.heads ? s.width : rows_written;
      for (int64_t n = 0; n < batch * rows_written; n++) y[n] = a[n] + (b ? b[n] : 0.0f);
      CHECK(sct_norm_on(y, batch * rows_written / width, width, width, s.norm, s.scale, s.shift, s.epsilon, y, width, 1,
                        isa, nullptr, nullptr) == SCT_OK);
    } else if (s.kind == SCT_ROTARY_STEP) {
      const int64_t stride[] = {rows_written, H, rows_written};
      CHECK(sct_rotary(a, stride, batch, s.heads, 1, H, cos.data(), sin.data(), 0, y, stride) == SCT_OK);
    } else if (s.kind == SCT_GATE_STEP) {
      for (int64_t n = 0; n < batch * rows_written; n++) y[n] = a[n] * b[n];
    } else {
      sct_attention_job attention{};
      attention.q = a, attention.k = k.data(), attention.v = v.data(), attention.out = y, attention.batch = batch,
      attention.heads = s.heads;
      attention.kv_heads = s.kv_heads, attention.queries = 1, attention.keys = keys, attention.width = H,
      attention.scale = s.factor;
      std::copy(job.k_stride, job.k_stride + 3, attention.k_stride),
          std::copy(job.v_stride, job.v_stride + 3, attention.v_stride);
      for (auto* stride : {attention.q_stride, attention.out_stride}) stride[0] = stride[2] = W, stride[1] = H;
      CHECK(sct_attention(&attention, 1, isa, nullptr, nullptr) == SCT_OK);
    }
    rows.push_back(rows_written), first.push_back(at);
    at += batch * rows_written;
  }
  for (size_t n = 0; n < got.size(); n++) CHECK(std::abs(got[n] - expected[n]) < 1e-4f * (1 + std::abs(expected[n])));
}

void check_decoder_step_errors() {
  DecoderStepParts parts;
  const auto count = static_cast<int64_t>(parts.steps.size());
  auto floats = [&] { return sct_token_floats(parts.steps.data(), count, DecoderStepParts::kWidth); };
  const int64_t right = floats();
  CHECK(right > 0);
  CHECK(sct_token_floats(parts.steps.data(), count, DecoderStepParts::kWidth + 1) == -1);
  auto refused = [&](sct_step& s, auto change) {
    const sct_step before = s;
    change(s);
    CHECK(floats() == -1);
    s = before;
  };
  for (sct_step& step : parts.steps) {
    refused(step, [&](sct_step& s) { s.from[0] = count; });
    refused(step, [&](sct_step& s) { s.from[0] = -1; });
    refused(step, [&](sct_step& s) { s.from[1] = count; });
    refused(step, [&](sct_step& s) { s.kind = 9; });
    if (step.heads) refused(step, [&](sct_step& s) { s.heads++; });
    if (step.kind == SCT_ATTENTION_STEP) refused(step, [&](sct_step& s) { s.kv_heads = 1; });
    if (step.kind == SCT_LINEAR_STEP) refused(step, [&](sct_step& s) { s.bytes--; });
  }
  CHECK(floats() == right);
  sct_token_job job{};
  job.steps = parts.steps.data(), job.count = count, job.width = DecoderStepParts::kWidth, job.batch = 1;
  CHECK(sct_token(&job, 0, count, 1, SCT_ISA_AUTO, nullptr, nullptr) == SCT_BAD_ARGUMENT);
  CHECK(sct_token(&job, 0, count + 1, 1, SCT_ISA_AUTO, nullptr, nullptr) == SCT_BAD_ARGUMENT);
  job.batch = 0;
  CHECK(sct_token(&job, 0, count, 1, SCT_ISA_AUTO, nullptr, nullptr) == SCT_OK);
}
