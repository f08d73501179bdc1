// The threads of a sweep, which hand out the parts of its loops among themselves.
//
// OpenMP's own loops end in a barrier at which threads spin for milliseconds, so that a neighbour who keeps one
// processor busy stopped all of them at each of a sweep's hundreds of loops. Here a sweep is one parallel region.
// The thread that called runs the launches; the others help with whatever loop it is in. A part goes to the thread
// that is free first, so that one which the system holds back delays the loop by one part at most; who waits spins
// for SPIN, then sleeps.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

class Team {
 public:
  explicit Team(int threads) : threads_(threads) {}

  // Calls body(i) for every i from 0 to count - 1, on all threads of the team. For the thread that runs the sweep
  // alone; a body must not call it again.
  template <class Body>
  void each(int64_t count, const Body& body) {
    if (threads_ == 1 || count == 1) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    body_ = &body;
    call_ = [](const void* body, int64_t i) { (*static_cast<const Body*>(body))(i); };
    count_ = count, left_ = count;
    parts_ = count;
    wake(asleep_);
    while (take_part()) {
    }
    wait(caller_asleep_, [&] { return left_ == 0; });
  }

  // What the other threads do until `end`
  void help() {
    while (!ended_) {
      while (take_part()) {
      }
      wait(asleep_, [&] { return parts_ > 0 || ended_; });
    }
  }

  void end() {
    ended_ = true;
    wake(asleep_);
  }

 private:
  static constexpr std::chrono::microseconds SPIN{50};

  // Computes one part, if there is one.
  bool take_part() {
    int64_t parts = parts_;
    do {
      if (parts == 0) return false;
    } while (!parts_.compare_exchange_weak(parts, parts - 1));
    // The loop does not end before this part is computed: till then body_, call_ and count_ are its own.
    call_(body_, count_ - parts);
    if (--left_ == 0) wake(caller_asleep_);
    return true;
  }

  template <class Condition>
  void wait(std::atomic<int>& asleep, const Condition& done) {
    auto until = std::chrono::steady_clock::now() + SPIN;
    while (!done())
      if (std::chrono::steady_clock::now() > until) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++asleep;
        changed_.wait(lock, done);
        --asleep;
        return;
      }
  }

  // Who falls asleep says so before it looks at the condition for the last time, under the lock: either it sees
  // what has changed, or it is seen here.
  void wake(const std::atomic<int>& asleep) {
    if (asleep == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
  }

  const int threads_;
  std::atomic<int64_t> parts_{0};  // of the loop, those that nobody has taken yet
  std::atomic<int64_t> left_{0};   // those that are not computed yet
  std::atomic<bool> ended_{false};
  std::atomic<int> asleep_{0}, caller_asleep_{0};
  const void* body_ = nullptr;
  void (*call_)(const void* body, int64_t i) = nullptr;
  int64_t count_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
};
