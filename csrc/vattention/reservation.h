// Reserved address ranges. They are inaccessible in a forked child, and faults inside of them can be reported.
#pragma once

#include <memory>

#include "vattention/device.h"
#include "vattention/geometry.h"
#include "vattention/process.h"

namespace vattention {

// The address range of one cache. Tensors over its regions share ownership, so the addresses outlive the pages.
class Reservation {
 public:
  Reservation(std::shared_ptr<Device> device, const Geometry& geometry);
  // Releases the addresses, unless in a forked child, which does not own them.
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

// Installs handlers of SIGSEGV and SIGBUS that print region, slot and token of the first fault inside of a host cache
// to standard error and then call the previous handler. May be called more than once. Throws DeviceError.
void report_faults();

}  // namespace vattention
