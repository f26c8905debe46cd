// The host device where the process may have no area more. Neither sanitizer survives that: these run in a plain
// program.
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "check.h"
#include "fixture.h"
#include "vattention/errors.h"
#include "vattention/host_device.h"

namespace vattention::test {
namespace {

std::uint64_t max_areas() {
  std::uint64_t count = 0;
  std::ifstream("/proc/sys/vm/max_map_count") >> count;
  return count;
}

}  // namespace

// Half of each slot stays empty, so that no two areas merge.
TEST(a_cache_at_the_limit_of_areas_is_out_of_memory_and_goes_on) {
  const std::uint64_t slots = 600, regions = 120;
  if (slots * regions <= max_areas() || max_areas() == 0) {
    std::printf("this kernel allows %llu areas: nothing to test\n", static_cast<unsigned long long>(max_areas()));
    return;
  }
  const Geometry geometry = small_geometry(slots, 8, regions);
  const auto cache = make_cache(std::make_shared<HostDevice>(), geometry, slots);
  std::int64_t used = 0;
  const auto fill = [&] {
    while (true) cache->prepare({{at(cache->alloc(0)), 4}}), ++used;
  };
  const auto error = CHECK_THROWS(OutOfMemory, fill());
  CHECK_EQUAL(error.available, static_cast<std::uint64_t>(used));
  CHECK_EQUAL(error.needed, error.available + 1);
  CHECK(std::string(error.what()).find("vm.max_map_count = " + std::to_string(max_areas())) != std::string::npos);
  cache->check_integrity();
  cache->free(used);  // the slot that got nothing
  for (std::int64_t slot = 0; slot < 10; ++slot) cache->free(slot);
  cache->prepare({{at(cache->alloc(0)), 8}});
  cache->check_integrity();
}

TEST(at_the_limit_of_areas_mapping_fails_and_undoing_does_not) {
  HostDevice device;
  constexpr std::uint64_t kPages = 70000;
  const Address base = device.reserve(2 * kPages * kPage);
  std::vector<Handle> mapped;
  std::string message;
  try {
    for (std::uint64_t i = 0; i < kPages; ++i) {
      const Handle handle = device.create(kPage);
      device.map(base + 2 * i * kPage, {handle});  // every other page: no two areas can merge
      mapped.push_back(handle);
    }
  } catch (const DeviceOutOfMemory& error) {
    message = error.what();
  }
  if (mapped.size() < kPages) CHECK(message.find("vm.max_map_count") != std::string::npos);
  for (std::uint64_t i = 0; i < mapped.size(); ++i) device.unmap(base + 2 * i * kPage, mapped[i]);
  device.map(base, {mapped[0]});
  device.release(base, 2 * kPages * kPage);
}

}  // namespace vattention::test
