// Which extents stand at which slot, in what order and in how many regions. What to map, keep or take back is decided
// by the cache.
#pragma once

#include <cstdint>
#include <vector>

#include "vattention/device.h"
#include "vattention/page_pool.h"

namespace vattention {

// Extents of a slot, side by side from row 0:
//
//   | used by the prepared length | mapped ahead, or left by an earlier owner | half mapped, if a device call failed |
//   0                             used_extents                                whole size
struct Slot {
  Extents extents;
  std::size_t whole = 0;         // extents mapped in every region
  std::size_t used_extents = 0;  // extents under the prepared length; 0 while idle
  std::uint64_t rows = 0;        // rows of the whole extents
  std::uint64_t used_rows = 0;   // rows of the used extents: rows_for(tokens), or up to the end of an extent
  std::uint64_t tokens = 0;      // prepared length
  bool active = false;
  std::uint64_t freed_at = 0;  // a counter, for taking from the longest idle first
  // Extents from `whole` on are mapped in regions [half_begin, half_end), in the first of these from half_extent on.
  std::uint64_t half_begin = 0, half_end = 0;
  std::size_t half_extent = 0;
};

class SlotMap {
 public:
  SlotMap(Device& device, const Geometry& geometry, PagePool& pool, Address base)
      : device_(device), geometry_(geometry), pool_(pool), base_(base), slots_(geometry.num_slots()) {}

  std::uint64_t size() const noexcept { return slots_.size(); }
  Slot& operator[](std::uint64_t slot) noexcept { return slots_[slot]; }
  const Slot& operator[](std::uint64_t slot) const noexcept { return slots_[slot]; }

  // Each extent counts once, at however many slots it stands.
  std::uint64_t mapped_rows() const noexcept { return mapped_rows_; }
  std::uint64_t peak_mapped_rows() const noexcept { return peak_mapped_rows_; }
  std::uint64_t used_rows() const noexcept { return used_rows_; }

  // Maps extents behind those of the slot. If the device fails nothing of them stays mapped and they are back in the
  // pool; if even undoing fails, finish() completes it later.
  void append(std::uint64_t slot, Extents extents);
  // Unmaps the slot's extents from index `keep` on; those that stand nowhere else return to the pool.
  void trim(std::uint64_t slot, std::size_t keep);
  // Completes an unmapping that a device failure interrupted.
  void finish(std::uint64_t slot);
  // Replaces the slot's extent `position` by smaller ones, so that one ends `rows` rows into it, at every slot that
  // holds it. Needs Device::can_cut(); memory, mappings and contents stay.
  void cut(std::uint64_t slot, std::size_t position, std::uint64_t rows);

  void activate(std::uint64_t slot) noexcept { slots_[slot].active = true; }
  // The prepared length is `tokens` from here on, and the extents up to there are used.
  void use(std::uint64_t slot, std::uint64_t tokens);
  // Only the first `count` extents are used from here on, for `tokens` tokens or, where the device could not cut the
  // last extent at their end, for as many as it has room for.
  void shrink(std::uint64_t slot, std::size_t count, std::uint64_t tokens) noexcept;
  // The slot is idle from here on; everything stays mapped.
  void retire(std::uint64_t slot) noexcept;

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
  void adopt(Slot& slot, Extents extents) noexcept;
  void map_regions(std::uint64_t index);
  void unmap_region(std::uint64_t index);
  void settle(Slot& slot) noexcept;
  void drop_half(Slot& slot) noexcept;

  Device& device_;
  const Geometry& geometry_;
  PagePool& pool_;
  Address base_;
  std::vector<Slot> slots_;
  std::uint64_t mapped_rows_ = 0, peak_mapped_rows_ = 0, used_rows_ = 0, clock_ = 0;
};

}  // namespace vattention
