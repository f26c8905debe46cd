// The invariants of the books as code.
#pragma once

#include "vattention/page_pool.h"
#include "vattention/slot_map.h"

namespace vattention {

// Throws IntegrityError naming the first invariant that does not hold.
void check_books(const Geometry& geometry, const SlotMap& slots, const PagePool& pool);

}  // namespace vattention
