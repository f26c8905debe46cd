// The extents of each slot. KVCache decides what to map, keep and reclaim.
#pragma once

#include <cstdint>
#include <vector>

#include "vattention/device.h"
#include "vattention/page_pool.h"

namespace vattention {

// Extents of a slot, side by side from row 0:
//
//   | used by the prepared length | mapped ahead, or left by a previous owner | partly mapped, if a device call failed
//   | 0                             used_extents                                whole                              size
struct Slot {
  Extents extents;
  std::size_t whole = 0;         // extents mapped in every region
  std::size_t used_extents = 0;  // extents under the prepared length; 0 while idle
  std::uint64_t rows = 0;        // rows of the whole extents
  std::uint64_t used_rows = 0;   // rows of the used extents: rows_for(tokens), or up to the end of an extent
  std::uint64_t tokens = 0;      // prepared length
  bool active = false;
  std::uint64_t freed_at = 0;  // a counter: reclaiming begins with the slot that is idle longest
  // Extents from `whole` on are mapped in regions [partial_begin, partial_end); in the first of these from
  // partial_extent on.
  std::uint64_t partial_begin = 0, partial_end = 0;
  std::size_t partial_extent = 0;
};

class SlotMap {
 public:
  SlotMap(Device& device, const Geometry& geometry, PagePool& pool, Address base)
      : device_(device), geometry_(geometry), pool_(pool), base_(base), slots_(geometry.num_slots()) {}

  std::uint64_t size() const noexcept { return slots_.size(); }
  Slot& operator[](std::uint64_t slot) noexcept { return slots_[slot]; }
  const Slot& operator[](std::uint64_t slot) const noexcept { return slots_[slot]; }

  // An extent counts once, however many slots share it.
  std::uint64_t mapped_rows() const noexcept { return mapped_rows_; }
  std::uint64_t peak_mapped_rows() const noexcept { return peak_mapped_rows_; }
  std::uint64_t used_rows() const noexcept { return used_rows_; }

  // Maps extents behind those of the slot. If the device fails, they are unmapped and returned to the pool; if
  // unmapping fails too, finish() completes it later.
  void append(std::uint64_t slot, Extents extents);
  // Unmaps the slot's extents from index `keep` on; those that no other slot holds return to the pool.
  void trim(std::uint64_t slot, std::size_t keep);
  // Completes an unmapping that a device failure interrupted.
  void finish(std::uint64_t slot);
  // Splits the slot's extent `position` after `rows` rows, in every slot that holds it. Requires Device::can_cut();
  // memory, mappings and contents stay.
  void cut(std::uint64_t slot, std::size_t position, std::uint64_t rows);

  void activate(std::uint64_t slot) noexcept { slots_[slot].active = true; }
  // Sets the prepared length, and marks the extents up to it as used.
  void use(std::uint64_t slot, std::uint64_t tokens);
  // Reduces the used extents to the first `count`, and the prepared length to `tokens`, or to as many as these extents
  // hold if the last one could not be cut.
  void shrink(std::uint64_t slot, std::size_t count, std::uint64_t tokens) noexcept;
  // Makes the slot idle; its pages stay mapped.
  void deactivate(std::uint64_t slot) noexcept;

 private:
  Address address_of(std::uint64_t region, std::uint64_t slot, std::uint64_t row) const noexcept {
    return base_ + geometry_.offset_of(region, slot, row);
  }
  struct Holder {
    std::uint64_t slot;
    std::size_t position;
  };

  std::vector<Holder> make_ready_to_cut(const Extent& extent, std::size_t num_pieces);
  void replace(const Holder& holder, const Extents& pieces) noexcept;
  void cut_handles(const Extent& extent, const Extents& pieces);
  void add(Slot& slot, Extents extents) noexcept;
  void map_regions(std::uint64_t index);
  void unmap_region(std::uint64_t index);
  void commit(Slot& slot) noexcept;
  void drop_partial(Slot& slot) noexcept;

  Device& device_;
  const Geometry& geometry_;
  PagePool& pool_;
  Address base_;
  std::vector<Slot> slots_;
  std::uint64_t mapped_rows_ = 0, peak_mapped_rows_ = 0, used_rows_ = 0, clock_ = 0;
};

}  // namespace vattention
