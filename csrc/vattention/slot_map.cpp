#include "vattention/slot_map.h"

#include <algorithm>
#include <utility>

#include "vattention/errors.h"

namespace vattention {

void SlotMap::append(std::uint64_t index, Extents extents) {
  Slot& slot = slots_[index];
  try {
    finish(index);
    reserve_more(slot.extents, extents.size());
  } catch (...) {
    for (ExtentPtr& extent : extents) {
      if (extent->mappings == 0) pool_.put(std::move(extent));
    }
    throw;
  }
  add(slot, std::move(extents));
  try {
    map_regions(index);
  } catch (...) {
    try {
      finish(index);
    } catch (...) {  // tried again later; the first failure is reported
    }
    throw;
  }
  commit(slot);
}

void SlotMap::trim(std::uint64_t index, std::size_t keep) {
  finish(index);
  Slot& slot = slots_[index];
  if (keep >= slot.whole) return;
  for (std::size_t i = keep; i < slot.whole; ++i) slot.rows -= slot.extents[i]->rows;
  slot.whole = keep;
  slot.partial_begin = 0;
  slot.partial_end = geometry_.num_regions();
  slot.partial_extent = keep;
  finish(index);
}

void SlotMap::finish(std::uint64_t index) {
  Slot& slot = slots_[index];
  if (slot.extents.size() == slot.whole) return;
  for (; slot.partial_begin < slot.partial_end; ++slot.partial_begin) {
    unmap_region(index);
    slot.partial_extent = slot.whole;
  }
  drop_partial(slot);
}

void SlotMap::cut(std::uint64_t index, std::size_t position, std::uint64_t rows) {
  for (std::uint64_t s = 0; s < slots_.size(); ++s) finish(s);  // a partly mapped extent cannot be cut
  const ExtentPtr whole = slots_[index].extents[position];
  const Extents pieces = pool_.plan_pieces(rows, whole->rows - rows);
  for (const ExtentPtr& piece : pieces) {
    piece->mappings = whole->mappings;
    piece->users = whole->users;
  }
  const std::vector<Holder> holders = make_ready_to_cut(*whole, pieces.size());
  cut_handles(*whole, pieces);
  for (const Holder& holder : holders) replace(holder, pieces);
  pool_.replace(*whole, pieces);
}

// Finds every slot that holds the extent and reserves space for its pieces.
std::vector<SlotMap::Holder> SlotMap::make_ready_to_cut(const Extent& extent, std::size_t num_pieces) {
  std::vector<Holder> holders;
  for (std::uint64_t s = 0; s < slots_.size() && holders.size() < extent.mappings; ++s) {
    const Extents& extents = slots_[s].extents;
    const auto same = [&extent](const ExtentPtr& other) { return other.get() == &extent; };
    const auto found = std::find_if(extents.begin(), extents.end(), same);
    if (found == extents.end()) continue;
    holders.push_back({s, static_cast<std::size_t>(found - extents.begin())});
  }
  for (const Holder& holder : holders) reserve_more(slots_[holder.slot].extents, num_pieces);
  return holders;
}

void SlotMap::replace(const Holder& holder, const Extents& pieces) noexcept {
  Slot& slot = slots_[holder.slot];
  const auto at = slot.extents.begin() + static_cast<std::ptrdiff_t>(holder.position);
  *at = pieces.front();
  slot.extents.insert(at + 1, pieces.begin() + 1, pieces.end());
  slot.whole += pieces.size() - 1;
  if (holder.position < slot.used_extents) slot.used_extents += pieces.size() - 1;
}

void SlotMap::cut_handles(const Extent& extent, const Extents& pieces) {
  std::vector<std::uint64_t> sizes;
  for (const ExtentPtr& piece : pieces) sizes.push_back(piece->rows * geometry_.page_bytes());
  for (const std::vector<Handle>& handles : device_.cut(extent.handles, sizes)) {
    for (std::size_t i = 0; i < pieces.size(); ++i) pieces[i]->handles.push_back(handles[i]);
  }
}

void SlotMap::use(std::uint64_t index, std::uint64_t tokens) {
  Slot& slot = slots_[index];
  const std::uint64_t rows = geometry_.rows_for(tokens);
  for (; slot.used_rows < rows; ++slot.used_extents) {
    Extent& extent = *slot.extents[slot.used_extents];
    slot.used_rows += extent.rows;
    if (extent.users++ == 0) used_rows_ += extent.rows;
  }
  slot.tokens = tokens;
}

void SlotMap::shrink(std::uint64_t index, std::size_t count, std::uint64_t tokens) noexcept {
  Slot& slot = slots_[index];
  while (slot.used_extents > count) {
    Extent& extent = *slot.extents[--slot.used_extents];
    slot.used_rows -= extent.rows;
    if (--extent.users == 0) used_rows_ -= extent.rows;
  }
  const bool is_exact = slot.used_rows == geometry_.rows_for(tokens);
  const std::uint64_t room = slot.used_rows * geometry_.page_bytes() / geometry_.token_bytes();
  slot.tokens = is_exact ? tokens : std::min(slot.tokens, room);
}

void SlotMap::deactivate(std::uint64_t index) noexcept {
  shrink(index, 0, 0);
  slots_[index].active = false;
  slots_[index].freed_at = ++clock_;
}

void SlotMap::add(Slot& slot, Extents extents) noexcept {
  for (ExtentPtr& extent : extents) {
    if (extent->mappings++ == 0) mapped_rows_ += extent->rows;
    slot.extents.push_back(std::move(extent));
  }
  slot.partial_begin = slot.partial_end = 0;
  slot.partial_extent = slot.whole;
}

void SlotMap::map_regions(std::uint64_t index) {
  Slot& slot = slots_[index];
  std::vector<Handle> handles(slot.extents.size() - slot.whole);
  for (std::uint64_t region = 0; region < geometry_.num_regions(); ++region) {
    for (std::size_t i = 0; i < handles.size(); ++i) handles[i] = slot.extents[slot.whole + i]->handles[region];
    device_.map(address_of(region, index, slot.rows), handles);
    slot.partial_end = region + 1;
  }
}

void SlotMap::unmap_region(std::uint64_t index) {
  Slot& slot = slots_[index];
  std::uint64_t row = slot.rows;
  for (std::size_t i = slot.whole; i < slot.partial_extent; ++i) row += slot.extents[i]->rows;
  for (; slot.partial_extent < slot.extents.size(); ++slot.partial_extent) {
    const Extent& extent = *slot.extents[slot.partial_extent];
    device_.unmap(address_of(slot.partial_begin, index, row), extent.handles[slot.partial_begin]);
    row += extent.rows;
  }
}

void SlotMap::commit(Slot& slot) noexcept {
  for (; slot.whole < slot.extents.size(); ++slot.whole) slot.rows += slot.extents[slot.whole]->rows;
  slot.partial_begin = slot.partial_end = 0;
  peak_mapped_rows_ = std::max(peak_mapped_rows_, mapped_rows_);
}

void SlotMap::drop_partial(Slot& slot) noexcept {
  while (slot.extents.size() > slot.whole) {
    ExtentPtr extent = std::move(slot.extents.back());
    slot.extents.pop_back();
    if (--extent->mappings > 0) continue;
    mapped_rows_ -= extent->rows;
    pool_.put(std::move(extent));
  }
}

}  // namespace vattention
