// Physical memory as a budget of rows, kept as ready extents in size classes.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "vattention/device.h"

namespace vattention {

// `rows` consecutive rows: one handle a region. Mapping costs per handle whatever its size, so a long growth wants
// few, large extents and a decode step wants one of a single row.
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

// Makes room for `more` elements, so that adding them cannot fail. Grows by half at least: repeated calls stay cheap.
template <typename Element>
void reserve_more(std::vector<Element>& elements, std::size_t more) {
  const std::size_t needed = elements.size() + more, size = elements.capacity();
  if (needed > size) elements.reserve(std::max(needed, size + size / 2));
}

// Giving back never fails: there is room in every list for each extent that exists. A call that throws has changed
// nothing, except that extents which the device refuses to destroy stay charged to the budget.
class PagePool {
 public:
  // max_extent_rows: a size class. Where it is not the largest, no extent straddles a multiple of it in its slot.
  PagePool(Device& device, const Geometry& geometry, std::uint64_t budget_rows, std::uint64_t max_extent_rows)
      : device_(device), geometry_(geometry), budget_rows_(budget_rows), max_extent_rows_(max_extent_rows) {}

  std::uint64_t budget_rows() const noexcept { return budget_rows_; }
  std::uint64_t created_rows() const noexcept { return created_rows_; }
  std::uint64_t pooled_rows() const noexcept { return pooled_rows_; }
  // Rows that take() can hand out: ready ones and those the budget still allows.
  std::uint64_t free_rows() const noexcept { return budget_rows_ - created_rows_ + pooled_rows_; }
  std::uint64_t num_pooled(std::size_t size_class) const noexcept { return ready_[size_class].size(); }

  // Extents of exactly `rows` rows in total, for a slot's rows from `begin` on; rows <= free_rows(). All or nothing.
  Extents take(std::uint64_t begin, std::uint64_t rows);
  void put(ExtentPtr extent) noexcept;
  void put_all(Extents extents) noexcept;
  // Creates ready extents until `rows` are pooled or the budget is reached: `single_rows` of them as extents of one
  // row, for the next decode growth, and the rest as large as can be.
  void fill(std::uint64_t rows, std::uint64_t single_rows);
  // budget - free_rows() <= rows: the caller has made room. Ready extents go first.
  void set_budget(std::uint64_t rows);
  // Destroys every ready extent.
  void clear();
  // Extents that the device refused to destroy stay charged to the budget; this tries them again.
  void retry_condemned();
  // Extents without handles, of `head` rows in total, the largest first, and then of `tail` rows, the smallest first;
  // replace() then counts them instead of `whole` and leaves that without handles.
  Extents plan_pieces(std::uint64_t head, std::uint64_t tail);
  void replace(Extent& whole, const Extents& pieces) noexcept;
  // Adds each extent that the pool holds, ready or condemned, for the check of the books.
  void list(Extents& ready, Extents& condemned) const;

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
  ClassCounts existing_{};  // extents that exist, wherever they are: each list has room for all of its class
  std::array<Extents, kNumClasses> ready_;
  Extents condemned_;
};

}  // namespace vattention
