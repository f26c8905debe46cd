#include "vattention/kv_cache.h"

#include <algorithm>
#include <exception>
#include <optional>
#include <utility>

#include "vattention/errors.h"
#include "vattention/integrity.h"

namespace vattention {
namespace {

const Geometry& checked(const Geometry& geometry, const Device& device) {
  if (geometry.page_bytes() % device.granularity() == 0) return geometry;
  throw std::invalid_argument("page_bytes must be a multiple of the device's granularity of " +
                              std::to_string(device.granularity()) + " bytes, got " +
                              std::to_string(geometry.page_bytes()));
}

const Policy& checked(const Policy& policy) {
  if (!(policy.reclaim_threshold >= 0 && policy.reclaim_threshold <= 1)) {
    throw std::invalid_argument("reclaim_threshold must be a share from 0 to 1, got " +
                                std::to_string(policy.reclaim_threshold));
  }
  if (std::find(kClassRows.begin(), kClassRows.end(), policy.max_extent_rows) == kClassRows.end()) {
    throw std::invalid_argument("max_extent_rows must be 1, 4, 16 or 64, got " +
                                std::to_string(policy.max_extent_rows));
  }
  return policy;
}

}  // namespace

KVCache::KVCache(std::shared_ptr<Device> device, const Geometry& geometry, std::int64_t budget_bytes, Policy policy)
    : device_(std::make_shared<TimedDevice>(std::move(device))),
      geometry_(checked(geometry, *device_)),
      policy_(checked(policy)),
      reservation_(std::make_shared<Reservation>(device_, geometry)),
      pool_(*device_, geometry_, budget_rows_for(budget_bytes), policy_.max_extent_rows),
      slots_(*device_, geometry_, pool_, reservation_->base()),
      goals_(geometry.num_slots()),
      worker_([this] { work(); }) {}

KVCache::~KVCache() {
  try {
    close();
  } catch (const std::exception&) {  // a destructor must not throw; close() reports failures
  }
}

std::uint64_t KVCache::capacity_rows() {
  const Worker::Lock lock = own();
  return pool_.budget_rows();
}

std::shared_ptr<Reservation> KVCache::reservation() {
  const Worker::Lock lock = worker_.own();
  return reservation_;
}

std::uint64_t KVCache::alloc(std::int64_t tokens) {
  const Worker::Lock lock = own();
  const std::uint64_t slot = best_idle_slot(geometry_.rows_for(tokens_in_range("tokens", tokens)));
  if (slot == slots_.size()) throw NoFreeSlot("all " + std::to_string(slots_.size()) + " slots are in use");
  slots_.activate(slot);
  return slot;
}

void KVCache::claim(std::int64_t slot) {
  const Worker::Lock lock = own();
  const std::uint64_t index = slot_in_range(slot);
  if (slots_[index].active) throw std::invalid_argument("slot " + std::to_string(slot) + " is already in use");
  slots_.activate(index);
}

void KVCache::free(std::int64_t slot) {
  const Worker::Lock lock = own();
  const std::uint64_t index = active_slot(slot);
  slots_.deactivate(index);
  if (!policy_.deferred_reclamation) slots_.trim(index, 0);
}

void KVCache::prepare(const Targets& targets) {
  const Worker::Lock lock = own();
  check_targets(targets);
  ++counters_.prepares;
  if (grow(targets)) ++counters_.prepares_waited;
  for (const Target& target : targets) {
    const auto slot = static_cast<std::uint64_t>(target.slot);
    const auto tokens = static_cast<std::uint64_t>(target.tokens);
    if (tokens > slots_[slot].tokens) slots_.use(slot, tokens);
  }
}

void KVCache::prefetch(const Targets& targets, std::int64_t lead_tokens) {
  const Worker::Lock lock = own();
  const auto lead = static_cast<std::uint64_t>(clamped(lead_tokens, "lead_tokens"));
  Targets wanted;
  wanted.reserve(targets.size() + 1);
  std::optional<Target> ahead;
  std::uint64_t least_left = geometry_.page_bytes();
  for (const Target& target : targets) {
    active_slot(target.slot);
    const Target now{target.slot, clamped(target.tokens)}, later = up_to_next_page(now, lead);
    const std::uint64_t left = bytes_left(now.tokens);
    if (needs_mapping(now)) {
      wanted.push_back(now);
    } else if (left < least_left && needs_mapping(later)) {
      ahead = later;
      least_left = left;
    }
  }
  if (ahead && pool_.free_rows() > 0) wanted.push_back(*ahead);
  requested_ = std::move(wanted);
  ++counters_.prefetches;
  if (!requested_.empty() || below_threshold() || needs_slot_ahead()) worker_.post(lock);
}

void KVCache::wait() {
  const Worker::Lock lock = own();
}

std::uint64_t KVCache::share(std::int64_t source, std::int64_t target, std::int64_t tokens) {
  const Worker::Lock lock = own();
  const Slot& from = slots_[active_slot(source, "source")];
  const std::uint64_t to = active_slot(target, "target");
  if (source == target || slots_[to].tokens > 0) {
    throw std::invalid_argument("slot " + std::to_string(target) +
                                " must be another slot without prepared tokens, it has " +
                                std::to_string(slots_[to].tokens));
  }
  const std::uint64_t limit = tokens_in_range("tokens", tokens);
  if (limit > from.tokens) {
    throw std::invalid_argument("tokens is " + std::to_string(tokens) + ", but slot " + std::to_string(source) +
                                " holds " + std::to_string(from.tokens));
  }
  const std::uint64_t shared = geometry_.whole_page_tokens(limit);
  if (shared == 0) return 0;
  slots_.trim(to, 0);
  share_rows(static_cast<std::uint64_t>(source), to, geometry_.rows_for(shared));
  slots_.use(to, shared);
  return shared;
}

std::uint64_t KVCache::trim(std::int64_t slot, std::int64_t tokens) {
  const Worker::Lock lock = own();
  const std::uint64_t index = active_slot(slot), length = tokens_in_range("tokens", tokens);
  const Slot& state = slots_[index];
  if (length >= state.tokens) return state.tokens;
  const bool leaves_shared = length < shared_tokens(state);
  if (leaves_shared && geometry_.whole_page_tokens(length) < length) {
    throw std::invalid_argument("tokens is " + std::to_string(tokens) + ", but slot " + std::to_string(slot) +
                                " shares its first " + std::to_string(shared_tokens(state)) +
                                " tokens with another slot, which would see them overwritten: trim to the end of a " +
                                "page, as " + std::to_string(geometry_.whole_page_tokens(length)));
  }
  const std::uint64_t rows = geometry_.rows_for(length), whole = cut_at(index, rows);
  slots_.shrink(index, extents_within(state, rows) + (whole < rows ? 1 : 0), length);
  if (leaves_shared) slots_.trim(index, state.used_extents);
  return state.tokens;
}

void KVCache::map_ahead(std::int64_t tokens) {
  const Worker::Lock lock = own();
  ahead_rows_ = geometry_.rows_for(tokens_in_range("tokens", tokens));
  if (needs_slot_ahead()) worker_.post(lock);
}

void KVCache::set_deferred_reclamation(bool deferred) {
  const Worker::Lock lock = own();
  policy_.deferred_reclamation = deferred;
}

void KVCache::reclaim_idle() {
  const Worker::Lock lock = own();
  for (const std::uint64_t slot : idle_slots()) slots_.trim(slot, 0);
}

void KVCache::resize(std::int64_t budget_bytes) {
  const Worker::Lock lock = own();
  const std::uint64_t rows = budget_rows_for(budget_bytes), before = pool_.budget_rows();
  if (rows < needed_rows()) throw OutOfMemory(needed_rows(), rows, "under the new budget");
  if (rows < before && !make_room(before - rows, false))
    throw Error("internal error: idle rows could not be taken back");
  pool_.set_budget(rows);
}

// The smallest budget that keeps the promise. Extents may be used past a slot's length only while the budget holds
// every slot at full length.
std::uint64_t KVCache::needed_rows() const noexcept {
  for (std::uint64_t s = 0; s < slots_.size(); ++s) {
    if (slots_[s].used_rows > geometry_.rows_for(slots_[s].tokens)) return slots_.size() * geometry_.slot_rows();
  }
  return slots_.used_rows();
}

void KVCache::fill_pool(std::int64_t bytes) {
  const Worker::Lock lock = own();
  if (bytes < 0) throw std::invalid_argument("bytes must not be negative, got " + std::to_string(bytes));
  pool_.fill(static_cast<std::uint64_t>(bytes) / geometry_.row_bytes(), geometry_.num_slots());
}

SlotState KVCache::slot_state(std::int64_t slot) {
  const Worker::Lock lock = own();
  const Slot& state = slots_[slot_in_range(slot)];
  return {state.active, state.tokens, state.rows};
}

Stats KVCache::stats() {
  const Worker::Lock lock = worker_.own();  // also once closed
  const std::uint64_t row_bytes = geometry_.row_bytes();
  std::uint64_t wasted = 0;
  for (std::uint64_t s = 0; s < slots_.size(); ++s) {
    const Slot& slot = slots_[s];
    wasted +=
        (slot.used_rows * geometry_.page_bytes() - slot.tokens * geometry_.token_bytes()) * geometry_.num_regions();
  }
  Stats stats{closed_ ? 0 : geometry_.total_bytes(),
              pool_.budget_rows() * row_bytes,
              pool_.created_rows() * row_bytes,
              slots_.mapped_rows() * row_bytes,
              (slots_.mapped_rows() - slots_.used_rows()) * row_bytes,
              wasted,
              slots_.peak_mapped_rows() * row_bytes,
              {},
              counters_,
              device_->stats()};
  for (std::size_t c = 0; c < kNumClasses; ++c) stats.pooled_extents[c] = pool_.num_pooled(c);
  return stats;
}

void KVCache::check_integrity() {
  const Worker::Lock lock = own();
  check_accounting(geometry_, slots_, pool_);
}

void KVCache::close() {
  if (!worker_.is_here()) return;
  {
    const Worker::Lock lock = worker_.own();
    if (closed_) return;
    closed_ = true;
  }
  worker_.stop();
  const Worker::Lock lock = worker_.own();
  const std::shared_ptr<Reservation> addresses = std::move(reservation_);  // kept until the pages are unmapped
  release_all();
}

Worker::Lock KVCache::own() {
  Worker::Lock lock = worker_.own();
  if (closed_) throw Error("the cache is closed");
  return lock;
}

std::uint64_t KVCache::budget_rows_for(std::int64_t bytes) const {
  const auto row_bytes = static_cast<std::int64_t>(geometry_.row_bytes());
  if (bytes < row_bytes) {
    throw std::invalid_argument(
        "budget_bytes is " + std::to_string(bytes) + ", less than one row: " + std::to_string(geometry_.num_regions()) +
        " regions x " + std::to_string(geometry_.page_bytes()) + " bytes a page = " + std::to_string(row_bytes));
  }
  return static_cast<std::uint64_t>(bytes / row_bytes);
}

std::uint64_t KVCache::tokens_in_range(const char* name, std::int64_t tokens) const {
  if (tokens < 0 || static_cast<std::uint64_t>(tokens) > geometry_.max_tokens()) {
    throw std::invalid_argument(std::string(name) + " must be from 0 to max_tokens = " +
                                std::to_string(geometry_.max_tokens()) + ", got " + std::to_string(tokens));
  }
  return static_cast<std::uint64_t>(tokens);
}

// Lengths past max_tokens mean max_tokens.
std::int64_t KVCache::clamped(std::int64_t tokens, const char* name) const {
  return static_cast<std::int64_t>(
      tokens_in_range(name, std::min(tokens, static_cast<std::int64_t>(geometry_.max_tokens()))));
}

// The target `lead` tokens further, but at most to the end of the page after its last one.
Target KVCache::up_to_next_page(const Target& target, std::uint64_t lead) const {
  const auto tokens = static_cast<std::uint64_t>(target.tokens);
  const std::uint64_t page_end = (geometry_.rows_for(tokens) + 1) * geometry_.page_bytes() / geometry_.token_bytes();
  return {target.slot, clamped(static_cast<std::int64_t>(std::min(tokens + lead, page_end)))};
}

// Bytes behind the last of this many tokens in its page.
std::uint64_t KVCache::bytes_left(std::int64_t tokens) const {
  const auto count = static_cast<std::uint64_t>(tokens);
  return geometry_.rows_for(count) * geometry_.page_bytes() - count * geometry_.token_bytes();
}

bool KVCache::needs_mapping(const Target& target) const {
  const Slot& slot = slots_[static_cast<std::uint64_t>(target.slot)];
  const std::uint64_t rows = geometry_.rows_for(static_cast<std::uint64_t>(target.tokens));
  return rows > slot.used_rows && fit(slot, rows).rows() < rows;
}

std::uint64_t KVCache::slot_in_range(std::int64_t slot, const char* name) const {
  if (slot < 0 || static_cast<std::uint64_t>(slot) >= slots_.size()) {
    throw std::invalid_argument(std::string(name) + " must be from 0 to " + std::to_string(slots_.size() - 1) +
                                ", got " + std::to_string(slot));
  }
  return static_cast<std::uint64_t>(slot);
}

std::uint64_t KVCache::active_slot(std::int64_t slot, const char* name) const {
  const std::uint64_t index = slot_in_range(slot, name);
  if (!slots_[index].active) throw std::invalid_argument("slot " + std::to_string(slot) + " is not allocated");
  return index;
}

void KVCache::check_targets(const Targets& targets) const {
  for (const Target& target : targets) {
    active_slot(target.slot);
    tokens_in_range("tokens", target.tokens);
  }
}

}  // namespace vattention
