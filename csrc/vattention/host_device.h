// Pages of one memfd stand in for device memory, so that the allocator runs and is tested where there is no GPU.
#pragma once

#include <map>
#include <unordered_map>

#include "vattention/device.h"

namespace vattention {

// The kernel commits a page when it is first touched: create() promises memory and takes none, and a budget larger than
// the machine is noticed by the kernel's out-of-memory killer, not by an exception.
//
// A process may have few areas (vm.max_map_count, 65,530 by default), and the kernel keeps one for a whole run of pages
// if they are neighbours in the file too. So a page's place in the file is the address where it is mapped:
//
//   memory  | slot 0: r0 r1 r2 ..hidden.. | slot 1: r0 r1 ..hidden.. |
//   file    |         r0 r1 r2    hole    |         r0 r1    hole    |
//            ^ one area    ^ one area      ^ one area  ^ one area
//
// However its pages were created, taken and given back, a slot is two areas in each region.
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
  // A mapped handle's bytes in the file, at `mappings` addresses.
  struct Place {
    std::uint64_t offset;
    std::uint64_t mappings;
  };

  std::uint64_t enter(Address at, const Handle& handle);
  void leave(Address at, const Handle& handle);
  bool has_room(std::uint64_t offset, std::uint64_t bytes) const noexcept;
  void punch(std::uint64_t offset, std::uint64_t bytes);
  void map_places(Address at, const std::vector<Handle>& handles, const std::vector<std::uint64_t>& offsets);
  void map_run(Address at, std::uint64_t bytes, std::uint64_t offset);
  void cover(Address at, std::uint64_t bytes);
  void count_areas();

  std::uint64_t page_bytes_;
  int file_;
  std::uint64_t next_id_ = 0;
  std::unordered_map<std::uint64_t, Place> places_;  // by the handle's id
  // Offset and end of what is mapped elsewhere only: whoever is mapped at that address next gets another place.
  std::map<std::uint64_t, std::uint64_t> strays_;
  std::uint64_t next_elsewhere_;
  std::uint64_t areas_left_ = 0;  // that may surely be added before the process's areas have to be counted again
};

}  // namespace vattention
