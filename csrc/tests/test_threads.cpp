// Threads that hammer every public call beside the worker. Meant for the thread sanitizer; the checks are real too.
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

#include "check.h"
#include "fixture.h"
#include "vattention/errors.h"
#include "vattention/host_device.h"

namespace vattention::test {
namespace {

// One request: prompt, decode with prefetch, check that nobody wrote here, free.
void serve(KVCache& cache, std::mt19937_64& random, std::uint8_t mark) {
  const std::int64_t prompt = 1 + static_cast<std::int64_t>(random() % 100);
  const std::uint64_t slot = cache.alloc(prompt);
  const SlotBytes bytes(cache, slot);
  const std::uint64_t token = cache.geometry().token_bytes();
  try {
    for (std::int64_t tokens = prompt; tokens < prompt + 12; ++tokens) {
      cache.prepare({{at(slot), tokens}});
      cache.prefetch({{at(slot), tokens + 1}});
      bytes.fill(0, static_cast<std::uint64_t>(tokens) * token, mark);
    }
    CHECK(bytes.holds(0, static_cast<std::uint64_t>(prompt) * token, mark));
  } catch (const OutOfMemory&) {  // four may not fit at once: this one gives way
  }
  cache.free(at(slot));
}

}  // namespace

TEST(threads_share_a_cache) {
  const std::uint64_t seed = fresh_seed();
  const auto cache = make_cache(std::make_shared<HostDevice>(), small_geometry(), 60, {true, 0.3});
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (std::uint64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937_64 random(seed + t);
      try {
        for (int i = 0; i < 40; ++i) serve(*cache, random, static_cast<std::uint8_t>(t + 1));
      } catch (const std::exception&) {
        ++failures;
      }
    });
  }
  threads.emplace_back([&] {
    for (int i = 0; i < 60; ++i) {
      cache->check_integrity();
      cache->map_ahead(i % 2 == 0 ? 40 : 0);
      try {
        cache->resize(budget(cache->geometry(), 60 + static_cast<std::uint64_t>(i % 5)));
      } catch (const OutOfMemory&) {  // the slots need more at this moment
      }
      cache->stats();
    }
  });
  for (std::thread& thread : threads) thread.join();
  CHECK_EQUAL(failures.load(), 0);
  cache->check_integrity();
}

TEST(close_may_race_with_everything) {
  for (int round = 0; round < 20; ++round) {
    const auto cache = make_cache(std::make_shared<HostDevice>(), small_geometry(), 60);
    std::thread user([&] {
      try {
        for (int i = 0; i < 100; ++i) {
          const std::uint64_t slot = cache->alloc(8);
          cache->prefetch({{at(slot), 8}});
          cache->free(at(slot));
        }
      } catch (const Error&) {  // the cache is closed
      }
    });
    std::thread closer([&] { cache->close(); });
    cache->close();
    user.join();
    closer.join();
    CHECK_EQUAL(cache->stats().created_bytes, 0U);
  }
}

}  // namespace vattention::test
