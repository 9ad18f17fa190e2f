#include "engine.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <future>
#include <stdexcept>
#include <utility>

namespace dqrm {
namespace {

using std::chrono::microseconds;

// How long others go on after an operation's deadline before a waiter stops counting on them: the
// thread that holds the lock may hang inside oneCCL.
constexpr auto kOverdue = std::chrono::seconds(1);

Clock::duration from_seconds(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

std::string in_seconds(double seconds) {
  const std::string text = std::to_string(seconds);
  return text.substr(0, text.find('.') + 2) + " s";
}

// Between two looks at operations: at first none, so that small messages are fast; then others get
// the core; in the end a sleep that grows with the wait, which so costs about a percent of a core.
class Backoff {
 public:
  void pause() {
    if (++looks_ <= kEager) return;
    const auto waited = Clock::now() - start_;
    if (waited < kYielding) {
      sched_yield();
      return;
    }
    const auto share = std::chrono::duration_cast<microseconds>(waited / 16);
    std::this_thread::sleep_for(std::clamp(share, microseconds(20), microseconds(1000)));
  }

 private:
  static constexpr int kEager = 16;
  static constexpr microseconds kYielding{200};

  int looks_ = 0;
  Clock::time_point start_ = Clock::now();
};

}  // namespace

// While one lives, its thread drives and the progress thread sleeps.
class Driving {
 public:
  explicit Driving(Engine& engine) : engine_(engine) { ++engine_.drivers_; }
  ~Driving() {
    if (--engine_.drivers_ == 0 && engine_.outstanding_ > 0) engine_.wake();
  }
  Driving(const Driving&) = delete;
  Driving& operator=(const Driving&) = delete;

 private:
  Engine& engine_;
};

Engine::Engine() {
  // Threads and connections do not survive a fork: in the child every call is refused.
  pthread_atfork(nullptr, nullptr, [] { instance().forked_ = true; });
}

Engine& Engine::instance() {
  static Engine* const engine = new Engine;
  return *engine;
}

std::string Engine::open_address() {
  const std::lock_guard<std::mutex> guard(lock_);
  const std::shared_ptr<ccl::kvs> store = ccl::create_main_kvs();
  const ccl::kvs::address_type address = store->get_address();
  const std::string text(address.begin(), address.end());
  stores_[text] = store;
  return text;
}

std::shared_ptr<Group> Engine::join(const std::string& address, int size, int rank,
                                    double seconds) {
  if (forked_) throw std::runtime_error("this process was forked from one that uses oneCCL");
  if (stuck_) throw std::runtime_error("oneCCL hung in this process while making another group");
  // On a thread of its own, which is left behind if it hangs: oneCCL has no deadline here.
  std::packaged_task<std::shared_ptr<Group>()> task([this, address, size, rank] {
    const std::lock_guard<std::mutex> guard(lock_);
    std::shared_ptr<ccl::kvs>& store = stores_[address];
    if (!store) {
      ccl::kvs::address_type raw{};
      std::copy_n(address.begin(), std::min(address.size(), raw.size()), raw.begin());
      store = ccl::create_kvs(raw);
    }
    groups_.push_back(std::make_shared<Group>(ccl::create_communicator(size, rank, store)));
    return groups_.back();
  });
  std::future<std::shared_ptr<Group>> made = task.get_future();
  std::thread(std::move(task)).detach();
  if (made.wait_for(from_seconds(seconds)) != std::future_status::ready) {
    stuck_ = true;
    throw std::runtime_error("oneCCL did not connect the group within " + in_seconds(seconds));
  }
  return made.get();
}

std::shared_ptr<Operation> Engine::submit(std::shared_ptr<Group> group, Operation::Post post,
                                          double seconds) {
  if (forked_) throw std::runtime_error("this process was forked from one that uses oneCCL");
  auto operation = std::make_shared<Operation>();
  operation->group = std::move(group);
  operation->post = std::move(post);
  operation->deadline = Clock::now() + from_seconds(seconds);
  {
    const std::lock_guard<std::mutex> guard(queue_);
    operation->number = ++submitted_;
    incoming_.push_back(operation);
    ++outstanding_;
    if (!thread_.joinable() && !stopped_) thread_ = std::thread([this] { run(); });
  }
  try_step();
  return operation;
}

void Engine::attend() {
  if (outstanding_ > 0 && drivers_ == 0) wake();
}

bool Engine::wait(Operation& operation, double seconds) {
  if (forked_) throw std::runtime_error("this process was forked from one that uses oneCCL");
  const Driving driving(*this);
  const Clock::time_point until = Clock::now() + from_seconds(seconds);
  Backoff backoff;
  while (!operation.finished()) {
    try_step();
    if (operation.finished()) break;
    const Clock::time_point now = Clock::now();
    if (now > operation.deadline + kOverdue) {
      end(operation, State::timed_out, "oneCCL hangs in another thread");
      operation.group->dead = true;
    }
    if (now > until) break;
    backoff.pause();
  }
  return operation.finished();
}

bool Engine::watch(const std::shared_ptr<Operation>& operation) {
  const std::lock_guard<std::mutex> guard(queue_);
  operation->watched = true;
  return !operation->finished();
}

std::vector<int64_t> Engine::next_finished() {
  std::unique_lock<std::mutex> guard(queue_);
  ended_changed_.wait(guard, [this] { return stopped_ || !ended_.empty(); });
  const std::vector<int64_t> numbers(ended_.begin(), ended_.end());
  ended_.clear();
  return numbers;
}

void Engine::fail(Group& group, const std::string& reason) {
  const std::lock_guard<std::mutex> guard(lock_);
  kill(group, reason);
  step();
}

void Engine::stop() {
  if (forked_) return;
  {
    const std::lock_guard<std::mutex> guard(queue_);
    stopped_ = true;
  }
  queue_changed_.notify_all();
  ended_changed_.notify_all();
  if (!thread_.joinable()) return;
  // It may hang inside oneCCL, which must not keep the process from ending.
  if (stuck_) {
    thread_.detach();
  } else {
    thread_.join();
  }
}

void Engine::wake() {
  // Taken and released, so that the thread is not between looking and falling asleep.
  { const std::lock_guard<std::mutex> guard(queue_); }
  queue_changed_.notify_one();
}

void Engine::run() {
  for (;;) {
    {
      std::unique_lock<std::mutex> guard(queue_);
      queue_changed_.wait(guard, [this] {
        return stopped_ || (outstanding_ > 0 && drivers_ == 0);
      });
      if (stopped_) return;
    }
    Backoff backoff;
    int64_t before = outstanding_;
    while (outstanding_ > 0 && drivers_ == 0) {
      try_step();
      if (before != outstanding_) {
        before = outstanding_;
        backoff = Backoff();
      }
      backoff.pause();
      const std::lock_guard<std::mutex> guard(queue_);
      if (stopped_) return;
    }
  }
}

bool Engine::try_step() {
  const std::unique_lock<std::mutex> guard(lock_, std::try_to_lock);
  if (!guard) return false;
  step();
  return true;
}

void Engine::step() {
  {
    const std::lock_guard<std::mutex> guard(queue_);
    active_.insert(active_.end(), incoming_.begin(), incoming_.end());
    incoming_.clear();
  }
  const Clock::time_point now = Clock::now();
  for (const auto& operation : active_) advance(*operation, now);
  // A group that died in this pass takes along what was looked at before.
  for (const auto& operation : active_) {
    if (operation->group->dead) end(*operation, State::failed, operation->group->reason);
  }
  std::erase_if(active_, [](const auto& operation) {
    if (!operation->finished()) return false;
    // What did not end well is still known to oneCCL: its event is never destroyed.
    if (operation->event && operation->current() != State::done) {
      new ccl::event(std::move(*operation->event));
    }
    operation->event.reset();
    operation->post = nullptr;
    return true;
  });
}

void Engine::advance(Operation& operation, Clock::time_point now) {
  Group& group = *operation.group;
  if (group.dead || operation.finished()) return;
  try {
    if (!operation.event) operation.event = operation.post(group.communicator);
    if (operation.event->test()) {
      end(operation, State::done, "");
    } else if (now > operation.deadline) {
      end(operation, State::timed_out, "not finished at its deadline");
      kill(group, "an earlier operation of the group timed out");
    }
  } catch (const std::exception& error) {
    end(operation, State::failed, error.what());
    kill(group, error.what());
  }
}

void Engine::end(Operation& operation, State state, const std::string& error) {
  {
    const std::lock_guard<std::mutex> guard(queue_);
    if (operation.finished()) return;
    operation.error = error;
    operation.state.store(state, std::memory_order_release);
    --outstanding_;
    if (!operation.watched) return;
    ended_.push_back(operation.number);
  }
  ended_changed_.notify_one();
}

void Engine::kill(Group& group, const std::string& reason) {
  if (group.dead) return;
  group.reason = reason;
  group.dead = true;
}

}  // namespace dqrm
