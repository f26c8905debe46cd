// operator new that fails where it is told to, in every thread of the test program.
#pragma once

#include <cstdint>

namespace vattention::test {

// While it exists, allocations number `first` to `first + length - 1` throw std::bad_alloc, counted from its
// construction.
class FailingNew {
 public:
  FailingNew(std::uint64_t first, std::uint64_t length) noexcept;
  ~FailingNew();
  FailingNew(const FailingNew&) = delete;
  FailingNew& operator=(const FailingNew&) = delete;

  bool has_failed() const noexcept;
  // For what the test itself does in between.
  class Pause {
   public:
    Pause() noexcept;
    ~Pause();
    Pause(const Pause&) = delete;
    Pause& operator=(const Pause&) = delete;
  };
};

}  // namespace vattention::test
