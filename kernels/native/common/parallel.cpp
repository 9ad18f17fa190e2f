#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace dqrm {
namespace {

struct Job {
  PartFunction function;
  int64_t parts;
  std::atomic<int64_t> next{0};

  void run() {
    for (int64_t part = next.fetch_add(1); part < parts; part = next.fetch_add(1)) function(part);
  }
};

// A thread that sleeps until it is offered a job. An offer that was not taken up yet can be
// withdrawn, so nobody waits for a thread that is slow to wake.
class Worker {
 public:
  Worker() : thread_([this] { work(); }) { thread_.detach(); }

  void offer(Job* job) {
    job_ = job;
    state_.store(kOffered, std::memory_order_release);
    state_.notify_one();
  }

  // Returns once the worker no longer touches the job it was offered.
  void withdraw() {
    int expected = kOffered;
    if (state_.compare_exchange_strong(expected, kIdle, std::memory_order_acq_rel)) return;
    while (state_.load(std::memory_order_acquire) == kRunning) state_.wait(kRunning);
  }

 private:
  static constexpr int kIdle = 0, kOffered = 1, kRunning = 2;

  void work() {
    for (;;) {
      state_.wait(kIdle, std::memory_order_acquire);
      int expected = kOffered;
      if (!state_.compare_exchange_strong(expected, kRunning, std::memory_order_acq_rel)) continue;
      job_->run();
      state_.store(kIdle, std::memory_order_release);
      state_.notify_one();
    }
  }

  std::atomic<int> state_{kIdle};
  Job* job_ = nullptr;
  std::thread thread_;
};

struct Pool {
  std::mutex busy;
  std::vector<std::unique_ptr<Worker>> workers;
};

// Never destroyed: its threads may outlive static destructors.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    current = new Pool;
    // Threads do not survive a fork: the child starts with none and leaves the parent's memory be.
    pthread_atfork(nullptr, nullptr, [] { current = new Pool; });
  });
  return *current;
}

}  // namespace

void parallel_for(int threads, int64_t parts, PartFunction function) {
  Pool& shared = pool();
  std::unique_lock<std::mutex> lock(shared.busy, std::defer_lock);
  // Two Python threads at once: the second computes alone rather than with twice the threads.
  if (threads <= 1 || parts <= 1 || !lock.try_lock()) {
    for (int64_t part = 0; part < parts; ++part) function(part);
    return;
  }
  const size_t helpers = size_t(std::min<int64_t>(threads, parts) - 1);
  while (shared.workers.size() < helpers) shared.workers.push_back(std::make_unique<Worker>());
  Job job{function, parts};
  for (size_t i = 0; i < helpers; ++i) shared.workers[i]->offer(&job);
  job.run();
  for (size_t i = 0; i < helpers; ++i) shared.workers[i]->withdraw();
}

}  // namespace dqrm
