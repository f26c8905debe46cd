// The seam between the allocator and memory: everything a device must be able to do. Knows nothing of rows or slots.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "vattention/geometry.h"

namespace vattention {

// Physical memory, mapped as a whole, at any number of addresses at once. What is in it lasts while it is mapped.
struct Handle {
  std::uint64_t id;
  std::uint64_t bytes;
};

// The numbers of DLPack's DLDeviceType.
enum class DeviceType : std::int32_t { kHost = 1, kCuda = 2 };

// Calls throw DeviceError, DeviceOutOfMemory where less in use would help, and then have changed nothing. Sizes and
// addresses are multiples of granularity().
class Device {
 public:
  virtual ~Device() = default;

  virtual DeviceType type() const noexcept = 0;
  virtual std::int32_t index() const noexcept = 0;
  virtual std::uint64_t granularity() const noexcept = 0;

  virtual Address reserve(std::uint64_t bytes) = 0;
  virtual void release(Address base, std::uint64_t bytes) noexcept = 0;
  virtual Handle create(std::uint64_t bytes) = 0;
  virtual void destroy(const Handle& handle) = 0;
  // Maps the handles one behind the other from `at`, readable and writable.
  virtual void map(Address at, const std::vector<Handle>& handles) = 0;
  // One handle at a time, so that a failure never leaves half of a call done.
  virtual void unmap(Address at, const Handle& handle) = 0;
};

}  // namespace vattention
