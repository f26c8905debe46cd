#include "vattention/page_pool.h"

#include <algorithm>
#include <utility>

#include "vattention/errors.h"

namespace vattention {
namespace {

using ClassCounts = std::array<std::uint64_t, kNumClasses>;

// The fewest extents whose rows add up to exactly `rows`.
ClassCounts split(std::uint64_t rows) {
  ClassCounts counts{};
  for (std::size_t c = kNumClasses; c-- > 0; rows %= kClassRows[c]) counts[c] = rows / kClassRows[c];
  return counts;
}

std::uint64_t total_rows(const ClassCounts& counts) {
  std::uint64_t rows = 0;
  for (std::size_t c = 0; c < kNumClasses; ++c) rows += counts[c] * kClassRows[c];
  return rows;
}

std::size_t class_of(std::uint64_t rows) {
  return static_cast<std::size_t>(std::find(kClassRows.begin(), kClassRows.end(), rows) - kClassRows.begin());
}

}  // namespace

Extents PagePool::take(std::uint64_t rows) {
  ClassCounts missing = split(rows);
  Extents taken;
  try {
    for (std::size_t c = kNumClasses; c-- > 0;) {
      for (; missing[c] > 0 && !ready_[c].empty(); --missing[c]) taken.push_back(pop(c));
    }
    make_room(total_rows(missing));
    for (ExtentPtr& extent : create(missing)) taken.push_back(std::move(extent));
  } catch (...) {
    for (ExtentPtr& extent : taken) put(std::move(extent));
    throw;
  }
  std::stable_sort(taken.begin(), taken.end(), [](const auto& a, const auto& b) { return a->rows > b->rows; });
  return taken;
}

void PagePool::put(ExtentPtr extent) {
  pooled_rows_ += extent->rows;
  Extents& ready = ready_[class_of(extent->rows)];
  ready.push_back(std::move(extent));
}

void PagePool::fill(std::uint64_t rows, std::uint64_t single_rows) {
  if (created_rows_ >= budget_rows_ || pooled_rows_ >= rows) return;
  const std::uint64_t missing = std::min(rows - pooled_rows_, budget_rows_ - created_rows_);
  const std::uint64_t singles = std::min(missing, single_rows - std::min<std::uint64_t>(single_rows, num_pooled(0)));
  ClassCounts counts = split(missing - singles);
  counts[0] += singles;
  for (ExtentPtr& extent : create(counts)) put(std::move(extent));
}

void PagePool::set_budget(std::uint64_t rows) {
  shrink_to(rows);
  budget_rows_ = rows;
}

void PagePool::clear() {
  shrink_to(created_rows_ - pooled_rows_);
  retry_condemned();
}

void PagePool::list(Extents& ready, Extents& condemned) const {
  for (const Extents& extents : ready_) ready.insert(ready.end(), extents.begin(), extents.end());
  condemned.insert(condemned.end(), condemned_.begin(), condemned_.end());
}

Extents PagePool::create(const ClassCounts& counts) {
  Extents fresh;
  for (std::size_t c = kNumClasses; c-- > 0;) {
    for (std::uint64_t i = 0; i < counts[c]; ++i) fresh.push_back(std::make_shared<Extent>(Extent{kClassRows[c], {}}));
  }
  created_rows_ += total_rows(counts);
  try {
    for (const ExtentPtr& extent : fresh) {
      const std::uint64_t bytes = extent->rows * geometry_.page_bytes();
      while (extent->handles.size() < geometry_.num_regions()) extent->handles.push_back(device_.create(bytes));
    }
  } catch (...) {
    condemned_.insert(condemned_.end(), fresh.begin(), fresh.end());
    try {
      retry_condemned();
    } catch (const DeviceError&) {  // stays condemned; the first failure is the one to report
    }
    throw;
  }
  return fresh;
}

void PagePool::make_room(std::uint64_t rows) {
  if (rows == 0) return;
  shrink_to(budget_rows_ - rows);
}

void PagePool::shrink_to(std::uint64_t created_rows) {
  while (created_rows_ > created_rows) {
    if (pooled_rows_ == 0) throw Error("internal error: no ready extent left to give up");
    discard(pop(victim_class(created_rows_ - created_rows)));
  }
}

// The smallest class that covers the shortage with one extent, else the largest there is: destroying costs per handle.
std::size_t PagePool::victim_class(std::uint64_t rows) const noexcept {
  std::size_t victim = 0;
  for (std::size_t c = 0; c < kNumClasses; ++c) {
    if (ready_[c].empty()) continue;
    victim = c;
    if (kClassRows[c] >= rows) break;
  }
  return victim;
}

ExtentPtr PagePool::pop(std::size_t size_class) {
  ExtentPtr extent = std::move(ready_[size_class].back());
  ready_[size_class].pop_back();
  pooled_rows_ -= extent->rows;
  return extent;
}

void PagePool::discard(const ExtentPtr& extent) {
  condemned_.push_back(extent);
  retry_condemned();
}

void PagePool::retry_condemned() {
  while (!condemned_.empty()) {
    Extent& extent = *condemned_.back();
    for (; !extent.handles.empty(); extent.handles.pop_back()) device_.destroy(extent.handles.back());
    created_rows_ -= extent.rows;
    condemned_.pop_back();
  }
}

}  // namespace vattention
