// Physical memory: a budget of rows, and the ready extents by size class.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "vattention/device.h"

namespace vattention {

// `rows` consecutive rows, with one handle for each region. Mapping a handle costs the same whatever its size: a prompt
// takes few large extents, a decode step one of a single row.
struct Extent {
  std::uint64_t rows = 0;
  std::vector<Handle> handles;  // [num_regions]
  std::uint32_t mappings = 0;   // slots that hold it
  std::uint32_t users = 0;      // of these, active slots whose prepared length covers it
};
using ExtentPtr = std::shared_ptr<Extent>;
using Extents = std::vector<ExtentPtr>;

inline constexpr std::array<std::uint64_t, 4> kClassRows{1, 4, 16, 64};
inline constexpr std::size_t kNumClasses = kClassRows.size();
using ClassCounts = std::array<std::uint64_t, kNumClasses>;  // extents of each size class

// The fewest extents of at most `max_rows` rows each that add up to exactly `rows`.
ClassCounts split(std::uint64_t rows, std::uint64_t max_rows = kClassRows.back()) noexcept;

// Reserves space for `more` elements, so that adding them cannot fail. Grows by half at least: repeated calls are
// cheap.
template <typename Element>
void reserve_more(std::vector<Element>& elements, std::size_t more) {
  const std::size_t needed = elements.size() + more, size = elements.capacity();
  if (needed > size) elements.reserve(std::max(needed, size + size / 2));
}

// put() never fails: every list has space for each extent that exists. A call that throws has changed nothing, except
// that extents which the device failed to destroy still count towards the budget.
class PagePool {
 public:
  // max_extent_rows: a size class. If it is not the largest, no extent straddles a multiple of it in its slot.
  PagePool(Device& device, const Geometry& geometry, std::uint64_t budget_rows, std::uint64_t max_extent_rows)
      : device_(device), geometry_(geometry), budget_rows_(budget_rows), max_extent_rows_(max_extent_rows) {}

  std::uint64_t budget_rows() const noexcept { return budget_rows_; }
  std::uint64_t created_rows() const noexcept { return created_rows_; }
  std::uint64_t pooled_rows() const noexcept { return pooled_rows_; }
  // Rows that take() can return: ready ones, and those that the budget allows to create.
  std::uint64_t free_rows() const noexcept { return budget_rows_ - created_rows_ + pooled_rows_; }
  std::uint64_t num_pooled(std::size_t size_class) const noexcept { return ready_[size_class].size(); }

  // Extents of exactly `rows` rows in total, for a slot's rows from `begin` on; requires rows <= free_rows().
  Extents take(std::uint64_t begin, std::uint64_t rows);
  void put(ExtentPtr extent) noexcept;
  void put_all(Extents extents) noexcept;
  // Creates ready extents until `rows` are pooled or the budget is reached: `single_rows` of them as extents of one
  // row, for the next decode growth, and the rest as large as can be.
  void fill(std::uint64_t rows, std::uint64_t single_rows);
  // Destroys ready extents as needed. The caller has made room: budget_rows() - free_rows() <= rows.
  void set_budget(std::uint64_t rows);
  // Destroys every ready extent.
  void clear();
  // Tries again to destroy the extents that the device failed to destroy.
  void retry_destroy();
  // New extents without handles: of `head` rows in total, the largest first, then of `tail` rows, the smallest first.
  // replace() counts them in place of `whole`, which loses its handles.
  Extents plan_pieces(std::uint64_t head, std::uint64_t tail);
  void replace(Extent& whole, const Extents& pieces) noexcept;
  // Appends the extents that the pool holds, for check_accounting().
  void list(Extents& ready, Extents& undestroyed) const;

 private:
  std::vector<ClassCounts> cut_at_multiples(std::uint64_t begin, std::uint64_t rows) const;
  Extents create(const ClassCounts& counts);
  Extents plan(const ClassCounts& counts);
  void make_handles(const Extents& extents);
  void reserve_lists(const ClassCounts& more);
  void make_room(std::uint64_t rows);
  void shrink_to(std::uint64_t created_rows);
  std::size_t victim_class(std::uint64_t rows) const noexcept;
  ExtentPtr pop(std::size_t size_class) noexcept;
  void discard(ExtentPtr extent);

  Device& device_;
  const Geometry& geometry_;
  std::uint64_t budget_rows_, max_extent_rows_, created_rows_ = 0, pooled_rows_ = 0;
  ClassCounts existing_{};  // extents that exist, in slots too: each list has space for all of its class
  std::array<Extents, kNumClasses> ready_;
  Extents undestroyed_;
};

}  // namespace vattention
