// Exception types. The bindings raise the Python class of the same name, with `Error` at its end
// (vattention/errors.py).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace vattention {

// Base of all errors but wrong arguments, which are std::invalid_argument.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A call of the device failed; the message names it and has the device's own text.
struct DeviceError : Error {
  using Error::Error;
};

// The device has no physical memory or no mapping left, although the budget allowed it.
struct DeviceOutOfMemory : DeviceError {
  using DeviceError::DeviceError;
};

// Active slots need more rows than are available. Both numbers count all active slots, not only those of the call.
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

// The accounting is inconsistent: a defect of the allocator, never of its user.
struct IntegrityError : Error {
  using Error::Error;
};

}  // namespace vattention
