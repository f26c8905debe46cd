// The interface of a device with memory that can be mapped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "vattention/geometry.h"

namespace vattention {

// Physical memory. It is mapped as a whole, at any number of addresses; its contents last while it is mapped.
struct Handle {
  std::uint64_t id;
  std::uint64_t bytes;
};

// The numbers of DLPack's DLDeviceType.
enum class DeviceType : std::int32_t { kHost = 1, kCuda = 2 };

// A call that throws has changed nothing. It throws DeviceOutOfMemory if releasing memory would help, else DeviceError.
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
  // Takes one handle: a range call is no cheaper on the driver, and could fail halfway.
  virtual void unmap(Address at, const Handle& handle) = 0;
  // Splits each mapped handle into smaller ones of `sizes` bytes, in order, and returns those of each handle. Mappings
  // and contents stay. Requires can_cut().
  virtual std::vector<std::vector<Handle>> cut(const std::vector<Handle>& handles,
                                               const std::vector<std::uint64_t>& sizes) = 0;
  // Copies mapped memory after all work submitted before has finished; complete on return.
  virtual void copy(Address to, Address from, std::uint64_t bytes) = 0;
};

}  // namespace vattention
