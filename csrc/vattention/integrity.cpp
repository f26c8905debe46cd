#include "vattention/integrity.h"

#include <string>
#include <unordered_map>
#include <unordered_set>

#include "vattention/errors.h"

namespace vattention {
namespace {

struct Seen {
  std::uint32_t mappings = 0, users = 0;
};
using Census = std::unordered_map<const Extent*, Seen>;

void require(bool holds, const std::string& what) {
  if (!holds) throw IntegrityError("integrity: " + what);
}

void require_equal(std::uint64_t actual, std::uint64_t expected, const std::string& what) {
  require(actual == expected, what + " is " + std::to_string(actual) + ", counted " + std::to_string(expected));
}

void check_slot(const Geometry& geometry, const Slot& slot, const std::string& name) {
  std::uint64_t rows = 0, used_rows = 0;
  require(slot.used_extents <= slot.whole && slot.whole <= slot.extents.size(),
          name + " has its extent counts out of order");
  for (std::size_t i = 0; i < slot.whole; ++i) {
    rows += slot.extents[i]->rows;
    if (i < slot.used_extents) used_rows = rows;
  }
  require_equal(slot.rows, rows, "rows of " + name);
  require_equal(slot.used_rows, used_rows, "used rows of " + name);
  const std::uint64_t last = slot.used_extents > 0 ? slot.extents[slot.used_extents - 1]->rows : 1;
  const std::uint64_t needed = geometry.rows_for(slot.tokens);
  require(slot.used_rows >= needed && slot.used_rows - needed < last,
          name + " uses more or fewer extents than its tokens need");
  require(slot.rows <= geometry.slot_rows(), name + " is mapped past its end");
  require(slot.active || slot.tokens == 0, name + " is idle but has a prepared length");
}

Census take_census(const Geometry& geometry, const SlotMap& slots) {
  Census census;
  for (std::uint64_t s = 0; s < slots.size(); ++s) {
    const Slot& slot = slots[s];
    check_slot(geometry, slot, "slot " + std::to_string(s));
    for (std::size_t i = 0; i < slot.extents.size(); ++i) {
      Seen& seen = census[slot.extents[i].get()];
      ++seen.mappings;
      if (i < slot.used_extents) ++seen.users;
    }
  }
  return census;
}

void check_handles(const Geometry& geometry, const Extent& extent, std::unordered_set<std::uint64_t>& ids) {
  require_equal(extent.handles.size(), geometry.num_regions(), "handles of an extent");
  for (const Handle& handle : extent.handles) {
    require_equal(handle.bytes, extent.rows * geometry.page_bytes(), "bytes of a handle");
    require(ids.insert(handle.id).second, "handle " + std::to_string(handle.id) + " belongs to two extents");
  }
}

std::uint64_t check_pool(const Geometry& geometry, const PagePool& pool, const Census& census,
                         std::unordered_set<std::uint64_t>& ids) {
  Extents ready, undestroyed;
  pool.list(ready, undestroyed);
  std::uint64_t ready_rows = 0, undestroyed_rows = 0;
  for (const ExtentPtr& extent : ready) {
    require(census.count(extent.get()) == 0 && extent->mappings == 0, "a ready extent is mapped");
    check_handles(geometry, *extent, ids);
    ready_rows += extent->rows;
  }
  for (const ExtentPtr& extent : undestroyed) undestroyed_rows += extent->rows;
  require_equal(pool.pooled_rows(), ready_rows, "pooled rows");
  return ready_rows + undestroyed_rows;
}

}  // namespace

void check_accounting(const Geometry& geometry, const SlotMap& slots, const PagePool& pool) {
  const Census census = take_census(geometry, slots);
  std::unordered_set<std::uint64_t> ids;
  std::uint64_t mapped_rows = 0, used_rows = 0;
  for (const auto& [extent, seen] : census) {
    require_equal(extent->mappings, seen.mappings, "mappings of an extent");
    require_equal(extent->users, seen.users, "users of an extent");
    check_handles(geometry, *extent, ids);
    mapped_rows += extent->rows;
    if (seen.users > 0) used_rows += extent->rows;
  }
  require_equal(slots.mapped_rows(), mapped_rows, "mapped rows");
  require_equal(slots.used_rows(), used_rows, "used rows");
  require_equal(pool.created_rows(), mapped_rows + check_pool(geometry, pool, census, ids), "created rows");
  require(pool.created_rows() <= pool.budget_rows(), "more rows are created than the budget allows");
}

}  // namespace vattention
