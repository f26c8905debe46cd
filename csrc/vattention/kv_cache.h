// The cache: which slot gets which rows, when they are mapped and taken back, and who may touch the books. Layers, data
// types and tensors are Python's (vattention/kv_cache.py).
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
  double reclaim_threshold = 0.1;    // share of the budget that the worker, after each prefetch, tries to keep free
  std::uint64_t max_extent_rows = kClassRows.back();  // see PagePool
};

struct Target {
  std::int64_t slot;
  std::int64_t tokens;
};
using Targets = std::vector<Target>;

struct Counters {
  std::uint64_t prepares = 0, prepares_waited = 0;     // waited: something had to be mapped before it returned
  std::uint64_t prefetches = 0, prefetches_short = 0;  // short: a slot's rows that the budget had no room for
  std::uint64_t rows_prefetched = 0, rows_reclaimed = 0;
  std::uint64_t worker_failures = 0;
  std::string worker_error;  // the last one, empty if there was none
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

// Threads may share a cache: every call first waits for the worker to be idle, then owns the books. The promise: any
// lengths of the active slots whose rows_for() add up to at most capacity_rows() can be prepared.
//
// A call that throws, whatever the exception, leaves the books whole and the prepared lengths as they were. In a forked
// child every call throws ForkError, but close() and the destructor, which do nothing there.
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
  // lead_tokens: of the slots that have enough, the one nearest to the end of its page is mapped a page further where
  // it would need that within so many tokens.
  void prefetch(const Targets& targets, std::int64_t lead_tokens = 0);
  void wait();
  // Gives `target` the first tokens of `source`, as many of `tokens` as end together with a page, and returns how many.
  // Pages are shared; where a page handle straddles the end of the share it is cut, or its rows are copied: never at a
  // multiple of Policy::max_extent_rows, where that is less than the largest extent.
  std::uint64_t share(std::int64_t source, std::int64_t target, std::int64_t tokens);
  // Shortens the prepared length and returns it; the rows behind become idle, those that others share are unmapped.
  // Where an extent that straddles the new length cannot be cut, the length ends with the extent.
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
  // The leading part of a slot that may serve a length: private extents, and `cut_rows` rows of the next one, which has
  // to be cut.
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
  std::int64_t cut(std::int64_t tokens, const char* name = "tokens") const;
  Target a_page_further(const Target& target, std::uint64_t lead) const;
  std::uint64_t bytes_left(std::int64_t tokens) const;
  bool lacks(const Target& target) const;

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
  void clear_way(std::uint64_t slot, std::uint64_t rows);
  bool map_up_to(std::uint64_t slot, std::uint64_t rows);
  void map_more(std::uint64_t slot, std::uint64_t rows, bool idle_only);
  bool make_room(std::uint64_t rows, bool idle_only);
  void reclaim(std::uint64_t slot, std::uint64_t rows);
  std::vector<std::uint64_t> idle_slots() const;
  std::uint64_t best_idle_slot(std::uint64_t rows) const;

  void work() noexcept;
  template <typename Step>
  void attempt(Step step) noexcept;
  void note_failure(const char* what) noexcept;
  void prefetch_requested();
  void reclaim_ahead();
  void map_one_ahead();
  std::uint64_t threshold_rows() const noexcept;
  bool below_threshold() const noexcept;
  bool lacks_slot_ahead() const;
  void release_everything();

  const std::shared_ptr<TimedDevice> device_;
  const Geometry geometry_;
  Policy policy_;
  std::shared_ptr<Reservation> reservation_;
  PagePool pool_;
  SlotMap slots_;
  std::vector<std::uint64_t> goals_;  // rows of a slot that the call in progress must not take back; 0 outside of calls
  std::uint64_t ahead_rows_ = 0;
  Targets requested_;
  Counters counters_;
  bool closed_ = false;
  Worker worker_;  // last: its thread uses all of the above
};

}  // namespace vattention
