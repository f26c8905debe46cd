// The invariants of the cache's accounting.
#pragma once

#include "vattention/page_pool.h"
#include "vattention/slot_map.h"

namespace vattention {

// Throws IntegrityError naming the first invariant that does not hold.
void check_accounting(const Geometry& geometry, const SlotMap& slots, const PagePool& pool);

}  // namespace vattention
