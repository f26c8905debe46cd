// Reserved address ranges. A forked child finds them inaccessible, and a fault inside of one can be explained.
#pragma once

#include <memory>

#include "vattention/device.h"
#include "vattention/geometry.h"
#include "vattention/process.h"

namespace vattention {

// The address range of one cache. A tensor over a region holds it too, so the addresses outlive the pages.
class Reservation {
 public:
  Reservation(std::shared_ptr<Device> device, const Geometry& geometry);
  // Gives the addresses back, except in a forked child, where they are not its own.
  ~Reservation();
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

  Address base() const noexcept { return base_; }
  const Geometry& geometry() const noexcept { return geometry_; }

 private:
  const std::shared_ptr<Device> device_;
  const Geometry geometry_;
  const Address base_;
  const Process owner_;
};

// Handles SIGSEGV and SIGBUS: the first fault inside of a host cache prints its region, slot and token to standard
// error, and every fault goes on to the previous handler. May be called more than once. Throws DeviceError.
void report_faults();

}  // namespace vattention
