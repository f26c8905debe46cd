// The private part of KVCache: growth, sharing, reclaiming, and the worker's job.
#include <algorithm>
#include <exception>
#include <new>
#include <utility>

#include "vattention/errors.h"
#include "vattention/kv_cache.h"

namespace vattention {
namespace {
constexpr std::uint64_t kPagesReclaimedAhead = 64;
}

// The rows that a call is about to use. While it exists, they are not reclaimed.
class KVCache::Goals {
 public:
  explicit Goals(KVCache& cache) : cache_(cache) {}
  ~Goals() {
    for (const std::uint64_t slot : slots_) cache_.goals_[slot] = 0;
  }
  Goals(const Goals&) = delete;
  Goals& operator=(const Goals&) = delete;

  void add(std::uint64_t slot, std::uint64_t rows) {
    std::uint64_t& goal = cache_.goals_[slot];
    const std::uint64_t before = std::max(goal, cache_.slots_[slot].used_rows);
    if (rows <= before) return;
    if (goal == 0) slots_.push_back(slot);
    goal = rows;
    growth_ += rows - before;
  }
  const std::vector<std::uint64_t>& slots() const noexcept { return slots_; }
  std::uint64_t growth() const noexcept { return growth_; }  // rows past the prepared lengths

 private:
  KVCache& cache_;
  std::vector<std::uint64_t> slots_;
  std::uint64_t growth_ = 0;
};

// A handle is mapped as a whole, so an extent that straddles a length uses rows that the length does not need. If the
// device can, the extent is cut. Otherwise it may serve only if the budget holds every slot at full length, because the
// promise counts no such rows. Extents that another slot shares may not serve: two slots would write to them. Extents
// that do not serve stay mapped until their addresses are needed, because idle rows cost nothing.
KVCache::Fit KVCache::fit(const Slot& slot, std::uint64_t rows) const noexcept {
  Fit fit{slot.used_extents, slot.used_rows, 0};
  for (; fit.extents < slot.whole && fit.whole_rows < rows; ++fit.extents) {
    const Extent& extent = *slot.extents[fit.extents];
    if (extent.mappings > 1) break;
    if (fit.whole_rows + extent.rows > rows) {
      if (device_->can_cut()) fit.cut_rows = rows - fit.whole_rows;
      if (device_->can_cut() || !holds_every_slot(pool_.budget_rows())) break;
    }
    fit.whole_rows += extent.rows;
  }
  return fit;
}

bool KVCache::holds_every_slot(std::uint64_t budget_rows) const noexcept {
  return budget_rows / geometry_.num_slots() >= geometry_.slot_rows();
}

// The slot that saves the most mapping; among equals the one that wastes the fewest rows, so that an empty slot is
// preferred to one whose pages a longer request could use.
std::uint64_t KVCache::best_idle_slot(std::uint64_t rows) const {
  std::uint64_t best = slots_.size(), best_kept = 0, best_waste = 0;
  for (std::uint64_t s = 0; s < slots_.size(); ++s) {
    if (slots_[s].active) continue;
    const std::uint64_t kept = std::min(rows, fit(slots_[s], rows).rows()), waste = slots_[s].rows - kept;
    if (best < slots_.size() && (kept < best_kept || (kept == best_kept && waste >= best_waste))) continue;
    best = s;
    best_kept = kept;
    best_waste = waste;
  }
  return best;
}

// Returns whether anything was mapped. The caller advances the prepared lengths afterwards: until then the new rows
// count as mapped ahead and can be reclaimed, so a failure needs no undoing.
bool KVCache::grow(const Targets& targets) {
  Goals goals(*this);
  for (const Target& target : targets) {
    goals.add(static_cast<std::uint64_t>(target.slot), geometry_.rows_for(static_cast<std::uint64_t>(target.tokens)));
  }
  const std::uint64_t needed = slots_.used_rows() + goals.growth();
  if (needed > pool_.budget_rows()) throw OutOfMemory(needed, pool_.budget_rows(), "the budget");
  for (const std::uint64_t slot : goals.slots()) trim_to_fit(slot, goals_[slot]);
  bool mapped = false;
  for (const std::uint64_t slot : goals.slots()) mapped |= map_up_to(slot, goals_[slot]);
  return mapped;
}

void KVCache::trim_to_fit(std::uint64_t slot, std::uint64_t rows) {
  slots_.finish(slot);
  const Fit fit = this->fit(slots_[slot], rows);
  if (fit.cut_rows > 0) {
    slots_.cut(slot, fit.extents, fit.cut_rows);
  } else if (fit.rows() < rows) {
    slots_.trim(slot, fit.extents);
  }
}

bool KVCache::map_up_to(std::uint64_t slot, std::uint64_t rows) {
  if (slots_[slot].rows >= rows) return false;
  const std::uint64_t missing = rows - slots_[slot].rows;
  if (!make_room(missing, false)) throw Error("internal error: idle rows could not be taken back");
  map_more(slot, missing, false);
  return true;
}

// The budget may be larger than the device's memory. Reclaims all unused rows, destroys all ready extents and tries
// once more; the error then says what the device really has.
void KVCache::map_more(std::uint64_t slot, std::uint64_t rows, bool idle_only) {
  try {
    slots_.append(slot, pool_.take(slots_[slot].rows, rows));
    return;
  } catch (const DeviceOutOfMemory&) {
    make_room(pool_.budget_rows(), idle_only);
    pool_.clear();
  }
  try {
    slots_.append(slot, pool_.take(slots_[slot].rows, rows));
  } catch (const DeviceOutOfMemory& error) {
    throw OutOfMemory(slots_.mapped_rows() + rows, slots_.mapped_rows(), error.what());
  }
}

bool KVCache::make_room(std::uint64_t rows, bool idle_only) {
  if (pool_.free_rows() >= rows) return true;
  pool_.retry_destroy();
  std::vector<std::uint64_t> order = idle_slots();
  for (std::uint64_t s = 0; s < slots_.size() && !idle_only; ++s) {
    if (slots_[s].active) order.push_back(s);
  }
  for (const std::uint64_t slot : order) {
    if (pool_.free_rows() >= rows) break;
    reclaim(slot, rows - pool_.free_rows());
  }
  return pool_.free_rows() >= rows;
}

// The target has nothing mapped. Rows behind the last extent that lies within the share are copied to memory of the
// target's own, which the budget must have room for.
void KVCache::share_rows(std::uint64_t source, std::uint64_t target, std::uint64_t rows) {
  const std::uint64_t shared_rows = cut_at(source, rows);
  const Slot& from = slots_[source];
  const std::size_t count = extents_within(from, shared_rows);
  const std::uint64_t needed = slots_.used_rows() + rows - shared_rows;
  if (needed > pool_.budget_rows()) throw OutOfMemory(needed, pool_.budget_rows(), "the budget");
  Goals goals(*this);
  goals.add(target, rows);
  if (count > 0) map_shared(target, Extents(from.extents.begin(), from.extents.begin() + static_cast<long>(count)));
  if (map_up_to(target, rows)) copy_rows(source, target, shared_rows, rows);
}

void KVCache::map_shared(std::uint64_t slot, Extents extents) {
  try {
    slots_.append(slot, std::move(extents));
  } catch (const DeviceOutOfMemory& error) {
    throw OutOfMemory(slots_.used_rows() + 1, slots_.used_rows(), error.what());
  }
}

// Cuts a used extent so that one ends after `rows` rows, if the device can. Returns the rows of the extents within.
std::uint64_t KVCache::cut_at(std::uint64_t index, std::uint64_t rows) {
  const Slot& slot = slots_[index];
  const std::size_t count = extents_within(slot, rows);
  std::uint64_t end = 0;
  for (std::size_t i = 0; i < count; ++i) end += slot.extents[i]->rows;
  if (end == rows || !device_->can_cut()) return end;
  slots_.cut(index, count, rows - end);
  return rows;
}

// Tokens in the leading extents that other slots hold too.
std::uint64_t KVCache::shared_tokens(const Slot& slot) const noexcept {
  std::uint64_t rows = 0;
  for (std::size_t i = 0; i < slot.used_extents && slot.extents[i]->mappings > 1; ++i) rows += slot.extents[i]->rows;
  return rows * geometry_.page_bytes() / geometry_.token_bytes();
}

// The number of used extents within the first `rows` rows.
std::size_t KVCache::extents_within(const Slot& slot, std::uint64_t rows) const noexcept {
  std::size_t count = 0;
  for (std::uint64_t end = 0; count < slot.used_extents; ++count) {
    end += slot.extents[count]->rows;
    if (end > rows) break;
  }
  return count;
}

void KVCache::copy_rows(std::uint64_t source, std::uint64_t target, std::uint64_t begin, std::uint64_t end) {
  const Address base = reservation_->base();
  for (std::uint64_t region = 0; region < geometry_.num_regions(); ++region) {
    device_->copy(base + geometry_.offset_of(region, target, begin), base + geometry_.offset_of(region, source, begin),
                  (end - begin) * geometry_.page_bytes());
  }
}

// Unmaps whole extents from the slot's end until `rows` rows are free; none that is in use or that the call in progress
// is about to use.
void KVCache::reclaim(std::uint64_t index, std::uint64_t rows) {
  slots_.finish(index);
  const Slot& slot = slots_[index];
  const std::uint64_t keep_rows = std::max(slot.used_rows, goals_[index]);
  std::size_t cut = slot.whole;
  std::uint64_t taken = 0, begin = slot.rows;
  while (cut > 0 && taken < rows && begin - slot.extents[cut - 1]->rows >= keep_rows) {
    const Extent& extent = *slot.extents[--cut];
    begin -= extent.rows;
    if (extent.mappings == 1) taken += extent.rows;
  }
  slots_.trim(index, cut);
  counters_.rows_reclaimed += taken;
}

// Longest idle first.
std::vector<std::uint64_t> KVCache::idle_slots() const {
  std::vector<std::uint64_t> idle;
  for (std::uint64_t s = 0; s < slots_.size(); ++s) {
    if (!slots_[s].active && !slots_[s].extents.empty()) idle.push_back(s);
  }
  const auto earlier = [this](std::uint64_t a, std::uint64_t b) { return slots_[a].freed_at < slots_[b].freed_at; };
  std::sort(idle.begin(), idle.end(), earlier);
  return idle;
}

// A failure of one part does not keep the others from running.
void KVCache::work() noexcept {
  attempt([this] { prefetch_requested(); });
  attempt([this] { reclaim_ahead(); });
  attempt([this] { map_one_ahead(); });
}

template <typename Step>
void KVCache::attempt(Step step) noexcept {
  try {
    step();
  } catch (const std::exception& error) {
    record_failure(error.what());
  }
}

void KVCache::record_failure(const char* what) noexcept {
  ++counters_.worker_failures;
  try {
    counters_.worker_error = what;
  } catch (const std::bad_alloc&) {
    counters_.worker_error = "out of memory";  // short enough to be kept without an allocation
  }
}

// Reclaims from idle slots only: rows mapped ahead of other active slots are needed just as much.
void KVCache::prefetch_requested() {
  const Targets targets = std::exchange(requested_, {});
  Goals goals(*this);
  for (const Target& target : targets) {
    goals.add(static_cast<std::uint64_t>(target.slot), geometry_.rows_for(static_cast<std::uint64_t>(target.tokens)));
  }
  for (const std::uint64_t slot : goals.slots()) {
    trim_to_fit(slot, goals_[slot]);
    if (slots_[slot].rows >= goals_[slot]) continue;
    const std::uint64_t missing = goals_[slot] - slots_[slot].rows;
    if (make_room(missing, true)) {
      map_more(slot, missing, true);
      counters_.rows_prefetched += missing;
    } else {
      ++counters_.prefetches_short;
    }
  }
}

// A few rows for each prefetch: the next call waits for it, and unmapping a page takes 20 us.
void KVCache::reclaim_ahead() {
  if (!policy_.deferred_reclamation || !below_threshold()) return;
  const std::uint64_t some_rows = std::max<std::uint64_t>(1, kPagesReclaimedAhead / geometry_.num_regions());
  make_room(std::min(threshold_rows(), pool_.free_rows() + some_rows), true);
}

void KVCache::map_one_ahead() {
  if (!needs_slot_ahead()) return;
  const std::uint64_t slot = best_idle_slot(ahead_rows_);
  Goals goals(*this);
  goals.add(slot, ahead_rows_);
  trim_to_fit(slot, ahead_rows_);
  const std::uint64_t missing = ahead_rows_ - std::min(ahead_rows_, slots_[slot].rows);
  if (missing == 0 || pool_.free_rows() < missing + threshold_rows()) return;  // only from memory above the threshold
  slots_.append(slot, pool_.take(slots_[slot].rows, missing));
}

std::uint64_t KVCache::threshold_rows() const noexcept {
  return static_cast<std::uint64_t>(policy_.reclaim_threshold * static_cast<double>(pool_.budget_rows()));
}

bool KVCache::below_threshold() const noexcept {
  return pool_.free_rows() < threshold_rows() && slots_.mapped_rows() > slots_.used_rows();
}

bool KVCache::needs_slot_ahead() const {
  if (ahead_rows_ == 0) return false;
  const std::uint64_t slot = best_idle_slot(ahead_rows_);
  return slot < slots_.size() && fit(slots_[slot], ahead_rows_).rows() < ahead_rows_;
}

void KVCache::release_all() {
  std::exception_ptr first;
  const auto attempt_all = [&first](auto step) {
    try {
      step();
    } catch (...) {
      if (!first) first = std::current_exception();
    }
  };
  for (std::uint64_t s = 0; s < slots_.size(); ++s) {
    slots_.deactivate(s);
    attempt_all([&] { slots_.trim(s, 0); });
  }
  attempt_all([&] { pool_.clear(); });
  if (first) std::rethrow_exception(first);
}

}  // namespace vattention
