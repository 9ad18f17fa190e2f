#include "interaction.h"

#include <algorithm>
#include <memory>
#include <new>

#include "../common/parallel.h"

namespace dqrm {
namespace {

// Products and sums that take one core about 20 microseconds: less is not worth a second thread.
constexpr int64_t kPartWork = int64_t(1) << 20;
constexpr std::align_val_t kAlignment{64};

struct Freed {
  void operator()(float* memory) const { ::operator delete(memory, kAlignment); }
};

int64_t parts_of(const Interaction& work, int64_t batch, int threads) {
  const int64_t one = std::max<int64_t>(work.vectors * work.vectors * work.dim, 1);
  const int64_t worth = std::max<int64_t>(batch * one / kPartWork, 1);
  return std::min({worth, batch, int64_t(threads)});
}

}  // namespace

void interaction_forward(const InteractionLoops& loops, const Interaction& work, int64_t batch,
                         int threads) {
  if (batch == 0) return;
  const int64_t parts = parts_of(work, batch, threads);
  const int64_t floats = (loops.scratch(work) + 15) / 16 * 16;
  const std::unique_ptr<float, Freed> scratch(
      static_cast<float*>(::operator new(size_t(parts * floats) * sizeof(float), kAlignment)));
  std::fill_n(scratch.get(), parts * floats, 0.0f);
  auto part = [&](int64_t i) {
    loops.forward(work, batch * i / parts, batch * (i + 1) / parts, scratch.get() + i * floats);
  };
  parallel_for(threads, parts, part);
}

void interaction_backward(const InteractionLoops& loops, const Interaction& work, int64_t batch,
                          int threads) {
  if (batch == 0) return;
  const int64_t parts = parts_of(work, batch, threads);
  auto part = [&](int64_t i) {
    loops.backward(work, batch * i / parts, batch * (i + 1) / parts);
  };
  parallel_for(threads, parts, part);
}

}  // namespace dqrm
