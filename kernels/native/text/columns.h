// Arrays that grow, for results that Python will own.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace dqrm {

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};

// `columns` arrays of equal capacity, one after the other, not initialised.
template <typename T>
class Columns {
 public:
  explicit Columns(size_t columns) : columns_(columns) {}

  T* column(size_t index) { return data_.get() + index * capacity_; }
  size_t columns() const { return columns_; }
  size_t capacity() const { return capacity_; }
  T* release() { return data_.release(); }

  // Makes room for `capacity` values a column and keeps the first `used`.
  void reserve(size_t capacity, size_t used) {
    if (capacity <= capacity_) return;
    if (capacity_ != 0) capacity = std::max(capacity, capacity_ + capacity_ / 2);
    std::unique_ptr<T, FreeMemory> larger(allocate(std::max<size_t>(columns_ * capacity, 1)));
    for (size_t i = 0; i < columns_ && data_ != nullptr; ++i) {
      std::memcpy(larger.get() + i * capacity, column(i), used * sizeof(T));
    }
    data_ = std::move(larger);
    capacity_ = capacity;
  }

 private:
  // First touch of fresh memory is a large part of the whole cost; 2 MiB pages make it cheap.
  static T* allocate(size_t count) {
    constexpr size_t kHugePage = size_t{2} << 20;
    const size_t bytes = count * sizeof(T);
    void* memory = nullptr;
    if (bytes >= 2 * kHugePage) {
      const size_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
      memory = std::aligned_alloc(kHugePage, rounded);
#ifdef MADV_HUGEPAGE
      if (memory != nullptr) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
    } else {
      memory = std::malloc(bytes);
    }
    if (memory == nullptr) throw std::bad_alloc();
    return static_cast<T*>(memory);
  }

  size_t columns_;
  size_t capacity_ = 0;
  std::unique_ptr<T, FreeMemory> data_;
};

}  // namespace dqrm
