// One thread, one pending job, one lock: the state guarded by it has one owner at a time. Knows nothing of the state.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace vattention {

class Worker {
 public:
  using Lock = std::unique_lock<std::mutex>;

  // `job` runs on the worker's thread with the lock held, once for each post(); it must not throw.
  explicit Worker(std::function<void()> job) : job_(std::move(job)), thread_([this] { run(); }) {}
  ~Worker() { stop(); }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // Ownership of the state, once no job runs or is pending.
  Lock own() {
    Lock lock(mutex_);
    wait(lock, [this] { return !pending_; });
    return lock;
  }

  // Starts the job when the lock is given up.
  void post(const Lock&) {
    pending_ = true;
    changed_.notify_all();
  }

  // Waits for a pending job, then ends the thread. Nothing may be posted afterwards.
  void stop() noexcept {
    {
      const Lock lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    if (thread_.joinable()) thread_.join();
  }

 private:
  // Bounded, so that a lost wake-up costs a delay and never a hang.
  template <typename Condition>
  void wait(Lock& lock, Condition condition) {
    while (!changed_.wait_for(lock, std::chrono::seconds(1), condition)) {
    }
  }

  void run() {
    Lock lock(mutex_);
    for (;;) {
      wait(lock, [this] { return pending_ || stopping_; });
      if (!pending_) return;
      job_();
      pending_ = false;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  bool pending_ = false, stopping_ = false;
  std::function<void()> job_;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace vattention
