// Which process an object belongs to. A forked child inherits objects whose threads, GPU context and shared pages
// belong to its parent.
#pragma once

#include <cstdint>
#include <mutex>

namespace vattention {

// Remembers the process that constructed it.
class Process {
 public:
  Process();
  // False in a child that was forked after the construction.
  bool is_current() const noexcept;

 private:
  std::uint64_t forks_ = 0;
};

// While it lives, a fork waits for the mutex. So the child finds what the mutex guards complete, although it has no
// thread that would finish a change, and can destroy it.
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
