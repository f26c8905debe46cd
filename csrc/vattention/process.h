// Detects use of an object in a forked child, where its threads, GPU context and shared pages belong to the parent.
#pragma once

#include <cstdint>
#include <mutex>

namespace vattention {

// The process in which it was constructed.
class Process {
 public:
  Process();
  // False in a child that was forked after the construction.
  bool is_current() const noexcept;

 private:
  std::uint64_t forks_ = 0;
};

// While it exists, fork() first locks the mutex. So the child finds the state that the mutex guards consistent,
// although it lacks the thread that may have been changing it, and can destroy it.
class ForkGuard {
 public:
  explicit ForkGuard(std::mutex& mutex);
  ~ForkGuard();
  ForkGuard(const ForkGuard&) = delete;
  ForkGuard& operator=(const ForkGuard&) = delete;

 private:
  std::mutex& mutex_;
};

}  // namespace vattention
