// The host device by itself: pages keep their bytes, merge into few areas, and fail with a usable message.
#include <fstream>
#include <string>
#include <vector>

#include "check.h"
#include "fixture.h"
#include "vattention/errors.h"
#include "vattention/host_device.h"

namespace vattention::test {
namespace {

std::uint8_t& byte_at(Address at) {
  return *reinterpret_cast<std::uint8_t*>(at);
}

// Areas with pages of the memfd in them, as the kernel counts.
std::uint64_t mapped_areas(Address base, std::uint64_t bytes) {
  std::ifstream maps("/proc/self/maps");
  std::uint64_t count = 0;
  for (std::string line; std::getline(maps, line);) {
    const Address begin = std::stoull(line, nullptr, 16);
    if (begin >= base && begin < base + bytes && line.find("memfd:vattention") != std::string::npos) ++count;
  }
  return count;
}

std::uint64_t max_areas() {
  std::uint64_t count = 0;
  std::ifstream("/proc/sys/vm/max_map_count") >> count;
  return count;
}

}  // namespace

TEST(one_handle_stands_at_several_addresses) {
  HostDevice device;
  const Address base = device.reserve(8 * kPage);
  const Handle handle = device.create(2 * kPage);
  device.map(base, {handle});
  device.map(base + 4 * kPage, {handle});
  byte_at(base + kPage) = 42;
  CHECK_EQUAL(byte_at(base + 5 * kPage), 42);
  device.unmap(base, handle);
  CHECK_EQUAL(byte_at(base + 5 * kPage), 42);
  device.unmap(base + 4 * kPage, handle);
  device.destroy(handle);
  device.release(base, 8 * kPage);
}

TEST(destroyed_pages_come_back_empty) {
  HostDevice device;
  const Address base = device.reserve(kPage);
  const Handle first = device.create(kPage);
  device.map(base, {first});
  byte_at(base) = 42;
  device.unmap(base, first);
  device.destroy(first);
  const Handle second = device.create(kPage);
  device.map(base, {second});
  CHECK_EQUAL(byte_at(base), 0);
  device.release(base, kPage);
}

TEST(neighbours_are_one_area_in_whatever_order_they_were_created_and_mapped) {
  HostDevice device;
  const Address base = device.reserve(8 * kPage);
  const Handle a = device.create(kPage), b = device.create(2 * kPage), c = device.create(kPage);
  device.map(base + 3 * kPage, {a});
  device.map(base, {c, b});
  CHECK_EQUAL(mapped_areas(base, 8 * kPage), 1U);
  device.unmap(base + kPage, b);
  CHECK_EQUAL(mapped_areas(base, 8 * kPage), 2U);
  device.map(base + 4 * kPage, {b});
  CHECK_EQUAL(mapped_areas(base, 8 * kPage), 2U);
  device.release(base, 8 * kPage);
}

TEST(a_page_that_stands_elsewhere_only_is_not_the_next_one_at_its_first_address) {
  HostDevice device;
  const Address base = device.reserve(8 * kPage);
  const Handle shared = device.create(2 * kPage), next = device.create(4 * kPage), last = device.create(2 * kPage);
  device.map(base + kPage, {shared});
  device.map(base + 5 * kPage, {shared});
  device.unmap(base + kPage, shared);
  byte_at(base + 5 * kPage) = 42;
  device.map(base, {next});
  byte_at(base + kPage) = 43;
  CHECK_EQUAL(byte_at(base + 5 * kPage), 42);
  device.unmap(base, next);
  CHECK_EQUAL(byte_at(base + 5 * kPage), 42);
  device.unmap(base + 5 * kPage, shared);
  device.map(base + kPage, {last});
  CHECK_EQUAL(byte_at(base + kPage), 0);
  device.release(base, 8 * kPage);
}

TEST(a_full_house_that_grows_page_by_page_stays_below_the_limit_of_areas) {
  const Geometry geometry = small_geometry(128, 48, 60);
  const auto cache = make_cache(std::make_shared<HostDevice>(), geometry, 128 * 12);  // a page each: 92,160 areas
  Targets targets;
  for (std::uint64_t i = 0; i < 128; ++i) targets.push_back({at(cache->alloc(0)), 0});
  for (std::int64_t tokens = 4; tokens <= 48; tokens += 4) {
    for (Target& target : targets) target.tokens = tokens;
    cache->prepare(targets);
  }
  CHECK(mapped_areas(cache->reservation()->base(), geometry.total_bytes()) <= 128U * 60U);
  cache->check_integrity();
}

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
