// The smallest number that threads reported.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>

namespace dqrm {

class First {
 public:
  void report(int64_t number) {
    int64_t known = number_.load();
    while (number < known && !number_.compare_exchange_weak(known, number)) {
    }
  }
  int64_t or_none() const { return number_ == kNone ? -1 : number_.load(); }

 private:
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> number_{kNone};
};

}  // namespace dqrm
