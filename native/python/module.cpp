// The Python module secateur.kernels._native: a thin layer over the C interface. Addresses are passed as integers (a
// tenth of a microsecond each), which secateur.kernels.packing and secateur.runtime.layers.operators have checked.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "secateur/kernels.h"
#include "secateur/steps.h"

namespace nb = nanobind;

namespace {

using Blob = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(int status) {
  if (status == SCT_OK) return;
  if (status == SCT_NO_MEMORY) throw std::bad_alloc();
  throw std::invalid_argument(sct_error_text(status));
}

// Throws where the size of a packed weight differs from that of the tensors (rows outputs, cols features).
void check_size(uintptr_t blob, int64_t bytes, int64_t rows, int64_t cols) {
  sct_info info;
  check(sct_describe(at<uint8_t>(blob), bytes, &info));
  if (info.rows == rows && info.cols == cols) return;
  throw std::invalid_argument("the packed weight is (" + std::to_string(info.rows) + ", " + std::to_string(info.cols) +
                              "), but the input has " + std::to_string(cols) + " features and " + std::to_string(rows) +
                              " outputs were asked for");
}

struct Memory {
  void* data = nullptr;
  int64_t bytes = 0;
};

void* allocate(void* context, int64_t bytes) {
  auto* memory = static_cast<Memory*>(context);
  memory->bytes = bytes;
  return memory->data = std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64));
}

template <class Pack>
Blob packed(Pack pack) {
  Memory memory;
  int status;
  {
    nb::gil_scoped_release release;
    status = pack(&memory);
  }
  if (status != SCT_OK) std::free(memory.data);
  check(status);
  nb::capsule owner(memory.data, [](void* p) noexcept { std::free(p); });
  const size_t shape[] = {static_cast<size_t>(memory.bytes)};
  return Blob(memory.data, 1, shape, owner);
}

using Strides = std::tuple<int64_t, int64_t, int64_t>;  // from batch to batch, head to head, token to token

void fill(int64_t (&to)[3], const Strides& from) { std::tie(to[0], to[1], to[2]) = from; }

// The steps of a table (secateur/steps.h) whose addresses are indices of parts: part i lies at address[i] and has
// bytes[i] bytes.
std::vector<sct_step> steps_of(const int64_t* table, const float* numbers, int64_t count, int64_t width,
                               const std::vector<uintptr_t>& address, const std::vector<int64_t>& bytes) {
  const auto parts = static_cast<int64_t>(std::min(address.size(), bytes.size()));
  auto part = [&](int64_t index, int64_t least) {
    if (index < 0 || index >= parts || least < 0 || bytes[index] < least)
      throw std::invalid_argument("a step of the chain names a part that is not there, or too small");
    return address[index];
  };
  auto weight = [&](int64_t index, int64_t size) { return at<uint8_t>(part(index, size)); };
  auto vector = [&](int64_t index, int64_t n) { return index == -1 ? nullptr : at<float>(part(index, n * 4)); };
  return secateur::read_steps(table, numbers, count, width, weight, vector);
}

// The steps of a chain. Throws where an attention has not `heads` heads, or the last step does not give `rows` rows.
std::vector<sct_step> chain_of(const int64_t* table, const float* numbers, int64_t count, int64_t width,
                               const std::vector<uintptr_t>& address, const std::vector<int64_t>& bytes, int64_t heads,
                               int64_t rows) {
  std::vector<sct_step> steps = steps_of(table, numbers, count, width, address, bytes);
  for (const sct_step& s : steps)
    if (s.kind == SCT_ATTENTION_STEP && s.heads != heads)
      throw std::invalid_argument("every attention of a chain has the same heads");
  if (sct_chain_rows(steps.data(), static_cast<int64_t>(steps.size()), width) != rows)
    throw std::invalid_argument("the steps of the chain do not fit together, or to its input and output");
  return steps;
}

// The steps of a decoder's block, `Token` in Python. The memory at the addresses must outlive it.
class DecoderStep {
 public:
  DecoderStep(uintptr_t table, uintptr_t numbers, int64_t count, int64_t width, const std::vector<uintptr_t>& address,
              const std::vector<int64_t>& bytes)
      : steps_(steps_of(at<int64_t>(table), at<float>(numbers), count, width, address, bytes)),
        width_(width),
        floats_(sct_token_floats(steps_.data(), static_cast<int64_t>(steps_.size()), width)) {
    if (floats_ < 0) throw std::invalid_argument("the steps of the block do not fit together");
  }

  int64_t floats() const { return floats_; }

  void run(int64_t begin, int64_t end, int64_t batch, uintptr_t x, uintptr_t values, uintptr_t cos, uintptr_t sin,
           int64_t turn_stride, uintptr_t k, uintptr_t v, int64_t keys, Strides k_stride, Strides v_stride,
           uintptr_t mask, uintptr_t keep, Strides mask_stride, int threads) const {
    sct_token_job job{};
    job.steps = steps_.data(), job.count = static_cast<int64_t>(steps_.size()), job.width = width_, job.batch = batch;
    job.x = at<float>(x), job.values = at<float>(values);
    job.cos = at<float>(cos), job.sin = at<float>(sin), job.turn_stride = turn_stride;
    job.k = at<float>(k), job.v = at<float>(v), job.keys = keys;
    job.mask = at<float>(mask), job.keep = at<uint8_t>(keep);
    fill(job.k_stride, k_stride), fill(job.v_stride, v_stride), fill(job.mask_stride, mask_stride);
    nb::gil_scoped_release release;
    check(sct_token(&job, begin, end, threads, SCT_ISA_AUTO, nullptr, nullptr));
  }

 private:
  std::vector<sct_step> steps_;
  int64_t width_, floats_;
};

nb::tuple describe(uintptr_t blob, int64_t bytes) {
  sct_info i;
  check(sct_describe(at<uint8_t>(blob), bytes, &i));
  return nb::make_tuple(i.format, i.value, i.rows, i.cols, i.nonzeros, i.p[0], i.p[1], i.p[2]);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native sparse kernels; see native/include/secateur/kernels.h.";
  m.def("resolve_isa", &sct_resolve_isa);
  m.def("isa_name", &sct_isa_name);
  m.def("describe", &describe);
  m.def(
      "validate", [](uintptr_t blob, int64_t bytes) { check(sct_validate(at<uint8_t>(blob), bytes)); },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "unpack",
      [](uintptr_t blob, int64_t bytes, uintptr_t weight) {
        check(sct_unpack(at<uint8_t>(blob), bytes, at<float>(weight)));
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def("pack_tiled", [](uintptr_t weight, int64_t rows, int64_t cols, int64_t ld, int value, int32_t tile,
                         int32_t chunk, int32_t row_block) {
    return packed([=](void* memory) {
      return sct_pack_tiled(at<float>(weight), rows, cols, ld, value, tile, chunk, row_block, allocate, memory);
    });
  });
  m.def("pack_block", [](uintptr_t weight, int64_t rows, int64_t cols, int64_t ld, int value, int32_t block,
                         int32_t chunk, int32_t row_block) {
    return packed([=](void* memory) {
      return sct_pack_block(at<float>(weight), rows, cols, ld, value, block, chunk, row_block, allocate, memory);
    });
  });
  m.def("pack_bitmask", [](uintptr_t weight, int64_t rows, int64_t cols, int64_t ld, int value) {
    return packed(
        [=](void* memory) { return sct_pack_bitmask(at<float>(weight), rows, cols, ld, value, allocate, memory); });
  });
  m.def("pack_nm", [](uintptr_t weight, int64_t rows, int64_t cols, int64_t ld, int value, int32_t keep, int32_t of) {
    return packed([=](void* memory) {
      return sct_pack_nm(at<float>(weight), rows, cols, ld, value, keep, of, allocate, memory);
    });
  });
  m.def("pack_quad",
        [](uintptr_t weight, int64_t rows, int64_t cols, int64_t ld, int32_t tile, int32_t chunk, int32_t row_block) {
          return packed([=](void* memory) {
            return sct_pack_quad(at<float>(weight), rows, cols, ld, tile, chunk, row_block, allocate, memory);
          });
        });
  m.def(
      "linear",
      [](uintptr_t blob, int64_t bytes, uintptr_t x, int64_t tokens, int64_t ldx, int64_t cols, uintptr_t bias,
         int activation, uintptr_t y, int64_t rows, int threads, int isa) {
        check_size(blob, bytes, rows, cols);
        check(sct_linear(at<uint8_t>(blob), bytes, at<float>(x), tokens, ldx, at<float>(bias), activation, at<float>(y),
                         rows, threads, isa));
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "linear_after",
      [](uintptr_t blob, int64_t bytes, uintptr_t x, int64_t tokens, int64_t ldx, int64_t cols, uintptr_t bias,
         int activation, uintptr_t gate, int64_t ldg, uintptr_t residual, int64_t ldr, int norm, uintptr_t scale,
         uintptr_t shift, float epsilon, uintptr_t y, int64_t rows, int threads, int isa) {
        check_size(blob, bytes, rows, cols);
        const sct_after after{at<float>(residual), ldr, norm, at<float>(scale), at<float>(shift), epsilon,
                              at<float>(gate),     ldg};
        check(sct_linear_on(at<uint8_t>(blob), bytes, at<float>(x), tokens, ldx, at<float>(bias), activation, &after,
                            at<float>(y), rows, threads, isa, nullptr, nullptr));
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "norm",
      [](uintptr_t x, int64_t tokens, int64_t width, int64_t ldx, int norm, uintptr_t scale, uintptr_t shift,
         float epsilon, uintptr_t y, int threads, int isa) {
        check(sct_norm_on(at<float>(x), tokens, width, ldx, norm, at<float>(scale), at<float>(shift), epsilon,
                          at<float>(y), width, threads, isa, nullptr, nullptr));
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def("attention", [](uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, Strides q_stride, Strides k_stride,
                        Strides v_stride, Strides out_stride, int64_t batch, int64_t heads, int64_t kv_heads,
                        int64_t queries, int64_t keys, int64_t width, uintptr_t mask, Strides mask_stride,
                        uintptr_t keep, Strides keep_stride, float scale, int threads, int isa) {
    sct_attention_job job{};
    job.q = at<float>(q), job.k = at<float>(k), job.v = at<float>(v), job.out = at<float>(out);
    job.batch = batch, job.heads = heads, job.kv_heads = kv_heads;
    job.queries = queries, job.keys = keys, job.width = width, job.scale = scale;
    job.mask = at<float>(mask), job.keep = at<uint8_t>(keep);
    fill(job.q_stride, q_stride), fill(job.k_stride, k_stride), fill(job.v_stride, v_stride);
    fill(job.out_stride, out_stride), fill(job.mask_stride, mask_stride), fill(job.keep_stride, keep_stride);
    nb::gil_scoped_release release;
    check(sct_attention(&job, threads, isa, nullptr, nullptr));
  });
  nb::class_<DecoderStep>(m, "Token")
      .def(nb::init<uintptr_t, uintptr_t, int64_t, int64_t, const std::vector<uintptr_t>&,
                    const std::vector<int64_t>&>())
      .def_prop_ro("floats", &DecoderStep::floats)
      .def("run", &DecoderStep::run);
  m.def("chain",
        [](uintptr_t x, uintptr_t y, int64_t batch, int64_t tokens, int64_t width, int64_t rows, uintptr_t table,
           uintptr_t numbers, int64_t count, const std::vector<uintptr_t>& address, const std::vector<int64_t>& bytes,
           int64_t heads, uintptr_t mask, uintptr_t keep, Strides mask_stride, int threads, int isa) {
          const std::vector<sct_step> steps =
              chain_of(at<int64_t>(table), at<float>(numbers), count, width, address, bytes, heads, rows);
          sct_chain_job job{};
          job.x = at<float>(x), job.y = at<float>(y);
          job.batch = batch, job.tokens = tokens, job.width = width;
          job.steps = steps.data(), job.count = count;
          job.mask = at<float>(mask), job.keep = at<uint8_t>(keep);
          fill(job.mask_stride, mask_stride), fill(job.keep_stride, mask_stride);
          nb::gil_scoped_release release;
          check(sct_chain(&job, threads, isa, nullptr, nullptr));
        });
  m.def(
      "repair_sweep",
      [](uintptr_t w, int64_t ldw, int64_t rows, int64_t width, uintptr_t upper, int64_t ldu, uintptr_t inverse,
         uintptr_t mask, int keep, int of, uintptr_t errors, bool wide, int threads, int isa) {
        check(sct_repair_sweep(at<void>(w), ldw, rows, width, at<void>(upper), ldu, at<void>(inverse),
                               at<uint8_t>(mask), keep, of, at<void>(errors), wide, threads, isa));
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "repair_swap",
      [](uintptr_t c, uintptr_t largest, int64_t rows, int64_t n, double slack, uintptr_t v, uintptr_t r,
         uintptr_t open, uintptr_t kept, bool wide, int threads, int isa) {
        int64_t swaps = 0;
        check(sct_repair_swap(at<void>(c), at<void>(largest), rows, n, slack, at<void>(v), at<void>(r), at<void>(open),
                              at<uint8_t>(kept), &swaps, wide, threads, isa));
        return swaps;
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "repair_group",
      [](uintptr_t c, int64_t rows, int64_t n, double slack, uintptr_t v, uintptr_t r, uintptr_t mask, int keep, int of,
         uintptr_t patterns, int count, uintptr_t inverses, bool wide, int threads, int isa) {
        int64_t changed = 0;
        check(sct_repair_group(at<void>(c), rows, n, slack, at<void>(v), at<void>(r), at<uint8_t>(mask), keep, of,
                               at<uint8_t>(patterns), count, at<void>(inverses), &changed, wide, threads, isa));
        return changed;
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def("use_openmp",
        [](uintptr_t gomp_parallel) { sct_use_openmp(reinterpret_cast<sct_fork_function>(gomp_parallel)); });
}
