// Pages of one memfd stand in for device memory, so that the allocator runs and is tested where there is no GPU.
#pragma once

#include "vattention/device.h"

namespace vattention {

// The kernel commits a page when it is first touched: create() promises address space of the file, not memory, and a
// budget larger than the machine is noticed by the kernel's out-of-memory killer, not by an exception.
class HostDevice final : public Device {
 public:
  HostDevice();
  ~HostDevice() override;
  HostDevice(const HostDevice&) = delete;
  HostDevice& operator=(const HostDevice&) = delete;

  DeviceType type() const noexcept override { return DeviceType::kHost; }
  std::int32_t index() const noexcept override { return 0; }
  std::uint64_t granularity() const noexcept override { return page_bytes_; }

  Address reserve(std::uint64_t bytes) override;
  void release(Address base, std::uint64_t bytes) noexcept override;
  Handle create(std::uint64_t bytes) override;
  void destroy(const Handle& handle) override;
  void map(Address at, const std::vector<Handle>& handles) override;
  void unmap(Address at, const Handle& handle) override;

 private:
  void map_run(Address at, std::uint64_t bytes, std::uint64_t offset);
  void cover(Address at, std::uint64_t bytes);
  void arm_spares();
  void drop_spares() noexcept;

  std::uint64_t page_bytes_;
  int file_;
  // Offsets are handed out once and never again: neighbours in creation order stay neighbours in the file, which lets
  // the kernel keep one area for a whole run of pages. A destroyed range is a hole and costs nothing.
  std::uint64_t next_offset_ = 0;
  // Areas held back for the way out: at the kernel's limit on areas even unmapping fails.
  void* spares_ = nullptr;
};

}  // namespace vattention
