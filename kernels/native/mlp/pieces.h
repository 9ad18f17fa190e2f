// Memory for the stacks: consecutive arrays in one piece, each on a cache line of its own; and
// parts of layers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dqrm {

constexpr int64_t kLineBytes = 64;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// With a null base it only counts the bytes.
class Pieces {
 public:
  explicit Pieces(char* base) : base_(base) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += ceil_div(count * int64_t(sizeof(T)), kLineBytes) * kLineBytes;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Where in a workspace the first piece begins.
inline char* aligned(void* workspace) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(workspace);
  return reinterpret_cast<char*>((address + kLineBytes - 1) / kLineBytes * kLineBytes);
}

// Number `position` among parts that come in one run per layer.
struct LayerPart {
  size_t layer;
  int64_t part;
};

inline LayerPart find_part(int64_t position, const std::vector<int64_t>& counts) {
  size_t layer = 0;
  while (position >= counts[layer]) position -= counts[layer++];
  return {layer, position};
}

// To be released with std::free. Throws std::bad_alloc.
char* allocate_lines(int64_t bytes);

// Memory that the calling thread keeps from one call to the next.
char* scratch(int64_t bytes);

}  // namespace dqrm
