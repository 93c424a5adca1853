// Inner loops of one-shot pruning (sct_repair_*): checks arguments, hands rows to threads.
#include <algorithm>
#include <atomic>

#include "pool.h"
#include "secateur/kernels.h"
#include "table.h"

namespace secateur {
namespace {

constexpr int64_t kRows = 8;  // rows that a thread takes at a time

template <class Row>
struct RepairJob {
  const Row* row;
  int64_t rows;
  std::atomic<int64_t> next{0}, total{0};
};

template <class Row>
void repair_task(void* context) {
  auto& job = *static_cast<RepairJob<Row>*>(context);
  int64_t total = 0;
  for (int64_t first; (first = job.next.fetch_add(kRows)) < job.rows;)
    for (int64_t i = first; i < std::min(first + kRows, job.rows); i++) total += (*job.row)(i);
  job.total.fetch_add(total);
}

// The sum of row(i) over all rows.
template <class Row>
int64_t sum_over_rows(int64_t rows, int threads, const Row& row) {
  RepairJob<Row> job{&row, rows};
  const int useful = static_cast<int>(std::min<int64_t>(threads, (rows + kRows - 1) / kRows));
  run_parallel(std::max(useful, 1), repair_task<Row>, &job);
  return job.total.load();
}

template <class T>
const RepairTable<T>& repair_table(const KernelTable& kernels);
template <>
const RepairTable<float>& repair_table(const KernelTable& kernels) {
  return kernels.repair_f32;
}
template <>
const RepairTable<double>& repair_table(const KernelTable& kernels) {
  return kernels.repair_f64;
}

template <class T>
void sweep(const KernelTable& kernels, void* w, int64_t ldw, int64_t rows, int64_t width, const void* upper,
           int64_t ldu, const void* inverse, uint8_t* mask, int keep, int of, void* errors, int threads) {
  sum_over_rows(rows, threads, [&](int64_t i) {
    repair_table<T>(kernels).sweep(static_cast<T*>(w) + i * ldw, width, static_cast<const T*>(upper), ldu,
                                   static_cast<const T*>(inverse), mask + i * width, keep, of,
                                   static_cast<T*>(errors) + i * width);
    return int64_t{0};
  });
}

template <class T>
int64_t swap(const KernelTable& kernels, const void* c, const void* largest, int64_t rows, int64_t n, double slack,
             void* v, void* r, void* open, uint8_t* kept, int threads) {
  return sum_over_rows(rows, threads, [&](int64_t i) {
    return repair_table<T>(kernels).swap(static_cast<const T*>(c), static_cast<const T*>(largest), n,
                                         static_cast<T>(slack), static_cast<T*>(v) + i * n, static_cast<T*>(r) + i * n,
                                         static_cast<T*>(open) + i * n, kept + i * n);
  });
}

template <class T>
int64_t group(const KernelTable& kernels, const void* c, int64_t rows, int64_t n, double slack, void* v, void* r,
              uint8_t* mask, int keep, int of, const uint8_t* patterns, int count, const void* inverses, int threads) {
  return sum_over_rows(rows, threads, [&](int64_t i) {
    return repair_table<T>(kernels).group(static_cast<const T*>(c), n, static_cast<T>(slack),
                                          static_cast<T*>(v) + i * n, static_cast<T*>(r) + i * n, mask + i * n, keep,
                                          of, patterns, count, static_cast<const T*>(inverses));
  });
}

}  // namespace
}  // namespace secateur

using namespace secateur;

extern "C" int sct_repair_sweep(void* w, int64_t ldw, int64_t rows, int64_t width, const void* upper, int64_t ldu,
                                const void* inverse, uint8_t* mask, int keep, int of, void* errors, int wide,
                                int threads, int isa) {
  if (!w || !upper || !inverse || !mask || !errors || rows < 0 || width < 1 || ldw < width || ldu < width || of < 0 ||
      (of > 0 && (keep < 1 || keep > of || width % of)))
    return SCT_BAD_ARGUMENT;
  isa = sct_resolve_isa(isa);
  if (isa < 0) return SCT_UNSUPPORTED_ISA;
  (wide ? sweep<double> : sweep<float>)(kernel_table(isa), w, ldw, rows, width, upper, ldu, inverse, mask, keep, of,
                                        errors, threads);
  return SCT_OK;
}

extern "C" int sct_repair_swap(const void* c, const void* largest, int64_t rows, int64_t n, double slack, void* v,
                               void* r, void* open, uint8_t* kept, int64_t* swaps, int wide, int threads, int isa) {
  if (!c || !largest || !v || !r || !open || !kept || !swaps || rows < 0 || n < 1 || !(slack >= 1))
    return SCT_BAD_ARGUMENT;
  isa = sct_resolve_isa(isa);
  if (isa < 0) return SCT_UNSUPPORTED_ISA;
  *swaps =
      (wide ? swap<double> : swap<float>)(kernel_table(isa), c, largest, rows, n, slack, v, r, open, kept, threads);
  return SCT_OK;
}

extern "C" int sct_repair_group(const void* c, int64_t rows, int64_t n, double slack, void* v, void* r, uint8_t* mask,
                                int keep, int of, const uint8_t* patterns, int count, const void* inverses,
                                int64_t* changed, int wide, int threads, int isa) {
  if (!c || !v || !r || !mask || !patterns || !inverses || !changed || rows < 0 || of < 1 || of > 16 || keep < 1 ||
      keep > of || n < of || n % of || count < 1 || !(slack >= 1))
    return SCT_BAD_ARGUMENT;
  isa = sct_resolve_isa(isa);
  if (isa < 0) return SCT_UNSUPPORTED_ISA;
  *changed = (wide ? group<double> : group<float>)(kernel_table(isa), c, rows, n, slack, v, r, mask, keep, of, patterns,
                                                   count, inverses, threads);
  return SCT_OK;
}
