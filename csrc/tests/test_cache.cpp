// What the cache promises, one behaviour a test.
#include <algorithm>
#include <string>

#include "check.h"
#include "fake_device.h"
#include "fixture.h"
#include "vattention/errors.h"
#include "vattention/host_device.h"

namespace vattention::test {
namespace {

std::uint64_t rows_of(KVCache& cache, std::uint64_t slot) {
  return std::get<2>(cache.slot_state(at(slot)));
}

}  // namespace

TEST(geometry_counts_rows_across_page_ends) {
  const Geometry geometry(1, 3000, 2, 10, kPage);  // 30,000 bytes in pages of 4096
  CHECK_EQUAL(geometry.rows_for(0), 0U);
  CHECK_EQUAL(geometry.rows_for(1), 1U);
  CHECK_EQUAL(geometry.rows_for(2), 2U);
  CHECK_EQUAL(geometry.slot_rows(), 8U);
  CHECK_EQUAL(geometry.offset_of(0, 1, 2), 10 * kPage);
}

TEST(geometry_refuses_what_cannot_be) {
  const auto error = CHECK_THROWS(std::invalid_argument, Geometry(1, 5000, 1, 1, kPage));
  CHECK(std::string(error.what()).find("5000") != std::string::npos);
  CHECK_THROWS(std::invalid_argument, Geometry(0, 1, 1, 1, kPage));
  CHECK_THROWS(std::invalid_argument, Geometry(1U << 20, kPage, 1U << 20, std::uint64_t{1} << 40, kPage));
  CHECK_THROWS(std::invalid_argument, Geometry(1, 1, 1, 1, std::uint64_t{0} - kPage));
  CHECK_THROWS(std::invalid_argument, Geometry(std::uint64_t{1} << 52, 1, 1, 1, kPage));
}

TEST(growth_maps_exactly_what_is_asked_in_few_handles) {
  const auto cache = make_cache(std::make_shared<AccountingDevice>(), small_geometry(), 200);
  const std::uint64_t slot = cache->alloc(600);
  cache->prepare({{at(slot), 600}});  // 150 rows = 2 x 64 + 16 + 4 + 2 x 1
  CHECK_EQUAL(rows_of(*cache, slot), 150U);
  CHECK_EQUAL(cache->stats().device[kMap].calls, 6 * cache->geometry().num_regions());
}

TEST(any_lengths_that_fit_can_be_prepared) {
  const auto cache = make_cache(std::make_shared<AccountingDevice>(), small_geometry(), 160);
  const std::uint64_t big = cache->alloc(600);
  cache->prepare({{at(big), 600}});
  cache->free(at(big));
  // One row at a time to the last, over memory that stands in large extents at an idle slot.
  const std::uint64_t a = cache->alloc(0), b = cache->alloc(0);
  for (std::int64_t row = 1; row <= 80; ++row) cache->prepare({{at(a), row * 4}, {at(b), row * 4}});
  cache->check_integrity();
  const auto error = CHECK_THROWS(OutOfMemory, cache->prepare({{at(a), 321}}));
  CHECK_EQUAL(error.needed, 161U);
  CHECK_EQUAL(error.available, 160U);
}

TEST(rows_ahead_of_active_slots_are_given_up) {
  const auto cache = make_cache(std::make_shared<AccountingDevice>(), small_geometry(), 100);
  const std::uint64_t a = cache->alloc(0), b = cache->alloc(0);
  cache->prepare({{at(a), 4}});
  cache->prefetch({{at(a), 400}});
  cache->wait();
  CHECK_EQUAL(rows_of(*cache, a), 100U);
  cache->prepare({{at(b), 396}});
  CHECK_EQUAL(rows_of(*cache, a), 1U);
  cache->check_integrity();
}

TEST(pages_that_are_due_together_are_mapped_one_a_step) {
  const auto cache = make_cache(std::make_shared<AccountingDevice>(), small_geometry(), 100);  // 4 tokens a page
  Targets targets;
  for (int i = 0; i < 3; ++i) targets.push_back({at(cache->alloc(0)), 1});
  cache->prepare(targets);
  for (std::uint64_t step = 0; step < 3; ++step) {
    for (Target& target : targets) ++target.tokens;
    cache->prefetch(targets, 3);
    cache->wait();
    for (std::uint64_t slot = 0; slot < 3; ++slot) CHECK_EQUAL(rows_of(*cache, slot), slot <= step ? 2U : 1U);
    cache->prepare(targets);
  }
  for (Target& target : targets) ++target.tokens;
  cache->prepare(targets);
  CHECK_EQUAL(cache->stats().counters.prepares_waited, 1U);  // the first: nobody had asked for it
  cache->check_integrity();
}

TEST(a_refused_prefetch_leaves_nothing_for_the_next_owner_of_a_slot) {
  const auto cache = make_cache(std::make_shared<AccountingDevice>(), small_geometry(), 100);
  const std::uint64_t slot = cache->alloc(0);
  CHECK_THROWS(std::invalid_argument, cache->prefetch({{at(slot), 80}, {5, 4}}));  // slot 5 is not allocated
  cache->free(at(slot));
  const std::uint64_t next = cache->alloc(0);
  cache->map_ahead(4);  // wakes the worker
  cache->wait();
  CHECK_EQUAL(next, slot);
  CHECK_EQUAL(rows_of(*cache, next), 0U);
}

TEST(a_lead_takes_no_more_than_one_page_and_nothing_from_others) {
  const auto cache = make_cache(std::make_shared<AccountingDevice>(), small_geometry(), 20);
  const std::uint64_t a = cache->alloc(0), b = cache->alloc(0);
  cache->prepare({{at(a), 40}});
  cache->prefetch({{at(a), 40}}, 400);
  cache->wait();
  CHECK_EQUAL(rows_of(*cache, a), 11U);
  cache->prepare({{at(b), 40}});  // which takes the page back
  cache->prefetch({{at(a), 40}, {at(b), 40}}, 4);
  cache->wait();
  CHECK_EQUAL(rows_of(*cache, a), 10U);
  CHECK_EQUAL(rows_of(*cache, b), 10U);
  CHECK_EQUAL(cache->stats().counters.prefetches_short, 0U);
  cache->check_integrity();
}

TEST(best_fit_prefers_most_kept_then_least_wasted) {
  const auto cache = make_cache(std::make_shared<AccountingDevice>(), small_geometry(), 300);
  const std::uint64_t small = cache->alloc(0), large = cache->alloc(0), exact = cache->alloc(0);
  cache->prepare({{at(small), 16 * 4}, {at(large), 128 * 4}, {at(exact), 64 * 4}});
  for (const std::uint64_t slot : {small, large, exact}) cache->free(at(slot));
  CHECK_EQUAL(cache->alloc(70 * 4), exact);     // 64 rows kept, none given away
  CHECK_EQUAL(cache->alloc(140 * 4), large);    // 128 rows kept
  const std::uint64_t fresh = cache->alloc(4);  // nothing can serve one row: an empty slot
  CHECK(fresh != small);
  CHECK_EQUAL(rows_of(*cache, small), 16U);
}

TEST(alloc_and_free_make_no_device_call_when_reclamation_is_deferred) {
  const auto cache = make_cache(std::make_shared<AccountingDevice>(), small_geometry(), 100);
  const std::uint64_t slot = cache->alloc(100);
  cache->prepare({{at(slot), 100}});
  const std::uint64_t unmaps = cache->stats().device[kUnmap].calls;
  cache->free(at(slot));
  CHECK_EQUAL(cache->alloc(100), slot);
  cache->prepare({{at(slot), 100}});
  CHECK_EQUAL(cache->stats().device[kUnmap].calls, unmaps);
  CHECK_EQUAL(cache->stats().counters.prepares_waited, 1U);
}

TEST(eager_reclamation_unmaps_at_once) {
  const auto cache = make_cache(std::make_shared<AccountingDevice>(), small_geometry(), 100, {false, 0.0});
  const std::uint64_t slot = cache->alloc(100);
  cache->prepare({{at(slot), 100}});
  cache->free(at(slot));
  CHECK_EQUAL(cache->stats().mapped_bytes, 0U);
}

TEST(worker_keeps_a_share_of_the_budget_free) {
  const auto cache = make_cache(std::make_shared<AccountingDevice>(), small_geometry(), 100, {true, 0.5});
  const std::uint64_t slot = cache->alloc(400);
  for (std::int64_t rows = 16; rows <= 96; rows += 16) cache->prepare({{at(slot), rows * 4}});
  cache->free(at(slot));
  CHECK_EQUAL(rows_of(*cache, slot), 96U);
  cache->prefetch({});
  const std::uint64_t after_one = rows_of(*cache, slot);
  CHECK(after_one < 96U && after_one > 48U);  // a little each time
  for (int more = 0; more < 5; ++more) cache->prefetch({});
  CHECK_EQUAL(rows_of(*cache, slot), 48U);  // whole extents of 16 rows, the fewest that leave 50 free
}

TEST(one_idle_slot_is_kept_mapped_ahead) {
  const auto cache = make_cache(std::make_shared<AccountingDevice>(), small_geometry(), 100);
  cache->map_ahead(40);
  cache->wait();
  const std::uint64_t slot = cache->alloc(40);
  CHECK_EQUAL(rows_of(*cache, slot), 10U);
  cache->prepare({{at(slot), 40}});
  CHECK_EQUAL(cache->stats().counters.prepares_waited, 0U);
  const std::uint64_t other = cache->alloc(0);
  cache->prepare({{at(other), 360}});  // the whole budget is there for those who need it
  cache->check_integrity();
}

TEST(shared_pages_are_never_written_through_two_slots) {
  const auto cache = make_cache(std::make_shared<HostDevice>(), small_geometry(), 200);
  const std::uint64_t source = cache->alloc(0), target = cache->alloc(0);
  cache->prepare({{at(source), 83}});  // 16 + 4 + 1 rows
  SlotBytes(*cache, source).fill(0, 20 * kPage, 7);
  CHECK_EQUAL(cache->share(at(source), at(target), 83), 80U);
  CHECK(SlotBytes(*cache, target).holds(0, 20 * kPage, 7));
  CHECK_EQUAL(cache->stats().mapped_bytes, 21 * cache->geometry().row_bytes());
  cache->prepare({{at(target), 100}});
  SlotBytes(*cache, target).fill(20 * kPage, 25 * kPage, 9);
  cache->free(at(source));
  const std::uint64_t next = cache->alloc(83);  // best fit would offer the shared pages of the freed slot
  cache->prepare({{at(next), 83}});
  SlotBytes(*cache, next).fill(0, 20 * kPage, 1);
  CHECK(SlotBytes(*cache, target).holds(0, 20 * kPage, 7));
  CHECK(SlotBytes(*cache, target).holds(20 * kPage, 25 * kPage, 9));
  cache->check_integrity();
}

TEST(sharing_stops_where_a_token_ends_with_a_page) {
  const Geometry geometry(2, 3 * kPage / 4, 4, 400, kPage);  // four tokens are three rows
  const auto cache = make_cache(std::make_shared<AccountingDevice>(), geometry, 300);
  const std::uint64_t source = cache->alloc(0), a = cache->alloc(0), b = cache->alloc(0);
  cache->prepare({{at(source), 8}});  // 6 rows = 4 + 1 + 1
  CHECK_EQUAL(cache->share(at(source), at(a), 3), 0U);
  CHECK_EQUAL(cache->share(at(source), at(a), 7), 4U);
  CHECK_EQUAL(cache->share(at(source), at(b), 8), 8U);
  cache->check_integrity();
}

// 513 tokens at once are extents of 64, 64 and 1 rows, page by page they are 129 of one row.
TEST(a_share_depends_on_lengths_only) {
  for (const bool cuts : {false, true}) {
    for (const std::int64_t step : {513, 4, 40}) {
      const auto device = std::make_shared<AccountingDevice>();
      device->cuts = cuts;
      const auto cache = make_cache(device, small_geometry(), 600);
      const std::uint64_t source = cache->alloc(0), target = cache->alloc(0);
      for (std::int64_t tokens = step; tokens < 513; tokens += step) cache->prepare({{at(source), tokens}});
      cache->prepare({{at(source), 513}});
      CHECK_EQUAL(cache->share(at(source), at(target), 303), 300U);
      CHECK_EQUAL(rows_of(*cache, target), 75U);
      CHECK_EQUAL(std::get<1>(cache->slot_state(at(target))), 300U);
      const std::uint64_t copied_rows = cuts || step == 4 ? 0 : step == 513 ? 11 : 1;
      CHECK_EQUAL(device->copied_bytes, copied_rows * cache->geometry().row_bytes());
      CHECK_EQUAL(cache->stats().mapped_bytes, (129 + copied_rows) * cache->geometry().row_bytes());
      cache->check_integrity();
    }
  }
}

// However a slot has grown, where extents may not be cut: nothing is copied, and lengths are exact.
TEST(shares_and_trims_end_at_multiples_of_small_extents) {
  std::mt19937_64 random(fresh_seed());
  for (int history = 0; history < 50; ++history) {
    const std::uint64_t unit = kClassRows[random() % 3];
    const auto device = std::make_shared<AccountingDevice>();
    device->cuts = false;
    const auto cache = make_cache(device, small_geometry(), 600, {true, 0.0, unit});
    const std::uint64_t source = cache->alloc(0), target = cache->alloc(0);
    std::int64_t tokens = 0;
    while (tokens < 513) {
      tokens = std::min<std::int64_t>(513, tokens + 1 + static_cast<std::int64_t>(random() % 130));
      cache->prepare({{at(source), tokens}});
      cache->prefetch({{at(source), std::min<std::int64_t>(600, tokens + 1)}}, 1);
    }
    const auto shared = static_cast<std::int64_t>(4 * unit * (1 + random() % (128 / unit)));
    CHECK_EQUAL(cache->share(at(source), at(target), shared), static_cast<std::uint64_t>(shared));
    CHECK_EQUAL(device->copied_bytes, 0U);
    CHECK_EQUAL(cache->trim(at(source), shared), static_cast<std::uint64_t>(shared));
    const std::int64_t kept = shared - 4 * static_cast<std::int64_t>(unit);
    CHECK_EQUAL(cache->trim(at(source), kept), static_cast<std::uint64_t>(kept));  // of shared rows, as a whole
    cache->check_integrity();
    cache->prepare({{at(source), 600}});
    cache->free(at(target));
    cache->check_integrity();
  }
  CHECK_THROWS(std::invalid_argument,
               make_cache(std::make_shared<AccountingDevice>(), small_geometry(), 600, {true, 0.0, 5}));
}

TEST(a_share_that_is_cut_or_copied_has_the_bytes_of_its_source) {
  for (const bool cuts : {false, true}) {
    const auto device = std::make_shared<FaultyDevice>(std::make_shared<HostDevice>());
    device->cuts = cuts;
    const auto cache = make_cache(device, small_geometry(), 400);
    const std::uint64_t source = cache->alloc(0), a = cache->alloc(0), b = cache->alloc(0);
    cache->prepare({{at(source), 513}});
    for (std::uint64_t row = 0; row < 129; ++row) {
      SlotBytes(*cache, source).fill(row * kPage, (row + 1) * kPage, static_cast<std::uint8_t>(row));
    }
    CHECK_EQUAL(cache->share(at(source), at(a), 300), 300U);
    CHECK_EQUAL(cache->share(at(a), at(b), 50), 48U);  // of one that shares itself
    cache->prepare({{at(a), 310}, {at(b), 60}});
    SlotBytes(*cache, a).fill(75 * kPage, 77 * kPage, 200);
    SlotBytes(*cache, b).fill(12 * kPage, 15 * kPage, 201);
    cache->check_integrity();
    for (std::uint64_t row = 0; row < 129; ++row) {
      const auto value = static_cast<std::uint8_t>(row);
      CHECK(SlotBytes(*cache, source).holds(row * kPage, (row + 1) * kPage, value));
      if (row < 75) CHECK(SlotBytes(*cache, a).holds(row * kPage, (row + 1) * kPage, value));
      if (row < 12) CHECK(SlotBytes(*cache, b).holds(row * kPage, (row + 1) * kPage, value));
    }
    cache->free(at(source));
    const std::uint64_t next = cache->alloc(600);
    cache->prepare({{at(next), 600}});
    SlotBytes(*cache, next).fill(0, 150 * kPage, 99);
    for (std::uint64_t row = 0; row < 75; ++row) {
      CHECK(SlotBytes(*cache, a).holds(row * kPage, (row + 1) * kPage, static_cast<std::uint8_t>(row)));
    }
    cache->check_integrity();
  }
}

TEST(a_share_without_room_for_its_copy_is_out_of_memory_and_changes_nothing) {
  const auto cache = make_cache(std::make_shared<AccountingDevice>(), small_geometry(), 70);
  const std::uint64_t source = cache->alloc(0), target = cache->alloc(0);
  cache->prepare({{at(source), 256}});  // one extent of 64 rows
  const auto error = CHECK_THROWS(OutOfMemory, cache->share(at(source), at(target), 32));
  CHECK_EQUAL(error.needed, 72U);
  CHECK_EQUAL(std::get<1>(cache->slot_state(at(target))), 0U);
  CHECK_EQUAL(cache->share(at(source), at(target), 27), 24U);
  cache->check_integrity();
}

TEST(a_trimmed_slot_gives_its_rows_to_others) {
  for (const bool cuts : {false, true}) {
    const auto device = std::make_shared<AccountingDevice>();
    device->cuts = cuts;
    const auto cache = make_cache(device, small_geometry(), 80);
    const std::uint64_t a = cache->alloc(0), b = cache->alloc(0);
    cache->prepare({{at(a), 303}});                            // 64 + 4 x 3 rows = 256 + 47 tokens
    CHECK_EQUAL(cache->trim(at(a), 265), cuts ? 265U : 272U);  // 67 rows end inside of the extent of rows 64 to 68
    CHECK_EQUAL(cache->trim(at(a), 101), cuts ? 101U : 256U);  // 26 rows end inside of the first one
    CHECK_EQUAL(cache->trim(at(a), 300), cuts ? 101U : 256U);  // a longer length asks for nothing
    CHECK_EQUAL(rows_of(*cache, a), 76U);
    cache->check_integrity();
    const std::int64_t rest = cuts ? 54 : 16;
    cache->prepare({{at(b), rest * 4}});
    CHECK_THROWS(OutOfMemory, cache->prepare({{at(b), rest * 4 + 1}}));
    cache->check_integrity();
    CHECK_EQUAL(cache->trim(at(b), 0), 0U);
    cache->prepare({{at(a), 303}});
    cache->check_integrity();
  }
}

TEST(a_slot_is_not_trimmed_below_what_another_one_shares) {
  const auto cache = make_cache(std::make_shared<AccountingDevice>(), small_geometry(), 200);
  const std::uint64_t source = cache->alloc(0), target = cache->alloc(0);
  cache->prepare({{at(source), 300}});
  CHECK_EQUAL(cache->share(at(source), at(target), 256), 256U);
  cache->prepare({{at(target), 290}});
  for (const std::uint64_t slot : {source, target}) {
    CHECK_THROWS(std::invalid_argument, cache->trim(at(slot), 255));
    CHECK_EQUAL(cache->trim(at(slot), 256), 256U);
  }
  cache->free(at(source));
  cache->reclaim_idle();
  CHECK_EQUAL(cache->trim(at(target), 0), 0U);
  cache->check_integrity();
}

// 256 tokens are one extent of 64 rows. A device that cannot cut it maps the 57 rows of the next request anew.
TEST(pages_of_a_freed_slot_serve_a_shorter_request) {
  for (const bool cuts : {false, true}) {
    const auto device = std::make_shared<AccountingDevice>();
    device->cuts = cuts;
    const auto cache = make_cache(device, small_geometry(), 600);
    const std::uint64_t first = cache->alloc(256);
    cache->prepare({{at(first), 256}});
    cache->free(at(first));
    const DeviceStats before = cache->stats().device;
    const std::uint64_t second = cache->alloc(226);
    cache->prepare({{at(second), 226}});
    CHECK_EQUAL(second == first, cuts);
    const DeviceStats after = cache->stats().device;
    const std::uint64_t calls = after[kCreate].calls + after[kMap].calls + after[kUnmap].calls + after[kDestroy].calls -
                                before[kCreate].calls - before[kMap].calls - before[kUnmap].calls -
                                before[kDestroy].calls;
    CHECK_EQUAL(calls, cuts ? 0U : 2U * 3U * 6U);  // 57 rows = 3 x 16 + 2 x 4 + 1, in three regions
    for (std::int64_t tokens = 227; tokens <= 256; ++tokens) cache->prepare({{at(second), tokens}});
    CHECK_EQUAL(cache->stats().device[kUnmap].calls, 0U);
    cache->check_integrity();
  }
}

// Six slots of 150 rows: with 900 rows no length can lack memory because an extent is used past another one.
TEST(where_the_budget_holds_every_slot_pages_serve_a_shorter_request_uncut) {
  const auto device = std::make_shared<AccountingDevice>();
  const Geometry geometry = small_geometry();
  const auto cache = make_cache(device, geometry, 900);
  const std::uint64_t first = cache->alloc(256);
  cache->prepare({{at(first), 256}});
  cache->free(at(first));
  const std::uint64_t maps = cache->stats().device[kMap].calls;
  const std::uint64_t second = cache->alloc(226);
  CHECK_EQUAL(second, first);
  for (std::int64_t tokens = 226; tokens <= 256; ++tokens) cache->prepare({{at(second), tokens}});
  CHECK_EQUAL(cache->stats().device[kMap].calls, maps);
  CHECK_EQUAL(cache->stats().device[kUnmap].calls, 0U);
  CHECK_EQUAL(cache->trim(at(second), 30), 256U);
  cache->check_integrity();
  cache->free(at(second));
  const std::uint64_t third = cache->alloc(10);
  cache->prepare({{at(third), 10}});
  CHECK_EQUAL(cache->stats().idle_bytes, 0U);  // the extent is used whole
  CHECK_EQUAL(CHECK_THROWS(OutOfMemory, cache->resize(budget(geometry, 899))).needed, 900U);
  Targets all{{at(third), 600}};
  for (int i = 0; i < 5; ++i) all.push_back({at(cache->alloc(0)), 600});
  cache->prepare(all);
  cache->resize(budget(geometry, 900));
  cache->free(at(third));
  cache->resize(budget(geometry, 750));
  cache->check_integrity();
}

TEST(rows_past_a_cut_are_idle_and_serve_others) {
  const auto device = std::make_shared<AccountingDevice>();
  device->cuts = true;
  const auto cache = make_cache(device, small_geometry(), 64);
  const std::uint64_t first = cache->alloc(256);
  cache->prepare({{at(first), 256}});
  cache->free(at(first));
  const std::uint64_t a = cache->alloc(226), b = cache->alloc(0);
  cache->prepare({{at(a), 226}});
  CHECK_EQUAL(a, first);
  CHECK_EQUAL(cache->stats().idle_bytes, 7 * cache->geometry().row_bytes());
  cache->prepare({{at(b), 28}});
  CHECK_EQUAL(rows_of(*cache, a), 57U);
  CHECK_THROWS(OutOfMemory, cache->prepare({{at(a), 229}}));
  cache->check_integrity();
}

TEST(resize_takes_idle_memory_and_refuses_to_starve_slots) {
  const auto device = std::make_shared<AccountingDevice>();
  const Geometry geometry = small_geometry();
  const auto cache = make_cache(device, geometry, 100);
  const std::uint64_t slot = cache->alloc(0), idle = cache->alloc(0);
  cache->prepare({{at(slot), 40}, {at(idle), 256}});
  cache->free(at(idle));
  CHECK_THROWS(OutOfMemory, cache->resize(budget(geometry, 9)));
  cache->resize(budget(geometry, 10));
  CHECK_EQUAL(device->physical_bytes(), 10 * geometry.row_bytes());
  CHECK_THROWS(OutOfMemory, cache->prepare({{at(slot), 44}}));
  cache->resize(budget(geometry, 11));
  cache->prepare({{at(slot), 44}});
  cache->check_integrity();
}

TEST(pool_is_created_ahead_and_serves_growth_without_creating) {
  const Geometry geometry = small_geometry();
  const auto cache = make_cache(std::make_shared<AccountingDevice>(), geometry, 100);
  cache->fill_pool(budget(geometry, 1000));
  CHECK_EQUAL(cache->stats().created_bytes, 100 * geometry.row_bytes());
  CHECK_EQUAL(cache->stats().mapped_bytes, 0U);
  const std::uint64_t created = cache->stats().device[kCreate].calls;
  const std::uint64_t slot = cache->alloc(0);
  cache->prepare({{at(slot), 4}});
  CHECK_EQUAL(cache->stats().device[kCreate].calls, created);
}

TEST(a_device_with_less_memory_than_the_budget_says_how_much) {
  const auto device = std::make_shared<AccountingDevice>();
  const Geometry geometry = small_geometry();
  const auto cache = make_cache(device, geometry, 100);
  device->limit_bytes = 50 * geometry.row_bytes();
  const std::uint64_t a = cache->alloc(0), b = cache->alloc(0);
  cache->prepare({{at(a), 120}});
  const auto error = CHECK_THROWS(OutOfMemory, cache->prepare({{at(b), 120}}));
  CHECK_EQUAL(error.available, 30U);
  cache->check_integrity();
  cache->prepare({{at(b), 80}});
  CHECK_EQUAL(device->physical_bytes(), 50 * geometry.row_bytes());
}

TEST(a_device_with_room_for_few_mappings_takes_them_from_the_idle_and_then_says_how_many) {
  const auto device = std::make_shared<AccountingDevice>();
  const Geometry geometry = small_geometry();
  const auto cache = make_cache(device, geometry, 100);
  device->limit_mappings = 20 * geometry.num_regions();
  const std::uint64_t idle = cache->alloc(0), a = cache->alloc(0), b = cache->alloc(0);
  for (std::int64_t tokens = 4; tokens <= 40; tokens += 4) cache->prepare({{at(idle), tokens}, {at(a), tokens}});
  cache->free(at(idle));
  cache->prepare({{at(b), 4}});
  CHECK_EQUAL(rows_of(*cache, idle), 0U);
  cache->check_integrity();
  for (std::int64_t tokens = 8; tokens <= 40; tokens += 4) cache->prepare({{at(b), tokens}});
  const auto error = CHECK_THROWS(OutOfMemory, cache->prepare({{at(a), 44}, {at(b), 44}}));
  CHECK_EQUAL(error.available, 20U);
  CHECK_EQUAL(error.needed, 21U);
  CHECK(std::string(error.what()).find("the table is full") != std::string::npos);
  CHECK_EQUAL(device->mapped_bytes(), 20 * geometry.row_bytes());
  cache->check_integrity();
  cache->free(at(a));
  cache->prepare({{at(b), 44}});
  cache->check_integrity();
}

TEST(wrong_arguments_are_named_with_their_numbers) {
  const auto cache = make_cache(std::make_shared<AccountingDevice>(), small_geometry(), 100);
  const auto past = CHECK_THROWS(std::invalid_argument, cache->alloc(601));
  CHECK(std::string(past.what()).find("600") != std::string::npos);
  CHECK_THROWS(std::invalid_argument, cache->prepare({{0, 4}}));  // not allocated
  CHECK_THROWS(std::invalid_argument, cache->prepare({{-1, 4}}));
  CHECK_THROWS(std::invalid_argument, cache->free(6));
  const std::uint64_t slot = cache->alloc(0);
  CHECK_THROWS(std::invalid_argument, cache->prepare({{at(slot), 4}, {at(slot), 601}}));
  CHECK_EQUAL(rows_of(*cache, slot), 0U);
  CHECK_THROWS(std::invalid_argument, cache->claim(at(slot)));
  CHECK_THROWS(std::invalid_argument, cache->share(at(slot), at(slot), 0));
  CHECK_THROWS(std::invalid_argument, make_cache(std::make_shared<AccountingDevice>(), Geometry(1, 8, 1, 1, 6000), 4));
  CHECK_THROWS(std::invalid_argument, make_cache(std::make_shared<AccountingDevice>(), small_geometry(), 0));
}

TEST(close_unmaps_before_the_addresses_may_be_anybodys) {
  const auto device = std::make_shared<AccountingDevice>();
  const auto cache = make_cache(device, small_geometry(), 100);
  cache->prepare({{at(cache->alloc(0)), 200}});
  cache->close();
  CHECK_EQUAL(device->reserved_bytes(), 0U);
  CHECK(!device->released_while_mapped);
}

TEST(close_releases_memory_now_and_addresses_with_the_last_user) {
  const auto device = std::make_shared<AccountingDevice>();
  auto cache = make_cache(device, small_geometry(), 100);
  cache->prepare({{at(cache->alloc(0)), 200}});
  auto tensor = cache->reservation();
  cache->close();
  cache->close();
  CHECK_EQUAL(device->physical_bytes(), 0U);
  CHECK_EQUAL(device->mapped_bytes(), 0U);
  CHECK_THROWS(Error, cache->alloc(0));
  cache.reset();
  CHECK(device->reserved_bytes() > 0);
  tensor.reset();
  CHECK_EQUAL(device->reserved_bytes(), 0U);
}

}  // namespace vattention::test
