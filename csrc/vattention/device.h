// The interface between the allocator and memory: what a device must be able to do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "vattention/geometry.h"

namespace vattention {

// Physical memory, mapped as a whole, at any number of addresses at once. Its contents last while it is mapped.
struct Handle {
  std::uint64_t id;
  std::uint64_t bytes;
};

// The numbers of DLPack's DLDeviceType.
enum class DeviceType : std::int32_t { kHost = 1, kCuda = 2 };

// A call that throws has changed nothing. It throws DeviceError, or DeviceOutOfMemory if less memory in use would help.
// Sizes and addresses are multiples of granularity().
class Device {
 public:
  virtual ~Device() = default;

  virtual DeviceType type() const noexcept = 0;
  virtual std::int32_t index() const noexcept = 0;
  virtual std::uint64_t granularity() const noexcept = 0;
  virtual bool can_cut() const noexcept = 0;

  virtual Address reserve(std::uint64_t bytes) = 0;
  virtual void release(Address base, std::uint64_t bytes) noexcept = 0;
  virtual Handle create(std::uint64_t bytes) = 0;
  virtual void destroy(const Handle& handle) = 0;
  // Maps the handles one after another from `at`, readable and writable.
  virtual void map(Address at, const std::vector<Handle>& handles) = 0;
  // One handle at a time: a range call is no cheaper on the driver, and this one never leaves half of a call done.
  virtual void unmap(Address at, const Handle& handle) = 0;
  // Replaces each mapped handle by smaller ones of `sizes` bytes, which stand one after another wherever it stood, and
  // returns those of each handle. Mappings and contents stay. Only where can_cut().
  virtual std::vector<std::vector<Handle>> cut(const std::vector<Handle>& handles,
                                               const std::vector<std::uint64_t>& sizes) = 0;
  // Copies mapped memory after all work that was submitted before; complete on return.
  virtual void copy(Address to, Address from, std::uint64_t bytes) = 0;
};

}  // namespace vattention
