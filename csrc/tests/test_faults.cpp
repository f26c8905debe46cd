// A device that fails at call N, for every N: nothing stays partly mapped, nothing is lost, the cache is usable.
#include "check.h"
#include "fake_device.h"
#include "fixture.h"
#include "vattention/errors.h"

namespace vattention::test {
namespace {

constexpr std::uint64_t kRows = 120;

struct Rig {
  explicit Rig(bool cuts = false) { accounting->cuts = cuts; }

  std::shared_ptr<AccountingDevice> accounting = std::make_shared<AccountingDevice>();
  std::shared_ptr<FaultyDevice> device = std::make_shared<FaultyDevice>(accounting);
  Geometry geometry = small_geometry();
  std::unique_ptr<KVCache> cache = make_cache(device, geometry, kRows);
};

// A history that visits every kind of call, written so that any of its steps may fail and the next still make sense.
class History {
 public:
  explicit History(Rig& rig) : rig_(rig), cache_(*rig.cache) {}

  void run() {
    step([this] { cache_.fill_pool(budget(rig_.geometry, 40)); });
    const std::uint64_t a = cache_.alloc(0), b = cache_.alloc(0);
    step([&] { cache_.prepare({{at(a), 88}, {at(b), 20}}); });
    step([&] { cache_.prefetch({{at(a), 100}, {at(b), 24}}); });
    step([&] { cache_.wait(); });
    const std::uint64_t c = cache_.alloc(0);
    step([&] { cache_.share(at(a), at(c), std::min<std::int64_t>(50, at(std::get<1>(cache_.slot_state(at(a)))))); });
    step([&] { cache_.prepare({{at(c), 90}}); });
    step([&] { cache_.trim(at(c), 63); });
    cache_.free(at(a));
    const std::uint64_t d = cache_.alloc(50);
    step([&] { cache_.prepare({{at(d), 50}, {at(b), 60}}); });
    step([&] { cache_.resize(budget(rig_.geometry, 70)); });
    step([&] { cache_.set_deferred_reclamation(false); });
    step([&] { cache_.free(at(c)); });
    step([&] { cache_.prepare({{at(b), 120}}); });
    step([&] { cache_.resize(budget(rig_.geometry, kRows)); });
  }
  std::uint64_t failures() const { return failures_; }

 private:
  template <typename Step>
  void step(Step action) {
    try {
      action();
    } catch (const DeviceError&) {
      ++failures_;
    } catch (const OutOfMemory&) {  // a failed resize upward or an unfinished unmapping leaves less
      ++failures_;
    } catch (const std::invalid_argument&) {  // a length that an earlier failure kept from being prepared
      ++failures_;
    }
    cache_.check_integrity();
  }

  Rig& rig_;
  KVCache& cache_;
  std::uint64_t failures_ = 0;
};

std::uint64_t mapped_by_stats(KVCache& cache) {
  std::uint64_t rows = 0;
  for (std::uint64_t s = 0; s < cache.geometry().num_slots(); ++s) rows += std::get<2>(cache.slot_state(at(s)));
  return rows * cache.geometry().row_bytes();
}

// Once the device works again, so must the cache: one slot takes the whole budget, and close() leaves nothing behind.
void check_still_usable(Rig& rig) {
  rig.device->heal();
  KVCache& cache = *rig.cache;
  for (std::uint64_t s = 0; s < rig.geometry.num_slots(); ++s) {
    if (std::get<0>(cache.slot_state(at(s)))) cache.free(at(s));
  }
  cache.resize(budget(rig.geometry, kRows));
  const std::uint64_t slot = cache.alloc(0);
  cache.prepare({{at(slot), kRows * 4}});
  cache.check_integrity();
  CHECK_EQUAL(rig.accounting->mapped_bytes(), kRows * rig.geometry.row_bytes());
  cache.close();
  CHECK_EQUAL(rig.accounting->mapped_bytes(), 0U);
  CHECK_EQUAL(rig.accounting->physical_bytes(), 0U);
}

void fail_everywhere(std::uint64_t length, bool cuts = false) {
  std::uint64_t call = 0;
  for (bool reached = true; reached; ++call) {
    Rig rig(cuts);
    rig.device->fail_at(call, length);
    History history(rig);
    history.run();
    reached = rig.device->has_failed();
    // One failure is undone on the spot. With more, what could not be undone is finished when the slot is next used.
    if (length == 1) CHECK(rig.accounting->mapped_bytes() >= mapped_by_stats(*rig.cache));
    check_still_usable(rig);
  }
  CHECK(call > 100);
}

}  // namespace

TEST(a_failure_at_every_call) {
  fail_everywhere(1);
}

TEST(a_failure_at_every_call_of_a_device_that_cuts) {
  fail_everywhere(1, true);
  fail_everywhere(2, true);
}

TEST(two_failures_in_a_row_at_every_call) {
  fail_everywhere(2);
}

TEST(a_hundred_failures_in_a_row_at_every_call) {
  fail_everywhere(100);
}

TEST(growth_is_all_or_nothing_at_every_call) {
  bool succeeded = false;
  for (std::uint64_t call = 0; !succeeded; ++call) {
    Rig rig;
    const std::uint64_t a = rig.cache->alloc(0), b = rig.cache->alloc(0);
    rig.cache->prepare({{at(a), 8}});
    rig.device->fail_at(call, 1);
    try {
      rig.cache->prepare({{at(a), 100}, {at(b), 100}});
      succeeded = true;
    } catch (const DeviceError&) {
      CHECK_EQUAL(std::get<1>(rig.cache->slot_state(at(a))), 8U);
      CHECK_EQUAL(std::get<1>(rig.cache->slot_state(at(b))), 0U);
      CHECK_EQUAL(rig.accounting->mapped_bytes(), mapped_by_stats(*rig.cache));
    }
    rig.cache->check_integrity();
    check_still_usable(rig);
  }
}

TEST(failures_on_the_worker_are_counted_and_thrown_to_nobody) {
  Rig rig;
  const std::uint64_t slot = rig.cache->alloc(0);
  rig.device->fail_at(0, 1);
  rig.cache->prefetch({{at(slot), 40}});
  rig.cache->wait();
  CHECK_EQUAL(rig.cache->stats().counters.worker_failures, 1U);
  CHECK(rig.cache->stats().counters.worker_error.find("told to") != std::string::npos);
  rig.cache->prepare({{at(slot), 40}});
  check_still_usable(rig);
}

TEST(close_reports_a_failure_and_the_destructor_survives_it) {
  Rig rig;
  rig.cache->prepare({{at(rig.cache->alloc(0)), 40}});
  rig.device->fail_at(0, 1000);
  CHECK_THROWS(DeviceError, rig.cache->close());
  rig.cache.reset();
}

}  // namespace vattention::test
