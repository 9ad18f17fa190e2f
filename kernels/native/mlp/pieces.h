// Consecutive arrays in one piece of memory, each on a cache line of its own.
#pragma once

#include <cstdint>

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

}  // namespace dqrm
