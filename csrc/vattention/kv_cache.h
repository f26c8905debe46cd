// The cache: decides which slot gets which rows, and when they are mapped and reclaimed. Layers, data types and tensors
// are in Python (vattention/kv_cache.py).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "vattention/device.h"
#include "vattention/page_pool.h"
#include "vattention/reservation.h"
#include "vattention/slot_map.h"
#include "vattention/timed_device.h"
#include "vattention/worker.h"

namespace vattention {

struct Policy {
  bool deferred_reclamation = true;  // a freed slot keeps its pages until they are needed or free memory runs low
  double reclaim_threshold = 0.1;    // share of the budget that the worker tries to keep free after each prefetch
  std::uint64_t max_extent_rows = kClassRows.back();  // see PagePool
};

struct Target {
  std::int64_t slot;
  std::int64_t tokens;
};
using Targets = std::vector<Target>;

struct Counters {
  std::uint64_t prepares = 0, prepares_waited = 0;     // waited: mapped pages before it returned
  std::uint64_t prefetches = 0, prefetches_short = 0;  // short: slots without room for their rows
  std::uint64_t rows_prefetched = 0, rows_reclaimed = 0;
  std::uint64_t worker_failures = 0;
  std::string worker_error;  // the last one; empty if there was none
};

struct Stats {
  std::uint64_t reserved_bytes, capacity_bytes, created_bytes, mapped_bytes, idle_bytes, wasted_bytes,
      peak_mapped_bytes;
  std::array<std::uint64_t, kNumClasses> pooled_extents;
  Counters counters;
  DeviceStats device;
};

// (active, prepared tokens, mapped rows)
using SlotState = std::tuple<bool, std::uint64_t, std::uint64_t>;

// Threads may share a cache: every call waits for the worker to be idle and then holds its lock. The promise: any
// lengths of the active slots whose rows_for() add up to at most capacity_rows() can be prepared.
//
// A call that throws any exception leaves the accounting consistent and the prepared lengths unchanged. In a forked
// child every call throws ForkError, except close() and the destructor, which do nothing.
class KVCache {
 public:
  KVCache(std::shared_ptr<Device> device, const Geometry& geometry, std::int64_t budget_bytes, Policy policy);
  ~KVCache();

  const Geometry& geometry() const noexcept { return geometry_; }
  std::shared_ptr<Device> device() const noexcept { return device_; }
  // Null once the cache is closed.
  std::shared_ptr<Reservation> reservation();
  std::uint64_t capacity_rows();

  std::uint64_t alloc(std::int64_t tokens);
  void claim(std::int64_t slot);
  void free(std::int64_t slot);
  void prepare(const Targets& targets);
  // lead_tokens: of the slots with nothing to map, the one nearest to the end of its last page gets its next page if it
  // needs it within this many tokens.
  void prefetch(const Targets& targets, std::int64_t lead_tokens = 0);
  void wait();
  // Maps the pages of the first tokens of `source` at `target` too and returns how many are shared: `tokens` rounded
  // down to the end of a page. An extent that straddles the end is cut, or its shared rows are copied. Neither happens
  // at a multiple of a Policy::max_extent_rows below the largest extent.
  std::uint64_t share(std::int64_t source, std::int64_t target, std::int64_t tokens);
  // Shortens the prepared length and returns it. The rows behind become idle; those that other slots share are
  // unmapped. If an extent that straddles the new length cannot be cut, the length ends with the extent.
  std::uint64_t trim(std::int64_t slot, std::int64_t tokens);
  void map_ahead(std::int64_t tokens);
  void set_deferred_reclamation(bool deferred);
  void reclaim_idle();
  void resize(std::int64_t budget_bytes);
  void fill_pool(std::int64_t bytes);
  SlotState slot_state(std::int64_t slot);
  Stats stats();
  void check_integrity();
  void close();

 private:
  // The leading part of a slot's pages that may serve a length: extents of its own, and `cut_rows` rows of the next
  // one, which has to be cut.
  struct Fit {
    std::size_t extents;
    std::uint64_t whole_rows, cut_rows;
    std::uint64_t rows() const noexcept { return whole_rows + cut_rows; }
  };
  class Goals;

  Worker::Lock own();
  std::uint64_t budget_rows_for(std::int64_t bytes) const;
  std::uint64_t tokens_in_range(const char* name, std::int64_t tokens) const;
  std::uint64_t slot_in_range(std::int64_t slot, const char* name = "slot") const;
  std::uint64_t active_slot(std::int64_t slot, const char* name = "slot") const;
  void check_targets(const Targets& targets) const;
  std::int64_t clamped(std::int64_t tokens, const char* name = "tokens") const;
  Target up_to_next_page(const Target& target, std::uint64_t lead) const;
  std::uint64_t bytes_left(std::int64_t tokens) const;
  bool needs_mapping(const Target& target) const;

  void share_rows(std::uint64_t source, std::uint64_t target, std::uint64_t rows);
  void map_shared(std::uint64_t slot, Extents extents);
  std::uint64_t cut_at(std::uint64_t slot, std::uint64_t rows);
  std::uint64_t shared_tokens(const Slot& slot) const noexcept;
  std::size_t extents_within(const Slot& slot, std::uint64_t rows) const noexcept;
  void copy_rows(std::uint64_t source, std::uint64_t target, std::uint64_t begin, std::uint64_t end);
  Fit fit(const Slot& slot, std::uint64_t rows) const noexcept;
  bool holds_every_slot(std::uint64_t budget_rows) const noexcept;
  std::uint64_t needed_rows() const noexcept;
  bool grow(const Targets& targets);
  void trim_to_fit(std::uint64_t slot, std::uint64_t rows);
  bool map_up_to(std::uint64_t slot, std::uint64_t rows);
  void map_more(std::uint64_t slot, std::uint64_t rows, bool idle_only);
  bool make_room(std::uint64_t rows, bool idle_only);
  void reclaim(std::uint64_t slot, std::uint64_t rows);
  std::vector<std::uint64_t> idle_slots() const;
  std::uint64_t best_idle_slot(std::uint64_t rows) const;

  void work() noexcept;
  template <typename Step>
  void attempt(Step step) noexcept;
  void record_failure(const char* what) noexcept;
  void prefetch_requested();
  void reclaim_ahead();
  void map_one_ahead();
  std::uint64_t threshold_rows() const noexcept;
  bool below_threshold() const noexcept;
  bool needs_slot_ahead() const;
  void release_all();

  const std::shared_ptr<TimedDevice> device_;
  const Geometry geometry_;
  Policy policy_;
  std::shared_ptr<Reservation> reservation_;
  PagePool pool_;
  SlotMap slots_;
  std::vector<std::uint64_t> goals_;  // rows of a slot that the call in progress must not reclaim; 0 outside of calls
  std::uint64_t ahead_rows_ = 0;
  Targets requested_;
  Counters counters_;
  bool closed_ = false;
  Worker worker_;  // last: its thread uses all of the above
};

}  // namespace vattention
