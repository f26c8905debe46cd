// A thread with at most one pending job, and the lock of the state that job and callers share.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "vattention/errors.h"
#include "vattention/process.h"

namespace vattention {

class Worker {
 public:
  using Lock = std::unique_lock<std::mutex>;

  // `job` runs on the worker's thread with the lock held, once for each post(); it must not throw.
  explicit Worker(std::function<void()> job) : shared_(std::make_unique<Shared>()), job_(std::move(job)) {
    thread_ = std::make_unique<std::thread>([this] { run(); });
  }
  ~Worker() { stop(); }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // False in a forked child, which has the state but not the thread.
  bool is_here() const noexcept { return process_.is_current(); }

  // Waits until no job runs or is pending and returns the lock. Throws ForkError in a forked child.
  Lock own() {
    if (!is_here()) {
      throw ForkError(
          "this cache belongs to the process that created it, and this one was forked from it: create the "
          "cache after the fork, or start the process with the 'spawn' method");
    }
    Lock lock(shared_->mutex);
    wait(lock, [this] { return !shared_->pending; });
    return lock;
  }

  // Starts the job when the lock is released.
  void post(const Lock&) {
    shared_->pending = true;
    shared_->changed.notify_all();
  }

  // Waits for a pending job, then ends the thread. Nothing may be posted afterwards.
  void stop() noexcept {
    if (!is_here()) return abandon();
    {
      const Lock lock(shared_->mutex);
      shared_->stopping = true;
    }
    shared_->changed.notify_all();
    if (thread_->joinable()) thread_->join();
  }

 private:
  struct Shared {
    std::mutex mutex;
    const ForkGuard guard{mutex};
    std::condition_variable changed;
    bool pending = false, stopping = false;
  };

  // A forked child has no such thread, and destroying the condition variable would wait for it: both are leaked.
  void abandon() noexcept {
    shared_.release();
    thread_.release();
  }

  // Bounded, so that a lost wake-up costs a delay and never a hang.
  template <typename Condition>
  void wait(Lock& lock, Condition condition) {
    while (!shared_->changed.wait_for(lock, std::chrono::seconds(1), condition)) {
    }
  }

  void run() {
    Lock lock(shared_->mutex);
    for (;;) {
      wait(lock, [this] { return shared_->pending || shared_->stopping; });
      if (!shared_->pending) return;
      job_();
      shared_->pending = false;
      shared_->changed.notify_all();
    }
  }

  const Process process_;
  std::unique_ptr<Shared> shared_;
  std::function<void()> job_;
  std::unique_ptr<std::thread> thread_;  // last: it uses all of the above
};

}  // namespace vattention
