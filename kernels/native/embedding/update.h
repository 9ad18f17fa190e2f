// Gradients of touched rows summed, the optimizer's step, and the bounds kept up; for *_loops.cpp
// only.
//
// With g the row's summed gradient, w its weights, d = lr * weight decay, all element by element:
//
//   sgd      w' = (w - lr g) - d w
//   adagrad  s' = s + mean(g^2);  w' = (w - (lr / (sqrt(s') + eps)) g) - d w
//   adam     m' = beta1 m + (1 - beta1) g;  v' = beta2 v + (1 - beta2) g^2
//            w' = (w - (lr / (1 - beta1^t)) m' / (sqrt(v') / sqrt(1 - beta2^t) + eps)) - d w
//
// No operation depends on the width of a vector, so every level writes the same bits.
#pragma once

#include "bounds.h"
#include "loops.h"
#include "rows.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

// Rows asked for ahead of use.
constexpr int64_t kRowsAhead = 12;

// The gradient of one id: its bag's, shared among a mean's ids, times the id's weight.
template <int Dim>
inline void load_gradient(const BagGradient& gradient, const TouchedRows& touched, int64_t id,
                          int dim, F32* values) {
  const int vectors = row_vectors<Dim>(dim);
  const int64_t bag = touched.bag != nullptr ? touched.bag[id] : id;
  load_row<Dim>(gradient.data + bag * gradient.stride, dim, values);
  if (gradient.offsets != nullptr) {
    const F32 count = all(float(gradient.offsets[bag + 1] - gradient.offsets[bag]));
    for (int k = 0; k < vectors; ++k) values[k] = values[k] / count;
  }
  if (gradient.weights != nullptr) {
    const F32 weight = all(gradient.weights[id]);
    for (int k = 0; k < vectors; ++k) values[k] = weight * values[k];
  }
}

// The sum over a row's ids, in their order.
template <int Dim>
inline void sum_gradient(const BagGradient& gradient, const TouchedRows& touched, int64_t u,
                         int dim, F32* sum) {
  const int vectors = row_vectors<Dim>(dim);
  int64_t id = touched.rows[u].first;
  load_gradient<Dim>(gradient, touched, id, dim, sum);
  if (touched.next == nullptr) return;
  F32 one[kRowVectors<Dim>];
  while ((id = touched.next[id]) >= 0) {
    load_gradient<Dim>(gradient, touched, id, dim, one);
    for (int k = 0; k < vectors; ++k) sum[k] = sum[k] + one[k];
  }
}

// Zeroes the gradient where the weight was clamped into the grid.
inline void clip_gradient(const TableView& table, const F32* row, int vectors, F32* gradient) {
  const F32 scale = all(row_scale(table, row, vectors));
  const F32 low = all(-table.largest - 1.5f), high = all(table.largest + 0.5f);
  for (int k = 0; k < vectors; ++k) {
    const F32 ratio = row[k] / scale;
    gradient[k] = ratio >= low ? (ratio <= high ? gradient[k] : F32{}) : F32{};
  }
}

// Mean of the squares: 16 running sums, whatever the width of a vector, added up in halves.
inline float mean_square(const F32* values, int vectors, int dim) {
  constexpr int kSums = 16;
  F32 sums[kSums / kLanes]{};
  for (int k = 0; k < vectors; ++k) {
    F32& sum = sums[k % (kSums / kLanes)];
    sum = sum + values[k] * values[k];
  }
  return sum_of_16(sums) / float(dim);
}

template <typename State, int Dim, Rule R>
[[gnu::always_inline]] inline void prefetch_state(const RuleStep& step, int64_t row, int dim) {
  const int64_t bytes = State::kBytes * int64_t(Dim != 0 ? Dim : dim);
  const char* first = static_cast<const char*>(step.first);
  const char* second = static_cast<const char*>(step.second);
  if constexpr (R == Rule::adagrad) __builtin_prefetch(first + row * State::kBytes, 1, 3);
  if constexpr (R == Rule::adam) {
    prefetch_bytes<true>(first + row * bytes, bytes);
    prefetch_bytes<true>(second + row * bytes, bytes);
  }
}

// after = the row after the step; `row` counts over all tables, `key` is the row's.
template <typename State, int Dim, Rule R>
inline void take_step(const RuleStep& step, int64_t row, uint32_t key, int dim, const F32* before,
                      const F32* gradient, F32* after) {
  const int vectors = row_vectors<Dim>(dim);
  const uint32_t width = uint32_t(Dim != 0 ? Dim : dim);
  if constexpr (R == Rule::sgd) {
    const F32 lr = all(step.lr);
    for (int k = 0; k < vectors; ++k) after[k] = before[k] - lr * gradient[k];
  } else if constexpr (R == Rule::adagrad) {
    const float total =
        State::load_one(step.first, row) + mean_square(gradient, vectors, int(width));
    State::store_one(step.first, row, key, width, total);
    const F32 rate = all(step.lr / (__builtin_sqrtf(total) + step.eps));
    for (int k = 0; k < vectors; ++k) after[k] = before[k] - rate * gradient[k];
  } else {
    F32 first[kRowVectors<Dim>], second[kRowVectors<Dim>];
    State::template load<Dim>(step.first, row, dim, first);
    State::template load<Dim>(step.second, row, dim, second);
    const F32 beta1 = all(step.beta1), beta1_rest = all(step.beta1_rest);
    const F32 beta2 = all(step.beta2), beta2_rest = all(step.beta2_rest);
    const F32 rate = all(step.rate), root = all(step.root), eps = all(step.eps);
    for (int k = 0; k < vectors; ++k) {
      first[k] = beta1 * first[k] + beta1_rest * gradient[k];
      second[k] = beta2 * second[k] + beta2_rest * (gradient[k] * gradient[k]);
      after[k] = before[k] - (rate * first[k]) / (sqrt(second[k]) * root + eps);
    }
    State::template store<Dim>(step.first, row, dim, key, width, first);
    State::template store<Dim>(step.second, row, dim, key, 2 * width, second);
  }
  if (step.decay != 0.0f) {
    const F32 decay = all(step.decay);
    for (int k = 0; k < vectors; ++k) after[k] = after[k] - decay * before[k];
  }
}

// Takes copies: a store might write to what a reference leads to, and the loop would read it again.
template <typename Rows, int Dim, Rule R>
void update_with(Storage storage, TableView table, TouchedRows touched, BagGradient gradient,
                 Bounds bounds, RuleStep step) {
  using State = typename Rows::State;
  const int vectors = row_vectors<Dim>(storage.dim);
  const bool clip = gradient.clip && table.grid != Grid::none;
  F32 before[kRowVectors<Dim>], after[kRowVectors<Dim>], sum[kRowVectors<Dim>];
  for (int64_t u = 0; u < touched.count; ++u) {
    if (u + kRowsAhead < touched.count) {
      const int64_t ahead = touched.rows[u + kRowsAhead].row;
      Rows::template prefetch<Dim, true>(storage, table.first_row + ahead);
      prefetch_state<State, Dim, R>(step, table.first_row + ahead, storage.dim);
      prefetch_bound(bounds, ahead);
    }
    const int64_t row = touched.rows[u].row;
    sum_gradient<Dim>(gradient, touched, u, storage.dim, sum);
    Rows::template load<Dim>(storage, table.first_row + row, before);
    if (clip) clip_gradient(table, before, vectors, sum);
    take_step<State, Dim, R>(step, table.first_row + row, Rows::key(storage, table.first_row + row),
                             storage.dim, before, sum, after);
    Rows::template write<Dim>(storage, table.first_row + row, after);
    if (bounds.levels != 0) keep_bound(bounds, row, before, after, vectors);
  }
}

template <typename Rows>
void update(const Storage& storage, const TableView& table, const TouchedRows& touched,
            const BagGradient& gradient, const Bounds& bounds, const RuleStep& step) {
  with_dim(storage.dim, [&]<int Dim>() {
    switch (step.rule) {
      case Rule::sgd:
        return update_with<Rows, Dim, Rule::sgd>(storage, table, touched, gradient, bounds, step);
      case Rule::adagrad:
        return update_with<Rows, Dim, Rule::adagrad>(storage, table, touched, gradient, bounds,
                                                     step);
      case Rule::adam:
        return update_with<Rows, Dim, Rule::adam>(storage, table, touched, gradient, bounds, step);
    }
  });
}

template <typename Rows>
void sum_gradients(const Storage& storage, const TableView& table, const TouchedRows& touched,
                   const BagGradient& gradient, float* values) {
  with_dim(storage.dim, [&]<int Dim>() {
    const int vectors = row_vectors<Dim>(storage.dim);
    const bool clip = gradient.clip && table.grid != Grid::none;
    F32 row[kRowVectors<Dim>], sum[kRowVectors<Dim>];
    for (int64_t u = 0; u < touched.count; ++u) {
      sum_gradient<Dim>(gradient, touched, u, storage.dim, sum);
      if (clip) {
        Rows::template load<Dim>(storage, table.first_row + touched.rows[u].row, row);
        clip_gradient(table, row, vectors, sum);
      }
      store_row<Dim>(values + u * storage.dim, storage.dim, sum);
    }
  });
}

// Writes `values` [count, D] to rows, which count over all tables.
template <typename Rows>
void write_rows(const Storage& storage, const int64_t* rows, int64_t count, const float* values) {
  with_dim(storage.dim, [&]<int Dim>() {
    F32 row[kRowVectors<Dim>];
    for (int64_t u = 0; u < count; ++u) {
      if (u + kRowsAhead < count) {
        Rows::template prefetch<Dim, true>(storage, rows[u + kRowsAhead]);
      }
      load_row<Dim>(values + u * storage.dim, storage.dim, row);
      Rows::template write<Dim>(storage, rows[u], row);
    }
  });
}

template <typename Rows>
constexpr UpdateLoops kUpdateLoops{sum_gradients<Rows>, update<Rows>, write_rows<Rows>};

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm
