// One pool of threads for all native loops.
//
// It holds as many threads as a caller ever asked for, which is torch's own number, and torch's
// threads sleep while a native loop runs, so the two never compete. Waiting threads sleep as well:
// a spinning thread beside a busy core makes everything on that core wait.
#pragma once

#include <cstdint>
#include <type_traits>

namespace dqrm {

// A reference to something callable with one part's number; it must not throw.
class PartFunction {
 public:
  template <typename F>
  PartFunction(F& function)  // NOLINT: made to convert
      : object_(&function), call_([](void* object, int64_t part) {
          (*static_cast<F*>(object))(part);
        }) {
    static_assert(std::is_invocable_v<F&, int64_t>);
  }
  void operator()(int64_t part) const { call_(object_, part); }

 private:
  void* object_;
  void (*call_)(void*, int64_t);
};

// Calls function(part) once for every part in [0, parts), on the calling thread and up to
// threads - 1 others, in any order. What a part does must not depend on which thread runs it: then
// results are the same for any number of threads.
void parallel_for(int threads, int64_t parts, PartFunction function);

}  // namespace dqrm
