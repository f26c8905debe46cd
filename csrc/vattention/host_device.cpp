#include "vattention/host_device.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>

#include "vattention/errors.h"

namespace vattention {
namespace {

constexpr std::uint64_t kFileBytes = std::uint64_t{1} << 62;  // sparse: holes cost nothing
constexpr std::uint64_t kElsewhere = std::uint64_t{1} << 60;  // past every address
constexpr std::uint64_t kAreasACall = 2;                      // at most: an area is cut in three
constexpr int kHidden = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

void* pointer(Address at) {
  return reinterpret_cast<void*>(at);
}

// How many areas a process may have; more than it ever has where the kernel does not say.
std::uint64_t max_areas() {
  std::uint64_t count = 0;
  return std::ifstream("/proc/sys/vm/max_map_count") >> count ? count : kFileBytes;
}

std::uint64_t used_areas() {
  std::ifstream maps("/proc/self/maps");
  std::uint64_t count = 0;
  for (std::string area; std::getline(maps, area);) ++count;
  return count;
}

[[noreturn]] void fail(const std::string& call, int error) {
  const std::string text = call + " failed: " + std::strerror(error);
  if (error != ENOMEM) throw DeviceError(text);
  throw DeviceOutOfMemory(text);
}

}  // namespace

HostDevice::HostDevice() : page_bytes_(static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE))), next_elsewhere_(kElsewhere) {
  file_ = memfd_create("vattention", MFD_CLOEXEC);
  if (file_ < 0) fail("memfd_create", errno);
  if (ftruncate(file_, static_cast<off_t>(kFileBytes)) != 0) {
    const int error = errno;
    close(file_);
    fail("ftruncate of the memfd", error);
  }
}

HostDevice::~HostDevice() {
  close(file_);
}

Address HostDevice::reserve(std::uint64_t bytes) {
  void* base = mmap(nullptr, bytes, PROT_NONE, kHidden, -1, 0);
  if (base == MAP_FAILED) fail("mmap reserving " + std::to_string(bytes) + " bytes of address space", errno);
  return reinterpret_cast<Address>(base);
}

void HostDevice::release(Address base, std::uint64_t bytes) noexcept {
  munmap(pointer(base), bytes);
}

Handle HostDevice::create(std::uint64_t bytes) {
  return {next_id_++, bytes};
}

// Its memory went back with its last mapping.
void HostDevice::destroy(const Handle&) {}

void HostDevice::map(Address at, const std::vector<Handle>& handles) {
  std::vector<std::uint64_t> offsets;
  Address end = at;
  for (const Handle& handle : handles) {
    offsets.push_back(enter(end, handle));
    end += handle.bytes;
  }
  try {
    map_places(at, handles, offsets);
  } catch (const DeviceError&) {
    for (std::size_t i = handles.size(); i-- > 0;) leave(end -= handles[i].bytes, handles[i]);
    throw;
  }
}

void HostDevice::unmap(Address at, const Handle& handle) {
  const Place& place = places_.at(handle.id);
  if (place.mappings == 1) punch(place.offset, handle.bytes);
  cover(at, handle.bytes);
  leave(at, handle);
}

// Counts one mapping more, and returns where in the file the handle's bytes are from the first one to the last.
std::uint64_t HostDevice::enter(Address at, const Handle& handle) {
  const auto [place, is_first] = places_.try_emplace(handle.id, Place{at, 0});
  if (is_first && !has_room(at, handle.bytes)) {
    place->second.offset = next_elsewhere_;
    next_elsewhere_ += handle.bytes;
  }
  ++place->second.mappings;
  return place->second.offset;
}

void HostDevice::leave(Address at, const Handle& handle) {
  const auto place = places_.find(handle.id);
  const std::uint64_t offset = place->second.offset;
  if (--place->second.mappings == 0) {
    strays_.erase(offset);
    places_.erase(place);
  } else if (at == offset) {
    strays_[offset] = offset + handle.bytes;
  }
}

bool HostDevice::has_room(std::uint64_t offset, std::uint64_t bytes) const noexcept {
  const auto behind = strays_.lower_bound(offset + bytes);
  return behind == strays_.begin() || std::prev(behind)->second <= offset;
}

// Gives the memory back; what is mapped there reads as zeros from here on.
void HostDevice::punch(std::uint64_t offset, std::uint64_t bytes) {
  const int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
  if (fallocate(file_, mode, static_cast<off_t>(offset), static_cast<off_t>(bytes)) != 0) {
    fail("fallocate giving back " + std::to_string(bytes) + " bytes", errno);
  }
}

// Neighbours in the file with one call. If one fails nothing stays mapped.
void HostDevice::map_places(Address at, const std::vector<Handle>& handles, const std::vector<std::uint64_t>& offsets) {
  Address end = at;
  try {
    for (std::size_t i = 0; i < handles.size();) {
      std::uint64_t bytes = 0;
      const std::uint64_t offset = offsets[i];
      while (i < handles.size() && offsets[i] == offset + bytes) bytes += handles[i++].bytes;
      map_run(end, bytes, offset);
      end += bytes;
    }
  } catch (const DeviceError&) {
    if (end > at) cover(at, end - at);
    throw;
  }
}

void HostDevice::map_run(Address at, std::uint64_t bytes, std::uint64_t offset) {
  if (areas_left_ < kAreasACall) count_areas();
  areas_left_ -= kAreasACall;
  const int access = PROT_READ | PROT_WRITE;
  if (mmap(pointer(at), bytes, access, MAP_FIXED | MAP_SHARED, file_, static_cast<off_t>(offset)) == MAP_FAILED) {
    fail("mmap of " + std::to_string(bytes) + " bytes", errno);
  }
}

// Lays inaccessible pages over a range, which drops whatever was mapped there.
void HostDevice::cover(Address at, std::uint64_t bytes) {
  areas_left_ -= std::min(areas_left_, kAreasACall);
  if (mmap(pointer(at), bytes, PROT_NONE, MAP_FIXED | kHidden, -1, 0) == MAP_FAILED) {
    fail("mmap hiding " + std::to_string(bytes) + " bytes", errno);
  }
}

// At the kernel's limit even unmapping fails, and so do the heap and new threads: an eighth of the areas is not for
// pages. Half of what is left may be taken without counting again, since another device may take as much.
void HostDevice::count_areas() {
  const std::uint64_t limit = max_areas(), used = used_areas();
  if (used + limit / 8 > limit) {
    throw DeviceOutOfMemory("the process has " + std::to_string(used) +
                            " mapped areas of vm.max_map_count = " + std::to_string(limit) +
                            ", an eighth of which is kept free, and a slot takes two areas in each region: raise it "
                            "(sysctl), or use fewer slots or the megacache layout");
  }
  areas_left_ = (limit - used - limit / 16) / 2;
}

}  // namespace vattention
