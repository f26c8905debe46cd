// The host device by itself: pages keep their bytes, merge into few areas, and fail with a usable message.
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

TEST(at_the_limit_of_areas_mapping_fails_and_undoing_does_not) {
  HostDevice device;
  constexpr std::uint64_t kPages = 70000;
  const Address base = device.reserve(2 * kPages * kPage);
  std::vector<Handle> mapped;
  std::string message;
  try {
    for (std::uint64_t i = 0; i < kPages; ++i) {
      const Handle handle = device.create(2 * kPage);  // every other page: no two areas can merge
      device.map(base + 2 * i * kPage, {{handle.id, kPage}});
      mapped.push_back({handle.id, kPage});
    }
  } catch (const DeviceError& error) {
    message = error.what();
  }
  if (mapped.size() < kPages) CHECK(message.find("vm.max_map_count") != std::string::npos);
  for (std::uint64_t i = 0; i < mapped.size(); ++i) device.unmap(base + 2 * i * kPage, mapped[i]);
  device.map(base, {mapped[0]});
  device.release(base, 2 * kPages * kPage);
}

}  // namespace vattention::test
