// Inner loops of one-shot pruning, for float and double. The compiler vectorises them; -fopenmp-simd lets it reorder
// the marked reductions.
#pragma once
#include "common.inl"

namespace {

// One row of a band of SparseGPT: the columns after a pruned column make up for its error. With `of` above 0, the sweep
// keeps of every `of` columns the `keep` with the highest (w / U_jj)^2, chosen when it reaches them.
template <class T>
void sweep_row(T* w, int64_t width, const T* upper, int64_t ldu, const T* inverse, uint8_t* mask, int keep, int of,
               T* errors) {
  for (int64_t j = 0; j < width; j++) {
    if (of > 0 && j % of == 0) {
      for (int a = 0; a < of; a++) {
        const T sa = w[j + a] * inverse[j + a] * (w[j + a] * inverse[j + a]);
        int beaten = 0;
        for (int b = 0; b < of; b++) {
          const T sb = w[j + b] * inverse[j + b] * (w[j + b] * inverse[j + b]);
          beaten += b < a ? sb >= sa : b > a && sb > sa;
        }
        mask[j + a] = beaten < keep;
      }
    }
    if (mask[j]) {
      errors[j] = 0;
      continue;
    }
    const T e = w[j] * inverse[j];
    errors[j] = e;
    w[j] = 0;
    const T* u = upper + j * ldu;
#pragma omp simd
    for (int64_t i = j + 1; i < width; i++) w[i] -= e * u[i];
  }
}

// What all rows share: the correlation C (n, n) with unit diagonal, and `largest` (n), for each row of C the largest
// absolute value off the diagonal.
template <class T>
struct Descent {
  const T* c;
  const T* largest;
  int64_t n;
  T slack;  // the gain of a swap must exceed the loss of the dropped weight by this factor
};

// Adds a * cq to r. Returns the largest |r| over open weights.
template <class T>
T update(T* r, const T* cq, T a, const T* open, int64_t n) {
  T most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; i++) {
    const T x = r[i] + a * cq[i];
    r[i] = x;
    const T y = std::fabs(x) * open[i];
    most = y > most ? y : most;
  }
  return most;
}

// One pass over one row: every kept weight takes its best value, or is swapped for a pruned weight that, at its own
// best value, lowers the loss by more. Returns the number of swaps.
//
//   v     the weights
//   r     (v0 - v) C
//   open  1 where a weight is pruned and may come back, else 0
//   kept  1 where a weight may be dropped
template <class T>
int64_t swap_row(const Descent<T>& d, T* v, T* r, T* open, uint8_t* kept) {
  const int64_t n = d.n;
  int64_t swaps = 0;
  T most = 0;  // an upper bound of |r| over open weights
  for (int64_t i = 0; i < n; i++) most = std::fmax(most, std::fabs(r[i]) * open[i]);
  for (int64_t q = 0; q < n; q++) {
    if (!kept[q]) continue;
    const T* cq = d.c + q * n;
    const T vq = v[q], step = r[q], best = vq + step;
    // |r_p + v_q C_qp| cannot exceed the left side: where that is too small, no p has to be looked at.
    if (most + std::fabs(vq) * d.largest[q] > std::fabs(best) * d.slack) {
      T top = 0;
#pragma omp simd reduction(max : top)
      for (int64_t i = 0; i < n; i++) {
        const T y = std::fabs(r[i] + vq * cq[i]) * open[i];
        top = y > top ? y : top;
      }
      if (top > std::fabs(best) * d.slack) {
        int64_t p = 0;
        while (std::fabs(r[p] + vq * cq[p]) * open[p] < top && p < n - 1) p++;
        const T vp = r[p] + vq * cq[p];
        const T* cp = d.c + p * n;
        v[q] = 0, v[p] = vp;
        kept[q] = 0, kept[p] = 1;
        open[q] = 1, open[p] = 0;
        for (int64_t i = 0; i < n; i++) r[i] += vq * cq[i];
        most = update(r, cp, -vp, open, n);
        swaps++;
        continue;
      }
    }
    if (step != 0) {
      v[q] = best;
      most = update(r, cq, -step, open, n);
    }
  }
  return swaps;
}

// One pass over one row of an N:M pattern: each group takes the best of all patterns, with the best values of its
// weights. Returns the number of groups that changed their pattern.
//
//   mask      1 where a weight is kept
//   patterns  (count, keep), positions within a group
//   inverses  (groups, count, keep, keep), inverses of the parts of C
template <class T>
int64_t group_row(const Descent<T>& d, T* v, T* r, uint8_t* mask, int keep, int of, const uint8_t* patterns, int count,
                  const T* inverses) {
  const int64_t n = d.n;
  int64_t changed = 0;
  T b[16], x[16], best_x[16], now_x[16];
  for (int64_t g = 0; g < n / of; g++) {
    const int64_t o = g * of;
    for (int a = 0; a < of; a++) {
      const T* ca = d.c + (o + a) * n + o;
      T sum = r[o + a];
      for (int k = 0; k < of; k++) sum += ca[k] * v[o + k];
      b[a] = sum;
    }
    T best = -1, now = -1;
    int chosen = 0, current = -1;
    for (int z = 0; z < count; z++) {
      const uint8_t* s = patterns + z * keep;
      const T* inverse = inverses + ((g * count + z) * keep) * keep;
      T gain = 0;
      bool same = true;
      for (int i = 0; i < keep; i++) {
        T sum = 0;
        for (int k = 0; k < keep; k++) sum += inverse[i * keep + k] * b[s[k]];
        x[i] = sum;
        gain += sum * b[s[i]];
        same = same && mask[o + s[i]];
      }
      if (same) {
        current = z, now = gain;
        for (int i = 0; i < keep; i++) now_x[i] = x[i];
      }
      if (gain > best) {
        best = gain, chosen = z;
        for (int i = 0; i < keep; i++) best_x[i] = x[i];
      }
    }
    if (current >= 0 && chosen != current && !(best > now * d.slack)) {
      chosen = current;
      for (int i = 0; i < keep; i++) best_x[i] = now_x[i];
    }
    if (chosen != current) changed++;
    const uint8_t* s = patterns + chosen * keep;
    T change[16];
    for (int a = 0; a < of; a++) change[a] = -v[o + a], v[o + a] = 0, mask[o + a] = 0;
    for (int i = 0; i < keep; i++) change[s[i]] += best_x[i], v[o + s[i]] = best_x[i], mask[o + s[i]] = 1;
    for (int a = 0; a < of; a++) {
      const T e = change[a];
      if (e == 0) continue;
      const T* ca = d.c + (o + a) * n;
#pragma omp simd
      for (int64_t i = 0; i < n; i++) r[i] -= e * ca[i];
    }
  }
  return changed;
}

template <class T>
constexpr secateur::RepairTable<T> repair_table() {
  return {
      sweep_row<T>,
      [](const T* c, const T* largest, int64_t n, T slack, T* v, T* r, T* open, uint8_t* kept) {
        return swap_row<T>({c, largest, n, slack}, v, r, open, kept);
      },
      [](const T* c, int64_t n, T slack, T* v, T* r, uint8_t* mask, int keep, int of, const uint8_t* patterns,
         int count, const T* inverses) {
        return group_row<T>({c, nullptr, n, slack}, v, r, mask, keep, of, patterns, count, inverses);
      },
  };
}

}  // namespace
