// An allocation of the process that fails, for every allocation: the accounting stays consistent and the cache usable.
#include <algorithm>
#include <new>
#include <vector>

#include "check.h"
#include "failing_new.h"
#include "fake_device.h"
#include "fixture.h"
#include "vattention/errors.h"
#include "vattention/host_device.h"

namespace vattention::test {
namespace {

constexpr std::uint64_t kRows = 120;

std::shared_ptr<Device> book_device() {
  return std::make_shared<AccountingDevice>();
}

std::shared_ptr<Device> cutting_device() {
  auto device = std::make_shared<AccountingDevice>();
  device->cuts = true;
  return device;
}

std::shared_ptr<Device> host_device() {
  return std::make_shared<HostDevice>();
}

// Visits every kind of call; any of its steps may fail, and the next still makes sense. Whoever is refused an action
// finds every prepared length as it was.
class History {
 public:
  explicit History(KVCache& cache) : cache_(cache), tokens_(cache.geometry().num_slots()) {}

  void run() {
    const Geometry& geometry = cache_.geometry();
    step([&] { cache_.fill_pool(budget(geometry, 40)); });
    std::uint64_t a = 0, b = 0, c = 0, d = 0;
    step([&] { a = cache_.alloc(0); });
    step([&] { b = cache_.alloc(0); });
    step([&] { cache_.prepare({{at(a), 88}, {at(b), 20}}); });
    step([&] { cache_.prefetch({{at(a), 100}, {at(b), 24}}); });
    step([&] { cache_.wait(); });
    step([&] { c = cache_.alloc(0); });
    step([&] { cache_.share(at(a), at(c), std::min<std::int64_t>(50, at(tokens_of(a)))); });
    step([&] { cache_.prepare({{at(c), 90}}); });
    step([&] { cache_.trim(at(c), 63); });
    step([&] { cache_.free(at(a)); });
    step([&] { cache_.map_ahead(10); });
    step([&] { d = cache_.alloc(50); });
    step([&] { cache_.prepare({{at(d), 50}, {at(b), 60}}); });
    step([&] { cache_.resize(budget(geometry, 70)); });
    step([&] { cache_.set_deferred_reclamation(false); });
    step([&] { cache_.free(at(c)); });
    step([&] { cache_.prepare({{at(b), 120}}); });
    step([&] { cache_.reclaim_idle(); });
    step([&] { cache_.resize(budget(geometry, kRows)); });
    step([&] { cache_.stats(); });
  }

 private:
  std::uint64_t tokens_of(std::uint64_t slot) { return std::get<1>(cache_.slot_state(at(slot))); }

  std::vector<std::uint64_t> all_tokens() {
    std::vector<std::uint64_t> tokens;
    for (std::uint64_t s = 0; s < cache_.geometry().num_slots(); ++s) tokens.push_back(tokens_of(s));
    return tokens;
  }

  template <typename Step>
  void step(Step action) {
    bool refused = false;
    try {
      action();
    } catch (const std::bad_alloc&) {
      refused = true;
    } catch (const Error&) {                  // an earlier failure left less memory
    } catch (const std::invalid_argument&) {  // an earlier failure left a slot unallocated or shorter
    }
    const FailingNew::Pause pause;
    cache_.check_integrity();
    const std::vector<std::uint64_t> tokens = all_tokens();
    if (refused) CHECK(tokens == tokens_);
    tokens_ = tokens;
  }

  KVCache& cache_;
  std::vector<std::uint64_t> tokens_;  // prepared length of each slot
};

void check_still_usable(KVCache& cache) {
  cache.check_integrity();
  for (std::uint64_t s = 0; s < cache.geometry().num_slots(); ++s) {
    if (std::get<0>(cache.slot_state(at(s)))) cache.free(at(s));
  }
  cache.resize(budget(cache.geometry(), kRows));
  cache.prepare({{at(cache.alloc(0)), kRows * 4}});
  cache.check_integrity();
  CHECK_EQUAL(cache.stats().mapped_bytes, kRows * cache.geometry().row_bytes());
  cache.close();
  CHECK_EQUAL(cache.stats().created_bytes, 0U);
}

// Fails `length` allocations in a row from every `length / 4`-th on; returns how many a history makes.
std::uint64_t fail_everywhere(std::shared_ptr<Device> (*open)(), std::uint64_t length) {
  std::uint64_t call = 0;
  for (bool reached = true; reached; call += std::max<std::uint64_t>(1, length / 4)) {
    const auto cache = make_cache(open(), small_geometry(), kRows);
    {
      History history(*cache);
      const FailingNew failing(call, length);
      history.run();
      const FailingNew::Pause pause;
      cache->wait();
      reached = failing.has_failed();
    }
    check_still_usable(*cache);
  }
  return call;
}

}  // namespace

TEST(every_allocation_fails_once_on_a_device_that_copies) {
  CHECK(fail_everywhere(book_device, 1) > 150);
}

TEST(every_allocation_fails_once_on_a_device_that_cuts) {
  CHECK(fail_everywhere(cutting_device, 1) > 150);
}

TEST(every_allocation_fails_once_on_the_host) {
  CHECK(fail_everywhere(host_device, 1) > 150);
}

TEST(twenty_allocations_in_a_row_fail_everywhere) {
  CHECK(fail_everywhere(book_device, 20) > 150);
  CHECK(fail_everywhere(host_device, 20) > 150);
}

TEST(a_construction_without_memory_throws_and_leaves_nothing) {
  bool constructed = false;
  for (std::uint64_t call = 0; !constructed; ++call) {
    const auto device = std::make_shared<AccountingDevice>();
    try {
      const FailingNew failing(call, 1);
      const auto cache = make_cache(device, small_geometry(), kRows);
      constructed = true;
    } catch (const std::bad_alloc&) {
      CHECK_EQUAL(device->reserved_bytes(), 0U);
    }
  }
}

}  // namespace vattention::test
