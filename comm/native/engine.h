// Drives oneCCL for this process: operations are posted in the order in which they were submitted,
// tested until they are done, and given up at their deadline.
//
// oneCCL runs without worker threads of its own (CCL_WORKER_OFFLOAD=0): with them, two spin on
// cores that compute. It moves data only while somebody calls it. That is whoever waits for an
// operation, and one progress thread while nobody waits. One lock stands before all of oneCCL.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <oneapi/ccl.hpp>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace dqrm {

using Clock = std::chrono::steady_clock;

// What oneCCL knows a group of processes by. Once an operation failed, what the others of the group
// wrote or read is unknown: the group is dead, and all its operations fail.
struct Group {
  explicit Group(ccl::communicator&& made) : communicator(std::move(made)) {}

  ccl::communicator communicator;
  std::atomic<bool> dead{false};
  std::string reason;  // written before `dead`, under the lock
};

enum class State : int { pending, done, timed_out, failed };

// One collective. Buffers belong to the caller, who keeps them until the state is `done`, and for
// good after any other end: oneCCL may still write to them.
struct Operation {
  using Post = std::function<ccl::event(const ccl::communicator&)>;

  State current() const { return state.load(std::memory_order_acquire); }
  bool finished() const { return current() != State::pending; }

  int64_t number = 0;
  std::shared_ptr<Group> group;
  Post post;
  Clock::time_point deadline;
  std::optional<ccl::event> event;
  std::atomic<bool> watched{false};
  std::string error;  // written before `state`
  std::atomic<State> state{State::pending};
};

class Engine {
 public:
  // The one of this process. Never destroyed: its thread may outlive static destructors.
  static Engine& instance();

  // Opens the key-value store of a new group in this process; others reach it by the address.
  std::string open_address();

  // Joins a group of `size` processes that meet at `address`; several groups may meet there. Throws
  // std::runtime_error when oneCCL refuses, or is not done in time: then nothing of oneCCL works any
  // more in this process.
  //
  // A group lasts as long as the process: oneCCL's own destructor talks to the process that opened
  // the address, and aborts this one if that has ended already.
  std::shared_ptr<Group> join(const std::string& address, int size, int rank, double seconds);

  // Posts the operation, which must end within `seconds`. Call `attend` unless `wait` comes next.
  std::shared_ptr<Operation> submit(std::shared_ptr<Group> group, Operation::Post post,
                                    double seconds);

  // Lets the progress thread see to what is under way while nobody waits.
  void attend();

  // Whether the operation came to an end within `seconds`; drives all operations meanwhile.
  bool wait(Operation& operation, double seconds);

  // Reports the operation's end through `next_finished`. False when it has ended already.
  bool watch(const std::shared_ptr<Operation>& operation);

  // Numbers of watched operations that ended; waits for one. Empty after `stop`.
  std::vector<int64_t> next_finished();

  // Fails what the group has under way, and all that is submitted later.
  void fail(Group& group, const std::string& reason);

  // Ends the progress thread and `next_finished`. Operations under way stay as they are.
  void stop();

 private:
  Engine();

  void run();
  bool try_step();
  void step();
  void advance(Operation& operation, Clock::time_point now);
  void end(Operation& operation, State state, const std::string& error);
  void kill(Group& group, const std::string& reason);
  void wake();

  std::mutex lock_;  // before oneCCL and the next three
  std::vector<std::shared_ptr<Operation>> active_;
  std::map<std::string, std::shared_ptr<ccl::kvs>> stores_;
  std::vector<std::shared_ptr<Group>> groups_;

  std::mutex queue_;  // before the rest
  std::condition_variable queue_changed_;
  std::deque<std::shared_ptr<Operation>> incoming_;
  std::deque<int64_t> ended_;
  std::condition_variable ended_changed_;
  int64_t submitted_ = 0;
  std::atomic<int64_t> outstanding_{0};
  std::atomic<int> drivers_{0};
  bool stopped_ = false;
  std::atomic<bool> stuck_{false};
  std::atomic<bool> forked_{false};
  std::thread thread_;

  friend class Driving;
};

}  // namespace dqrm
