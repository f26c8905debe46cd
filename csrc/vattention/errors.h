// What can go wrong, as exception types. The bindings turn each into the Python class of the same name.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace vattention {

// Base of everything that is not a wrong argument.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A call of the device failed: which one, and the device's own words.
struct DeviceError : Error {
  using Error::Error;
};

// The device has no physical memory left, or no room in its tables for a mapping, although the budget had.
struct DeviceOutOfMemory : DeviceError {
  using DeviceError::DeviceError;
};

// The rows that active slots need exceed the rows there are. Both count all active slots, not only those of the call.
struct OutOfMemory : Error {
  OutOfMemory(std::uint64_t needed_rows, std::uint64_t available_rows, const std::string& why)
      : Error("active slots need " + std::to_string(needed_rows) + " rows, " + std::to_string(available_rows) +
              " are available (" + why + ")"),
        needed(needed_rows),
        available(available_rows) {}
  std::uint64_t needed, available;
};

// Every slot is in use.
struct NoFreeSlot : Error {
  using Error::Error;
};

// The cache belongs to the process that this one was forked from.
struct ForkError : Error {
  using Error::Error;
};

// The books disagree: a defect of the allocator, never of its user.
struct IntegrityError : Error {
  using Error::Error;
};

}  // namespace vattention
