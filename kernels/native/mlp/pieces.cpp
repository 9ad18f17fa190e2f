#include "pieces.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace dqrm {

char* allocate_lines(int64_t bytes) {
  void* memory = std::aligned_alloc(kLineBytes, size_t(ceil_div(bytes, kLineBytes) * kLineBytes));
  if (memory == nullptr) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

char* scratch(int64_t bytes) {
  thread_local std::unique_ptr<char, void (*)(void*)> memory(nullptr, std::free);
  thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset(allocate_lines(bytes));
    size = bytes;
  }
  return memory.get();
}

}  // namespace dqrm
