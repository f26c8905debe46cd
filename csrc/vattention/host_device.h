// Pages of one memfd stand in for device memory, so that the allocator runs and is tested where there is no GPU.
#pragma once

#include <map>
#include <unordered_map>

#include "vattention/device.h"

namespace vattention {

// A file descriptor that closes itself.
class File {
 public:
  explicit File(int descriptor) noexcept : descriptor_(descriptor) {}
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int get() const noexcept { return descriptor_; }

 private:
  int descriptor_;
};

// Keeps the process below vm.max_map_count mapped areas (lines of /proc/self/maps; 65,530 by default). Its files stay
// open, so that it works in a process without free descriptors. Without /proc there is no limit.
class AreaBudget {
 public:
  AreaBudget();
  // Throws DeviceOutOfMemory if a map call might exceed the limit.
  void take();
  // Unmapping may split an area too, and is never refused.
  void count_unmap() noexcept;

 private:
  void count();

  File limit_, maps_;
  std::uint64_t left_ = 0;  // areas that may be added before the next count
};

// The kernel commits a page when it is first touched: create() takes no memory, and a budget larger than the machine
// ends in the kernel's out-of-memory killer, not in an exception.
//
// The kernel merges adjacent pages into one area if they are adjacent in the file too. So a page's offset in the file
// is the address where it is mapped first:
//
//   memory  | slot 0: r0 r1 r2 ..hidden.. | slot 1: r0 r1 ..hidden.. |
//   file    |         r0 r1 r2    hole    |         r0 r1    hole    |
//            ^ one area    ^ one area      ^ one area  ^ one area
//
// In whatever order its pages come and go, a slot is two areas in each region.
class HostDevice final : public Device {
 public:
  HostDevice();

  DeviceType type() const noexcept override { return DeviceType::kHost; }
  std::int32_t index() const noexcept override { return 0; }
  std::uint64_t granularity() const noexcept override { return page_bytes_; }
  bool can_cut() const noexcept override { return true; }

  Address reserve(std::uint64_t bytes) override;
  void release(Address base, std::uint64_t bytes) noexcept override;
  Handle create(std::uint64_t bytes) override;
  void destroy(const Handle& handle) override;
  void map(Address at, const std::vector<Handle>& handles) override;
  void unmap(Address at, const Handle& handle) override;
  std::vector<std::vector<Handle>> cut(const std::vector<Handle>& handles,
                                       const std::vector<std::uint64_t>& sizes) override;
  void copy(Address to, Address from, std::uint64_t bytes) override;

 private:
  // Where the bytes of a mapped handle are in the file, and at how many addresses they are mapped.
  struct Place {
    std::uint64_t offset;
    std::uint64_t mappings;
  };

  std::uint64_t add_mapping(Address at, const Handle& handle);
  void remove_mapping(const Handle& handle) noexcept;
  void add_pieces(const Handle& handle, const std::vector<Handle>& pieces);
  void remove_pieces(const std::vector<Handle>& pieces) noexcept;
  bool has_room(std::uint64_t offset, std::uint64_t bytes) const noexcept;
  void punch(std::uint64_t offset, std::uint64_t bytes);
  void map_places(Address at, const std::vector<Handle>& handles, const std::vector<std::uint64_t>& offsets);
  void map_run(Address at, std::uint64_t bytes, std::uint64_t offset);
  void hide(Address at, std::uint64_t bytes);

  const std::uint64_t page_bytes_;
  const File file_;
  AreaBudget areas_;
  std::uint64_t next_id_ = 0;
  std::unordered_map<std::uint64_t, Place> places_;  // by the handle's id
  // Begin and end of file ranges whose handle is no longer mapped at the address of its offset. A handle that is mapped
  // there next gets an offset past every address.
  std::map<std::uint64_t, std::uint64_t> occupied_;
  std::uint64_t next_overflow_;
};

}  // namespace vattention
