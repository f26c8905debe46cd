#include "vattention/page_pool.h"

#include <algorithm>
#include <utility>

#include "vattention/errors.h"

namespace vattention {
namespace {

std::uint64_t total_rows(const ClassCounts& counts) {
  std::uint64_t rows = 0;
  for (std::size_t c = 0; c < kNumClasses; ++c) rows += counts[c] * kClassRows[c];
  return rows;
}

std::uint64_t total_extents(const ClassCounts& counts) {
  std::uint64_t extents = 0;
  for (const std::uint64_t count : counts) extents += count;
  return extents;
}

std::size_t class_of(std::uint64_t rows) noexcept {
  return static_cast<std::size_t>(std::find(kClassRows.begin(), kClassRows.end(), rows) - kClassRows.begin());
}

bool has_more_rows(const ExtentPtr& a, const ExtentPtr& b) noexcept {
  return a->rows > b->rows;
}

}  // namespace

ClassCounts split(std::uint64_t rows, std::uint64_t max_rows) noexcept {
  ClassCounts counts{};
  for (std::size_t c = kNumClasses; c-- > 0;) {
    if (kClassRows[c] > max_rows) continue;
    counts[c] = rows / kClassRows[c];
    rows %= kClassRows[c];
  }
  return counts;
}

Extents PagePool::take(std::uint64_t begin, std::uint64_t rows) {
  const std::vector<ClassCounts> parts = cut_at_multiples(begin, rows);
  ClassCounts missing{};
  for (const ClassCounts& part : parts) {
    for (std::size_t c = 0; c < kNumClasses; ++c) missing[c] += part[c];
  }
  Extents taken, ordered;
  taken.reserve(total_extents(missing));
  ordered.reserve(total_extents(missing));
  try {
    for (std::size_t c = kNumClasses; c-- > 0;) {
      for (; missing[c] > 0 && !ready_[c].empty(); --missing[c]) taken.push_back(pop(c));
    }
    make_room(total_rows(missing));
    for (ExtentPtr& extent : create(missing)) taken.push_back(std::move(extent));
  } catch (...) {
    put_all(std::move(taken));
    throw;
  }
  std::sort(taken.begin(), taken.end(), has_more_rows);
  for (const ClassCounts& part : parts) {
    for (std::size_t c = kNumClasses; c-- > 0;) {
      const auto is_of_class = [c](const ExtentPtr& extent) { return extent && extent->rows == kClassRows[c]; };
      auto next = taken.begin();
      for (std::uint64_t i = 0; i < part[c]; ++i) {
        next = std::find_if(next, taken.end(), is_of_class);
        ordered.push_back(std::move(*next));
      }
    }
  }
  return ordered;
}

// The extents for rows [begin, begin + rows), in three parts: up to the first multiple of max_extent_rows_, from there
// to the last multiple, and behind it; in each part the largest first.
std::vector<ClassCounts> PagePool::cut_at_multiples(std::uint64_t begin, std::uint64_t rows) const {
  if (max_extent_rows_ == kClassRows.back()) return {split(rows)};
  const std::uint64_t head = std::min(rows, (max_extent_rows_ - begin % max_extent_rows_) % max_extent_rows_);
  const std::uint64_t tail = (rows - head) % max_extent_rows_;
  return {split(head, max_extent_rows_), split(rows - head - tail, max_extent_rows_), split(tail, max_extent_rows_)};
}

void PagePool::put(ExtentPtr extent) noexcept {
  pooled_rows_ += extent->rows;
  Extents& ready = ready_[class_of(extent->rows)];
  ready.push_back(std::move(extent));
}

void PagePool::put_all(Extents extents) noexcept {
  for (ExtentPtr& extent : extents) put(std::move(extent));
}

void PagePool::fill(std::uint64_t rows, std::uint64_t single_rows) {
  if (created_rows_ >= budget_rows_ || pooled_rows_ >= rows) return;
  const std::uint64_t missing = std::min(rows - pooled_rows_, budget_rows_ - created_rows_);
  const std::uint64_t singles = std::min(missing, single_rows - std::min<std::uint64_t>(single_rows, num_pooled(0)));
  ClassCounts counts = split(missing - singles, max_extent_rows_);
  counts[0] += singles;
  put_all(create(counts));
}

void PagePool::set_budget(std::uint64_t rows) {
  shrink_to(rows);
  budget_rows_ = rows;
}

void PagePool::clear() {
  shrink_to(created_rows_ - pooled_rows_);
  retry_destroy();
}

Extents PagePool::plan_pieces(std::uint64_t head, std::uint64_t tail) {
  const ClassCounts front = split(head), back = split(tail);
  ClassCounts all = front;
  for (std::size_t c = 0; c < kNumClasses; ++c) all[c] += back[c];
  reserve_lists(all);
  Extents pieces = plan(front), rest = plan(back);
  pieces.insert(pieces.end(), rest.rbegin(), rest.rend());
  return pieces;
}

void PagePool::replace(Extent& whole, const Extents& pieces) noexcept {
  --existing_[class_of(whole.rows)];
  for (const ExtentPtr& piece : pieces) ++existing_[class_of(piece->rows)];
  whole.handles.clear();
}

void PagePool::list(Extents& ready, Extents& undestroyed) const {
  for (const Extents& extents : ready_) ready.insert(ready.end(), extents.begin(), extents.end());
  undestroyed.insert(undestroyed.end(), undestroyed_.begin(), undestroyed_.end());
}

Extents PagePool::create(const ClassCounts& counts) {
  reserve_lists(counts);
  Extents fresh = plan(counts);
  created_rows_ += total_rows(counts);
  for (std::size_t c = 0; c < kNumClasses; ++c) existing_[c] += counts[c];
  try {
    make_handles(fresh);
  } catch (...) {
    for (ExtentPtr& extent : fresh) undestroyed_.push_back(std::move(extent));
    try {
      retry_destroy();
    } catch (...) {  // they stay undestroyed; the first failure is reported
    }
    throw;
  }
  return fresh;
}

// Extents with space for their handles, the largest first. The list is reserved first, so that an impossible number
// fails before anything is allocated.
Extents PagePool::plan(const ClassCounts& counts) {
  Extents extents;
  extents.reserve(total_extents(counts));
  for (std::size_t c = kNumClasses; c-- > 0;) {
    for (std::uint64_t i = 0; i < counts[c]; ++i) {
      extents.push_back(std::make_shared<Extent>());
      extents.back()->rows = kClassRows[c];
      extents.back()->handles.reserve(geometry_.num_regions());
    }
  }
  return extents;
}

void PagePool::make_handles(const Extents& extents) {
  for (const ExtentPtr& extent : extents) {
    const std::uint64_t bytes = extent->rows * geometry_.page_bytes();
    while (extent->handles.size() < geometry_.num_regions()) extent->handles.push_back(device_.create(bytes));
  }
}

void PagePool::reserve_lists(const ClassCounts& more) {
  for (std::size_t c = 0; c < kNumClasses; ++c) {
    reserve_more(ready_[c], existing_[c] - ready_[c].size() + more[c]);
  }
  reserve_more(undestroyed_, total_extents(existing_) - undestroyed_.size() + total_extents(more));
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

// The smallest class that covers the shortage with one extent, else the largest that is ready: each destroyed handle
// costs a call.
std::size_t PagePool::victim_class(std::uint64_t rows) const noexcept {
  std::size_t victim = 0;
  for (std::size_t c = 0; c < kNumClasses; ++c) {
    if (ready_[c].empty()) continue;
    victim = c;
    if (kClassRows[c] >= rows) break;
  }
  return victim;
}

ExtentPtr PagePool::pop(std::size_t size_class) noexcept {
  ExtentPtr extent = std::move(ready_[size_class].back());
  ready_[size_class].pop_back();
  pooled_rows_ -= extent->rows;
  return extent;
}

void PagePool::discard(ExtentPtr extent) {
  undestroyed_.push_back(std::move(extent));
  retry_destroy();
}

void PagePool::retry_destroy() {
  while (!undestroyed_.empty()) {
    Extent& extent = *undestroyed_.back();
    for (; !extent.handles.empty(); extent.handles.pop_back()) device_.destroy(extent.handles.back());
    created_rows_ -= extent.rows;
    --existing_[class_of(extent.rows)];
    undestroyed_.pop_back();
  }
}

}  // namespace vattention
