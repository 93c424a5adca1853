// Unit tests of the C interface, without a test framework: each instruction set of this machine against a
// double-precision product, damaged blobs, NaN, threads. They are also built with sanitizers and for other
// architectures.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "../src/blob.h"
#include "secateur/kernels.h"

namespace {

int failures = 0;

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      failures++;                                                         \
    }                                                                     \
  } while (0)

using Blob = std::vector<uint64_t>;  // aligned to 8 bytes

void* allocate(void* context, int64_t bytes) {
  auto* blob = static_cast<Blob*>(context);
  blob->resize(static_cast<size_t>(bytes + 7) / 8);
  return blob->data();
}

const uint8_t* bytes_of(const Blob& b) { return reinterpret_cast<const uint8_t*>(b.data()); }
int64_t size_of(const Blob& b) { return static_cast<int64_t>(b.size() * 8); }

std::vector<float> random_floats(size_t n, unsigned seed, double density = 1.0) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<double> uniform;
  std::vector<float> v(n);
  for (float& f : v) f = uniform(random) < density ? normal(random) : 0.0f;
  return v;
}

void check_product(int isa, int rows, int cols, int tokens, double density, int tile, int chunk, int row_block,
                   int threads) {
  const auto w = random_floats(static_cast<size_t>(rows) * cols, 1, density);
  const auto x = random_floats(static_cast<size_t>(tokens) * cols, 2);
  const auto bias = random_floats(rows, 3);
  Blob blob;
  CHECK(sct_pack_tiled(w.data(), rows, cols, cols, SCT_F32, tile, chunk, row_block, allocate, &blob) == SCT_OK);
  CHECK(sct_validate(bytes_of(blob), size_of(blob)) == SCT_OK);
  std::vector<float> back(w.size());
  CHECK(sct_unpack(bytes_of(blob), size_of(blob), back.data()) == SCT_OK);
  CHECK(back == w);
  std::vector<float> y(static_cast<size_t>(tokens) * rows);
  CHECK(sct_linear(bytes_of(blob), size_of(blob), x.data(), tokens, cols, bias.data(), SCT_NONE, y.data(), rows,
                   threads, isa) == SCT_OK);
  double worst = 0;
  for (int t = 0; t < tokens; t++)
    for (int o = 0; o < rows; o++) {
      double sum = bias[o], size = std::fabs(bias[o]);
      for (int k = 0; k < cols; k++) {
        const double term = static_cast<double>(x[t * cols + k]) * w[o * cols + k];
        sum += term;
        size += std::fabs(term);
      }
      worst = std::fmax(worst, std::fabs(y[static_cast<size_t>(t) * rows + o] - sum) / (size + 1));
    }
  CHECK(worst < 1e-6);
}

// NaN is noticed in every band and strip of rows that lie 4 KiB apart.
void check_not_finite_strip(int isa) {
  const int rows = 16, cols = 1024, tokens = 40;
  const auto w = random_floats(static_cast<size_t>(rows) * cols, 1, 0.5);
  const auto x = random_floats(static_cast<size_t>(tokens) * cols, 2);
  Blob blob;
  CHECK(sct_pack_tiled(w.data(), rows, cols, cols, SCT_F32, 32, 128, 16, allocate, &blob) == SCT_OK);
  for (int at : {0, 15 * cols + 700, 31 * cols + 255, 39 * cols + 1023}) {
    auto not_finite = x;
    not_finite[at] = NAN;
    std::vector<float> y(static_cast<size_t>(tokens) * rows);
    CHECK(sct_linear(bytes_of(blob), size_of(blob), not_finite.data(), tokens, cols, nullptr, SCT_NONE, y.data(), rows,
                     1, isa) == SCT_OK);
    for (int t = 0; t < tokens; t++)
      for (int o = 0; o < rows; o++) CHECK(std::isnan(y[t * rows + o]) == (t == at / cols));
  }
}

// In every chunk but the last, rows have whole groups, as they leave nonzeros to the next chunk.
void check_carried() {
  const int rows = 60, cols = 600;
  const auto w = random_floats(static_cast<size_t>(rows) * cols, 1, 0.5);
  Blob blob;
  CHECK(sct_pack_tiled(w.data(), rows, cols, cols, SCT_F32, 32, 192, 40, allocate, &blob) == SCT_OK);
  const auto& h = *reinterpret_cast<const secateur::Header*>(bytes_of(blob));
  CHECK(h.carried == 48);
  const auto* block = secateur::section<secateur::TiledBlock>(bytes_of(blob), 0);
  const auto* run = secateur::section<secateur::TiledRun>(bytes_of(blob), 1);
  for (int b = 0; b < 2 * 4; b++)
    for (uint32_t c = 0; c < block[b].class_count; c++)
      if (b % 4 != 3) CHECK(run[block[b].class_begin + c].count % 4 == 0);
}

// Every value type of the block (4 and 8) and bitmask formats against the weight that sct_unpack returns.
void check_rows(int isa, int rows, int cols, int tokens, double density, int threads) {
  const auto w = random_floats(static_cast<size_t>(rows) * cols, 1, density);
  const auto x = random_floats(static_cast<size_t>(tokens) * cols, 2);
  const auto bias = random_floats(rows, 3);
  for (int block : {0, 4, 8})
    for (int value = SCT_F32; value <= SCT_I8; value++) {
      if (!block && value == SCT_F16) continue;
      Blob blob;
      CHECK((block ? sct_pack_block(w.data(), rows, cols, cols, value, block, 30, 16, allocate, &blob)
                   : sct_pack_bitmask(w.data(), rows, cols, cols, value, allocate, &blob)) == SCT_OK);
      CHECK(sct_validate(bytes_of(blob), size_of(blob)) == SCT_OK);
      std::vector<float> back(w.size()), y(static_cast<size_t>(tokens) * rows);
      CHECK(sct_unpack(bytes_of(blob), size_of(blob), back.data()) == SCT_OK);
      CHECK(value != SCT_F32 || back == w);
      CHECK(sct_linear(bytes_of(blob), size_of(blob), x.data(), tokens, cols, bias.data(), SCT_NONE, y.data(), rows,
                       threads, isa) == SCT_OK);
      double worst = 0;
      for (int t = 0; t < tokens; t++)
        for (int o = 0; o < rows; o++) {
          double sum = bias[o], size = std::fabs(bias[o]);
          for (int k = 0; k < cols; k++) {
            const double term = static_cast<double>(x[t * cols + k]) * back[o * cols + k];
            sum += term;
            size += std::fabs(term);
          }
          worst = std::fmax(worst, std::fabs(y[static_cast<size_t>(t) * rows + o] - sum) / (size + 1));
        }
      CHECK(worst < 1e-6);
    }
}

#include "formats.inl"

void check_not_finite(int isa) {
  const std::vector<float> w = {1, 0, 2, 3};  // (2, 2)
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> x = {1, inf, inf, 1};
  Blob blob;
  CHECK(sct_pack_tiled(w.data(), 2, 2, 2, SCT_F32, 16, 2, 2, allocate, &blob) == SCT_OK);
  float y[4];
  CHECK(sct_linear(bytes_of(blob), size_of(blob), x.data(), 2, 2, nullptr, SCT_NONE, y, 2, 1, isa) == SCT_OK);
  CHECK(std::isnan(y[0]));  // 1 * 1 + 0 * inf
  CHECK(y[1] == inf && y[2] == inf && y[3] == inf);
}

// The kernels must compute with the weight that sct_unpack returns. Quads round activations and are left out, as are
// sums that float32 does not hold.
void check_agreement(int isa, const Blob& blob, const sct_info& info, const std::vector<float>& x, int tokens) {
  const auto cols = static_cast<size_t>(info.cols);
  std::vector<float> back(static_cast<size_t>(info.rows) * cols), y(static_cast<size_t>(tokens * info.rows));
  CHECK(sct_unpack(bytes_of(blob), size_of(blob), back.data()) == SCT_OK);
  CHECK(sct_linear(bytes_of(blob), size_of(blob), x.data(), tokens, info.cols, nullptr, SCT_NONE, y.data(), info.rows,
                   2, isa) == SCT_OK);
  if (info.format == SCT_QUAD) return;
  for (int t = 0; t < tokens; t++)
    for (size_t o = 0; o < static_cast<size_t>(info.rows); o++) {
      double sum = 0, size = 0;
      for (size_t k = 0; k < cols; k++) {
        const double term = static_cast<double>(x[t * cols + k]) * back[o * cols + k];
        sum += term, size += std::fabs(term);
      }
      if (size < 1e30) CHECK(std::fabs(y[t * static_cast<size_t>(info.rows) + o] - sum) <= 1e-5 * size + 1e-30);
    }
}

// A blob that passes validation must be safe to run; the sanitizers check that it is.
void check_damage(int isa, const Blob& good) {
  const auto x = random_floats(20 * 40, 6);
  std::mt19937 random(7);
  std::vector<float> y(20 * 30);
  int refused = 0;
  for (int i = 0; i < 1500; i++) {
    Blob damaged = good;
    reinterpret_cast<uint8_t*>(damaged.data())[8 + random() % (size_of(damaged) - 8)] ^= 1 + random() % 255;
    if (sct_validate(bytes_of(damaged), size_of(damaged)) != SCT_OK) {
      refused++;
      continue;
    }
    sct_info info;
    CHECK(sct_describe(bytes_of(damaged), size_of(damaged), &info) == SCT_OK);
    if (info.rows != 30 || info.cols != 40) continue;
    for (int tokens : {1, 20}) check_agreement(isa, damaged, info, x, tokens);
    for (int tokens : {1, 7, 20})
      sct_linear(bytes_of(damaged), size_of(damaged), x.data(), tokens, 40, nullptr, SCT_GELU, y.data(), 30, 2, isa);
  }
  CHECK(refused > 20);  // a blob of format nm is wrong only where its header is
}

void check_damage(int isa) {
  const auto w = random_floats(30 * 40, 5, 0.4);
  // Every second row keeps the columns of the row before it, so that rows form pairs.
  auto twins = random_floats(30 * 40, 5, 0.4);
  for (int i = 0; i < 30 * 40; i++)
    if (i / 40 % 2) twins[i] = twins[i - 40] * 2;
  Blob tiled, pairs, block, mask, quad, nm;
  auto half = w;
  for (size_t i = 0; i < half.size(); i++) half[i] *= i % 4 < 2;
  CHECK(sct_pack_tiled(w.data(), 30, 40, 40, SCT_BF16, 16, 16, 8, allocate, &tiled) == SCT_OK);
  CHECK(sct_pack_block(w.data(), 30, 40, 40, SCT_I8, 8, 16, 8, allocate, &block) == SCT_OK);
  CHECK(sct_pack_bitmask(w.data(), 30, 40, 40, SCT_I8, allocate, &mask) == SCT_OK);
  CHECK(sct_pack_tiled(twins.data(), 30, 40, 40, SCT_F32, 16, 40, 15, allocate, &pairs) == SCT_OK);
  CHECK(sct_pack_quad(w.data(), 30, 40, 40, 16, 16, 8, allocate, &quad) == SCT_OK);
  CHECK(sct_pack_nm(half.data(), 30, 40, 40, SCT_I8, 4, 8, allocate, &nm) == SCT_OK);
  for (const Blob& good : {tiled, pairs, block, mask, quad, nm}) check_damage(isa, good);
}

void check_errors() {
  Blob blob;
  const auto w = random_floats(12, 1);
  CHECK(sct_pack_block(w.data(), 3, 4, 4, SCT_F32, 3, 4, 3, allocate, &blob) == SCT_BAD_ARGUMENT);
  CHECK(sct_pack_block(w.data(), 3, 4, 4, SCT_F32, 4, 70000, 4, allocate, &blob) == SCT_BAD_ARGUMENT);
  CHECK(sct_pack_bitmask(w.data(), 3, 4, 4, SCT_F16, allocate, &blob) == SCT_BAD_ARGUMENT);
  const std::vector<float> large(12, 7e4f), nan(12, std::numeric_limits<float>::quiet_NaN());
  CHECK(sct_pack_block(large.data(), 3, 4, 4, SCT_F16, 4, 4, 4, allocate, &blob) == SCT_BAD_ARGUMENT);
  CHECK(sct_pack_block(nan.data(), 3, 4, 4, SCT_I8, 4, 4, 4, allocate, &blob) == SCT_BAD_ARGUMENT);
  CHECK(sct_pack_nm(w.data(), 3, 4, 4, SCT_F32, 2, 4, allocate, &blob) == SCT_BAD_ARGUMENT);
  CHECK(sct_pack_nm(w.data(), 3, 4, 4, SCT_F32, 3, 4, allocate, &blob) == SCT_BAD_ARGUMENT);
  CHECK(sct_pack_quad(nan.data(), 3, 4, 4, 16, 4, 4, allocate, &blob) == SCT_BAD_ARGUMENT);
  CHECK(sct_pack_quad(w.data(), 3, 4, 4, 16, 6, 4, allocate, &blob) == SCT_BAD_ARGUMENT);
  CHECK(sct_pack_tiled(nullptr, 3, 4, 4, SCT_F32, 16, 4, 3, allocate, &blob) == SCT_BAD_ARGUMENT);
  CHECK(sct_pack_tiled(w.data(), 3, 4, 3, SCT_F32, 16, 4, 3, allocate, &blob) == SCT_BAD_ARGUMENT);
  CHECK(sct_pack_tiled(w.data(), 3, 4, 4, SCT_F32, 8, 4, 3, allocate, &blob) == SCT_BAD_ARGUMENT);
  CHECK(sct_pack_tiled(w.data(), 3, 4, 4, SCT_F32, 128, 1000, 3, allocate, &blob) == SCT_BAD_ARGUMENT);
  CHECK(sct_pack_tiled(
            w.data(), 3, 4, 4, SCT_F32, 16, 4, 3, [](void*, int64_t) -> void* { return nullptr; }, nullptr) ==
        SCT_NO_MEMORY);
  CHECK(sct_pack_tiled(w.data(), 3, 4, 4, SCT_F32, 16, 4, 3, allocate, &blob) == SCT_OK);
  CHECK(sct_validate(bytes_of(blob) + 1, size_of(blob) - 1) == SCT_MISALIGNED);
  CHECK(sct_validate(bytes_of(blob), 64) == SCT_BAD_BLOB);
  Blob other = blob;
  reinterpret_cast<uint8_t*>(other.data())[52] ^= 1;  // Header::p[3]
  CHECK(sct_validate(bytes_of(other), size_of(other)) == SCT_OTHER_LAYOUT);
  float x[4] = {}, y[3];
  CHECK(sct_linear(bytes_of(blob), size_of(blob), x, 1, 3, nullptr, 0, y, 3, 1, 0) == SCT_BAD_ARGUMENT);
  CHECK(sct_linear(bytes_of(blob), size_of(blob), x, 1, 4, nullptr, 9, y, 3, 1, 0) == SCT_BAD_ARGUMENT);
  CHECK(sct_linear(bytes_of(blob), size_of(blob), x, 1, 4, nullptr, 0, y, 3, 1, 99) == SCT_UNSUPPORTED_ISA);
  CHECK(sct_linear(bytes_of(blob), size_of(blob), nullptr, 0, 4, nullptr, 0, nullptr, 3, 1, 0) == SCT_OK);
}

void check_many_callers(int isa) {
  std::vector<std::thread> callers;
  for (int i = 0; i < 8; i++)
    callers.emplace_back([=] {
      for (int j = 0; j < 5; j++) check_product(isa, 120, 200, 64, 0.3, 32, 64, 40, 2);
    });
  for (auto& caller : callers) caller.join();
}

// A correlation matrix of n inputs from 3 n tokens.
std::vector<double> correlation(int n) {
  const auto x = random_floats(static_cast<size_t>(3 * n) * n, 7);
  std::vector<double> c(static_cast<size_t>(n) * n);
  for (int i = 0; i < n; i++)
    for (int j = 0; j < n; j++)
      for (int t = 0; t < 3 * n; t++) c[i * n + j] += (x[t * n + i] + x[t * n]) * (x[t * n + j] + x[t * n]);
  std::vector<double> scale(n);
  for (int i = 0; i < n; i++) scale[i] = std::sqrt(c[i * n + i]);
  for (int i = 0; i < n; i++)
    for (int j = 0; j < n; j++) c[i * n + j] /= scale[i] * scale[j];
  return c;
}

// The loss of each row and r = (v0 - v) C.
std::vector<double> losses(const std::vector<double>& c, const std::vector<double>& v0, const std::vector<double>& v,
                           int rows, int n, std::vector<double>& r) {
  std::vector<double> loss(rows);
  r.assign(v.size(), 0.0);
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < n; j++) {
      for (int k = 0; k < n; k++) r[i * n + j] += (v0[i * n + k] - v[i * n + k]) * c[k * n + j];
      loss[i] += r[i * n + j] * (v0[i * n + j] - v[i * n + j]);
    }
  return loss;
}

void check_swaps(int isa, int rows, int n, bool groups, int threads) {
  const auto c = correlation(n);
  const auto w = random_floats(static_cast<size_t>(rows) * n, 8);
  const std::vector<double> v0(w.begin(), w.end());
  std::vector<double> v = v0, r, open(v.size()), largest(n), fresh;
  std::vector<uint8_t> kept(v.size());
  for (size_t i = 0; i < v.size(); i++) {
    kept[i] = i % 4 < 2;
    open[i] = !kept[i];
    if (!kept[i]) v[i] = 0;
  }
  for (int i = 0; i < n; i++)
    for (int j = 0; j < n; j++)
      if (i != j) largest[i] = std::fmax(largest[i], std::fabs(c[i * n + j]));
  const auto before = losses(c, v0, v, rows, n, r);
  int64_t changed = 0;
  if (groups) {
    const uint8_t patterns[] = {0, 1, 0, 2, 0, 3, 1, 2, 1, 3, 2, 3};
    std::vector<double> inverses(static_cast<size_t>(n) / 4 * 6 * 4);
    for (int g = 0; g < n / 4; g++)
      for (int z = 0; z < 6; z++) {
        const double a = c[(4 * g + patterns[2 * z]) * n + 4 * g + patterns[2 * z + 1]], d = 1 - a * a;
        double* m = &inverses[(g * 6 + z) * 4];
        m[0] = m[3] = 1 / d, m[1] = m[2] = -a / d;
      }
    CHECK(sct_repair_group(c.data(), rows, n, 1 + 1e-9, v.data(), r.data(), kept.data(), 2, 4, patterns, 6,
                           inverses.data(), &changed, 1, threads, isa) == SCT_OK);
  } else {
    CHECK(sct_repair_swap(c.data(), largest.data(), rows, n, 1 + 1e-9, v.data(), r.data(), open.data(), kept.data(),
                          &changed, 1, threads, isa) == SCT_OK);
  }
  CHECK(changed > 0);
  const auto after = losses(c, v0, v, rows, n, fresh);
  for (int i = 0; i < rows; i++) {
    CHECK(after[i] < before[i]);
    int count = 0;
    for (int j = 0; j < n; j++) {
      count += kept[i * n + j];
      CHECK(kept[i * n + j] || v[i * n + j] == 0);
      CHECK(std::fabs(r[i * n + j] - fresh[i * n + j]) < 1e-9);
    }
    CHECK(count == n / 2);
  }
}

void check_sweep(int isa, int rows, int width) {
  const auto u = random_floats(static_cast<size_t>(width) * width, 9);
  std::vector<float> w = random_floats(static_cast<size_t>(rows) * width, 10), inverse(width), errors(w.size());
  std::vector<double> plain(w.begin(), w.end());
  std::vector<uint8_t> mask(w.size());
  for (int j = 0; j < width; j++) inverse[j] = 0.1f;
  for (size_t i = 0; i < mask.size(); i++) mask[i] = i % 3 == 0;
  CHECK(sct_repair_sweep(w.data(), width, rows, width, u.data(), width, inverse.data(), mask.data(), 0, 0,
                         errors.data(), 0, 2, isa) == SCT_OK);
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < width; j++) {
      if (!mask[i * width + j]) {
        const double e = plain[i * width + j] * inverse[j];
        for (int k = j + 1; k < width; k++) plain[i * width + k] -= e * u[j * width + k];
        plain[i * width + j] = 0;
      }
      CHECK(std::fabs(plain[i * width + j] - w[i * width + j]) < 1e-3);
    }
}

void check_after(int isa, int rows, int cols, int tokens, int norm, bool block, bool not_finite) {
  const auto w = random_floats(static_cast<size_t>(rows) * cols, 1, 0.3);
  auto x = random_floats(static_cast<size_t>(tokens) * cols, 2);
  const auto bias = random_floats(rows, 3), scale = random_floats(rows, 4), shift = random_floats(rows, 5);
  const auto residual = random_floats(static_cast<size_t>(tokens) * (rows + 3), 6);
  const auto gate = random_floats(static_cast<size_t>(tokens) * (rows + 1), 7);
  if (not_finite) x[0] = std::numeric_limits<float>::infinity();
  Blob blob;
  CHECK((block ? sct_pack_block(w.data(), rows, cols, cols, SCT_F32, 4, 32, 16, allocate, &blob)
               : sct_pack_tiled(w.data(), rows, cols, cols, SCT_F32, 16, 32, 16, allocate, &blob)) == SCT_OK);
  std::vector<float> plain(static_cast<size_t>(tokens) * rows), y(plain.size());
  CHECK(sct_linear(bytes_of(blob), size_of(blob), x.data(), tokens, cols, bias.data(), SCT_RELU, plain.data(), rows, 2,
                   isa) == SCT_OK);
  const sct_after after{residual.data(), rows + 3, norm, scale.data(), shift.data(), 1e-5f, gate.data(), rows + 1};
  CHECK(sct_linear_on(bytes_of(blob), size_of(blob), x.data(), tokens, cols, bias.data(), SCT_RELU, &after, y.data(),
                      rows, 2, isa, nullptr, nullptr) == SCT_OK);
  for (int t = 0; t < tokens; t++) {
    std::vector<double> v(rows);
    double mean = 0, square = 0;
    for (int o = 0; o < rows; o++)
      mean += v[o] = double{plain[t * rows + o]} * gate[t * (rows + 1) + o] + residual[t * (rows + 3) + o];
    mean = norm == SCT_LAYER_NORM ? mean / rows : 0;
    for (int o = 0; o < rows; o++) square += (v[o] - mean) * (v[o] - mean);
    for (int o = 0; o < rows; o++) {
      double expected = v[o];
      if (norm != SCT_NO_NORM) expected = (v[o] - mean) / std::sqrt(square / rows + 1e-5) * scale[o] + shift[o];
      const float got = y[t * rows + o];
      CHECK(std::isnan(expected) ? std::isnan(got) : std::abs(got - expected) < 1e-4 * (1 + std::abs(expected)));
    }
  }
}

// Norms of rows with gaps between them, in place and into another buffer.
void check_norm(int isa, int width, int tokens, int norm, int threads) {
  const int stride = width + 3;
  auto x = random_floats(static_cast<size_t>(tokens) * stride, 1);
  const auto scale = random_floats(width, 2), shift = random_floats(width, 3);
  std::vector<float> y(static_cast<size_t>(tokens) * width);
  CHECK(sct_norm_on(x.data(), tokens, width, stride, norm, scale.data(), shift.data(), 1e-5f, y.data(), width, threads,
                    isa, nullptr, nullptr) == SCT_OK);
  for (int t = 0; t < tokens; t++) {
    const float* v = x.data() + static_cast<size_t>(t) * stride;
    double mean = 0, square = 0;
    for (int i = 0; i < width; i++) mean += norm == SCT_LAYER_NORM ? double{v[i]} / width : 0;
    for (int i = 0; i < width; i++) square += (v[i] - mean) * (v[i] - mean);
    for (int i = 0; i < width; i++) {
      const double expected = (v[i] - mean) / std::sqrt(square / width + 1e-5) * scale[i] + shift[i];
      CHECK(std::abs(y[static_cast<size_t>(t) * width + i] - expected) < 1e-4 * (1 + std::abs(expected)));
    }
  }
  CHECK(sct_norm_on(x.data(), tokens, width, stride, norm, scale.data(), shift.data(), 1e-5f, x.data(), stride, threads,
                    isa, nullptr, nullptr) == SCT_OK);
  for (int t = 0; t < tokens; t++)
    for (int i = 0; i < width; i++)
      CHECK(x[static_cast<size_t>(t) * stride + i] == y[static_cast<size_t>(t) * width + i]);
  CHECK(sct_norm_on(x.data(), tokens, width, width - 1, norm, nullptr, nullptr, 0, y.data(), width, 1, isa, nullptr,
                    nullptr) == SCT_BAD_ARGUMENT);
}

// The heads of a token lie side by side, and are rotated into another buffer and in place; batches share angles or not.
void check_rotary(int batch, int heads, int tokens, int width, bool shared_angles) {
  const int64_t stride[] = {int64_t{tokens} * heads * width, width, int64_t{heads} * width};
  const int64_t batch_stride = shared_angles ? 0 : int64_t{tokens} * width;
  auto x = random_floats(static_cast<size_t>(batch) * tokens * heads * width, 1);
  const size_t angles = static_cast<size_t>(shared_angles ? 1 : batch) * tokens * width;
  const auto cos = random_floats(angles, 2), sin = random_floats(angles, 3);
  std::vector<float> y(x.size());
  CHECK(sct_rotary(x.data(), stride, batch, heads, tokens, width, cos.data(), sin.data(), batch_stride, y.data(),
                   stride) == SCT_OK);
  for (int b = 0; b < batch; b++)
    for (int h = 0; h < heads; h++)
      for (int t = 0; t < tokens; t++)
        for (int i = 0; i < width; i++) {
          const size_t first = b * stride[0] + h * stride[1] + t * stride[2],
                       angle = b * batch_stride + int64_t{t} * width + i;
          const float other = i < width / 2 ? -x[first + i + width / 2] : x[first + i - width / 2];
          CHECK(std::abs(y[first + i] - (x[first + i] * cos[angle] + other * sin[angle])) < 1e-5f);
        }
  CHECK(sct_rotary(x.data(), stride, batch, heads, tokens, width, cos.data(), sin.data(), batch_stride, x.data(),
                   stride) == SCT_OK);
  CHECK(x == y);
  CHECK(sct_rotary(x.data(), stride, batch, heads, tokens, 3, cos.data(), sin.data(), batch_stride, x.data(), stride) ==
        SCT_BAD_ARGUMENT);
}

// Heads lie in the middle of a token's numbers; two heads share keys and values; lengths are odd.
void check_attention(int isa, int queries, int keys, int width, bool masked, int threads) {
  const int batch = 2, heads = 4, kv_heads = 2, q_token = heads * width + 1, kv_token = kv_heads * width + 2;
  const auto q = random_floats(static_cast<size_t>(batch) * queries * q_token, 1);
  const auto k = random_floats(static_cast<size_t>(batch) * keys * kv_token, 2);
  const auto v = random_floats(static_cast<size_t>(batch) * keys * kv_token, 3);
  const auto mask = random_floats(static_cast<size_t>(queries) * keys, 4);
  std::vector<uint8_t> keep(static_cast<size_t>(batch) * queries * keys, 1);
  for (size_t i = 0; i < keep.size(); i++) keep[i] = i % 7 != 3;
  for (int i = 0; i < keys; i++) keep[i] = 0;  // the first query of the first batch has no keys
  std::vector<float> out(static_cast<size_t>(batch) * queries * q_token, 9.0f);
  sct_attention_job job{};
  job.q = q.data(), job.k = k.data(), job.v = v.data(), job.out = out.data();
  job.batch = batch, job.heads = heads, job.kv_heads = kv_heads;
  job.queries = queries, job.keys = keys, job.width = width, job.scale = 0.25f;
  const int64_t q_stride[] = {int64_t{queries} * q_token, width, q_token},
                kv_stride[] = {int64_t{keys} * kv_token, width, kv_token};
  for (int i = 0; i < 3; i++) {
    job.q_stride[i] = job.out_stride[i] = q_stride[i];
    job.k_stride[i] = job.v_stride[i] = kv_stride[i];
  }
  if (masked) {
    job.mask = mask.data();
    job.mask_stride[2] = keys;
    job.keep = keep.data();
    job.keep_stride[0] = int64_t{queries} * keys;
    job.keep_stride[2] = keys;
  }
  CHECK(sct_attention(&job, threads, isa, nullptr, nullptr) == SCT_OK);
  for (int b = 0; b < batch; b++)
    for (int h = 0; h < heads; h++)
      for (int t = 0; t < queries; t++) {
        std::vector<double> p(keys);
        double most = -1e300, sum = 0;
        const auto kept = [&](int s) { return !masked || keep[(size_t{1} * b * queries + t) * keys + s]; };
        for (int s = 0; s < keys; s++) {
          for (int i = 0; i < width; i++)
            p[s] += double{q[(size_t{1} * b * queries + t) * q_token + h * width + i]} *
                    k[(size_t{1} * b * keys + s) * kv_token + h / 2 * width + i];
          p[s] = p[s] * 0.25 + (masked ? mask[t * keys + s] : 0);
          if (kept(s)) most = std::max(most, p[s]);
        }
        for (int s = 0; s < keys; s++) sum += p[s] = kept(s) ? std::exp(p[s] - most) : 0;
        for (int i = 0; i < width; i++) {
          double expected = 0;
          for (int s = 0; s < keys && sum > 0; s++)
            expected += p[s] / sum * v[(size_t{1} * b * keys + s) * kv_token + h / 2 * width + i];
          CHECK(std::abs(out[(size_t{1} * b * queries + t) * q_token + h * width + i] - expected) < 1e-4);
        }
      }
  for (int b = 0; b < batch * queries; b++) CHECK(out[size_t{1} * b * q_token + heads * width] == 9.0f);
}

#include "chain.inl"
#include "decoder_step.inl"

}  // namespace

int main() {
  for (int isa = SCT_ISA_PORTABLE; isa <= SCT_ISA_AVX512; isa++) {
    if (sct_resolve_isa(isa) < 0) continue;
    std::printf("testing %s\n", sct_isa_name(isa));
    for (double density : {0.0, 0.05, 0.5, 1.0})
      for (int tile : {16, 32, 48, 80, 128})
        for (int tokens : {1, 7, 33, 129}) check_product(isa, 37, 83, tokens, density, tile, 30, 16, 2);
    check_product(isa, 1, 1, 1, 1.0, 16, 1, 1, 1);
    check_product(isa, 300, 500, 1100, 0.1, 64, 128, 100, 2);
    check_product(isa, 1024, 1024, 43, 0.2, 32, 128, 600, 2);  // rows 4 KiB stride, weights beyond L2
    check_not_finite_strip(isa);
    for (double density : {0.0, 0.1, 1.0})
      for (int tokens : {1, 2, 3, 7, 16, 33}) check_rows(isa, 37, 83, tokens, density, 2);
    check_rows(isa, 1, 1, 1, 1.0, 1);
    check_rows(isa, 200, 260, 300, 0.1, 2);
    for (double density : {0.0, 0.1, 1.0})
      for (int tile : {16, 48, 112, 128})
        for (int tokens : {1, 17, 129}) check_quads(isa, 37, 83, tokens, density, tile, 28, 2);
    check_quads(isa, 1, 1, 1, 1.0, 16, 4, 1);
    check_quads(isa, 100, 900, 70, 0.2, 64, 256, 3);
    for (double density : {0.0, 0.3, 1.0})
      for (int tokens : {1, 2, 3, 7, 16})
        for (int keep : {1, 2, 4}) check_nm(isa, 37, 83, tokens, density, keep, keep == 4 ? 8 : 4, 2);
    check_nm(isa, 1, 1, 1, 1.0, 2, 4, 1);
    check_nm(isa, 200, 700, 5, 1.0, 4, 8, 3);
    check_not_finite(isa);
    check_damage(isa);
    check_carried();
    check_many_callers(isa);
    for (int threads : {1, 3}) {
      check_swaps(isa, 19, 44, false, threads);
      check_swaps(isa, 19, 44, true, threads);
    }
    check_sweep(isa, 21, 37);
    for (int norm : {SCT_NO_NORM, SCT_LAYER_NORM, SCT_RMS_NORM})
      for (bool block : {false, true})
        for (int tokens : {1, 35}) check_after(isa, 43, 83, tokens, norm, block, norm == SCT_RMS_NORM);
    check_after(isa, 300, 40, 1100, SCT_LAYER_NORM, false, false);
    for (int norm : {SCT_LAYER_NORM, SCT_RMS_NORM}) check_norm(isa, 43, 900, norm, 2);
    for (int queries : {1, 16, 37})
      for (int keys : {1, 40, 300}) check_attention(isa, queries, keys, 24, queries != 16, 2);
    check_attention(isa, 33, 70, 13, true, 3);
    for (int queries : {1, 2, 3, 4, 7})
      for (int width : {16, 13})
        for (bool masked : {false, true}) check_attention(isa, queries, 300, width, masked, 2);
    for (bool norms_first : {false, true})
      for (int tile : {16, 48, 64})
        for (int tokens : {1, 16, 37, 130}) check_chain(isa, 3, tokens, tile, norms_first, tokens != 37, false, 2);
    for (int threads : {1, 3, 8}) check_chain(isa, 1, 140, 64, false, true, false, threads);
    for (int batch : {1, 3})
      for (int keys : {1, 20}) check_decoder_step(isa, batch, keys, 2);
    for (int threads : {1, 2, 64}) check_chain(isa, 2, 70, 32, true, true, threads == 2, threads);
  }
  for (bool shared_angles : {false, true}) check_rotary(2, 3, 5, 10, shared_angles);
  check_errors();
  check_chain_errors();
  check_decoder_step_errors();
  std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
