// Which process an object belongs to. A forked child inherits objects whose threads, GPU context and shared pages
// belong to its parent.
#pragma once

#include <cstdint>

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

}  // namespace vattention
