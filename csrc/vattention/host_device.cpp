#include "vattention/host_device.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <string>

#include "vattention/errors.h"

namespace vattention {
namespace {

constexpr std::uint64_t kFileBytes = std::uint64_t{1} << 62;  // sparse: holes cost nothing
constexpr std::uint64_t kOverflow = std::uint64_t{1} << 60;   // offset past every address
constexpr std::uint64_t kAreasACall = 2;                      // at most: an area is split in three
constexpr int kHidden = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

void* pointer(Address at) {
  return reinterpret_cast<void*>(at);
}

[[noreturn]] void fail(const std::string& call, int error) {
  const std::string text = call + " failed: " + std::strerror(error);
  if (error != ENOMEM) throw DeviceError(text);
  throw DeviceOutOfMemory(text);
}

int create_file() {
  const int file = memfd_create("vattention", MFD_CLOEXEC);
  if (file < 0) fail("memfd_create", errno);
  if (ftruncate(file, static_cast<off_t>(kFileBytes)) == 0) return file;
  const int error = errno;
  close(file);
  fail("ftruncate of the memfd", error);
}

// -1 where the kernel has no such file.
int open_proc(const char* path) {
  const int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0 && errno != ENOENT) fail(std::string("opening ") + path, errno);
  return file;
}

// Calls `visit` with every part of a /proc file from its start.
template <typename Visit>
void read_proc(const File& file, Visit visit) {
  std::array<char, 1 << 14> buffer{};
  if (lseek(file.get(), 0, SEEK_SET) < 0) fail("lseek in /proc", errno);
  for (;;) {
    const ssize_t size = read(file.get(), buffer.data(), buffer.size() - 1);
    if (size < 0 && errno == EINTR) continue;
    if (size < 0) fail("reading /proc", errno);
    if (size == 0) return;
    buffer[static_cast<std::size_t>(size)] = '\0';
    visit(buffer.data(), static_cast<std::size_t>(size));
  }
}

std::uint64_t read_number(const File& file) {
  std::uint64_t number = 0;
  read_proc(file, [&number](const char* text, std::size_t) { number = std::strtoull(text, nullptr, 10); });
  return number;
}

std::uint64_t count_lines(const File& file) {
  std::uint64_t lines = 0;
  read_proc(file, [&lines](const char* text, std::size_t size) {
    lines += static_cast<std::uint64_t>(std::count(text, text + size, '\n'));
  });
  return lines;
}

}  // namespace

File::~File() {
  if (descriptor_ >= 0) close(descriptor_);
}

AreaBudget::AreaBudget() : limit_(open_proc("/proc/sys/vm/max_map_count")), maps_(open_proc("/proc/self/maps")) {}

void AreaBudget::take() {
  if (limit_.get() < 0 || maps_.get() < 0) return;
  if (left_ < kAreasACall) count();
  left_ -= kAreasACall;
}

void AreaBudget::count_unmap() noexcept {
  left_ -= std::min(left_, kAreasACall);
}

// At the kernel's limit unmapping, the heap and new threads fail too, so an eighth of the areas is kept free. Half of
// the rest may be taken before the next count, because another device may take as much.
void AreaBudget::count() {
  const std::uint64_t limit = read_number(limit_), used = count_lines(maps_);
  if (used + limit / 8 > limit) {
    throw DeviceOutOfMemory("the process has " + std::to_string(used) +
                            " mapped areas of vm.max_map_count = " + std::to_string(limit) +
                            ", an eighth of which is kept free, and a slot takes two areas in each region: raise it "
                            "(sysctl), or use fewer slots or the megacache layout");
  }
  left_ = std::max(kAreasACall, (limit - used - limit / 16) / 2);
}

HostDevice::HostDevice()
    : page_bytes_(static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE))), file_(create_file()), next_overflow_(kOverflow) {}

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

// unmap() has released the memory with the last mapping.
void HostDevice::destroy(const Handle&) {}

void HostDevice::map(Address at, const std::vector<Handle>& handles) {
  std::vector<std::uint64_t> offsets;
  offsets.reserve(handles.size());
  Address end = at;
  try {
    for (const Handle& handle : handles) {
      offsets.push_back(add_mapping(end, handle));
      end += handle.bytes;
    }
    map_places(at, handles, offsets);
  } catch (...) {
    for (std::size_t i = 0; i < offsets.size(); ++i) remove_mapping(handles[i]);
    throw;
  }
}

void HostDevice::unmap(Address at, const Handle& handle) {
  const Place place = places_.at(handle.id);
  if (place.mappings > 1 && at == place.offset) occupied_[at] = at + handle.bytes;
  if (place.mappings == 1) punch(place.offset, handle.bytes);
  hide(at, handle.bytes);
  remove_mapping(handle);
}

// Changes records only: a piece's place lies inside of the handle's.
std::vector<std::vector<Handle>> HostDevice::cut(const std::vector<Handle>& handles,
                                                 const std::vector<std::uint64_t>& sizes) {
  std::vector<std::vector<Handle>> pieces(handles.size());
  for (std::vector<Handle>& list : pieces) {
    list.reserve(sizes.size());
    for (const std::uint64_t bytes : sizes) list.push_back(create(bytes));
  }
  std::size_t done = 0;
  try {
    for (; done < handles.size(); ++done) add_pieces(handles[done], pieces[done]);
  } catch (...) {
    for (std::size_t i = 0; i <= done; ++i) remove_pieces(pieces[i]);
    throw;
  }
  for (const Handle& handle : handles) {
    const std::uint64_t offset = places_.at(handle.id).offset;
    const auto occupied = occupied_.find(offset);
    if (occupied != occupied_.end()) occupied->second = offset + sizes.front();
    places_.erase(handle.id);
  }
  return pieces;
}

void HostDevice::copy(Address to, Address from, std::uint64_t bytes) {
  std::memcpy(pointer(to), pointer(from), bytes);
}

// Counts one more mapping and returns the handle's offset in the file, which its first mapping decides.
std::uint64_t HostDevice::add_mapping(Address at, const Handle& handle) {
  const auto [place, is_first] = places_.try_emplace(handle.id, Place{at, 0});
  if (is_first && !has_room(at, handle.bytes)) {
    place->second.offset = next_overflow_;
    next_overflow_ += handle.bytes;
  }
  ++place->second.mappings;
  return place->second.offset;
}

void HostDevice::remove_mapping(const Handle& handle) noexcept {
  const auto place = places_.find(handle.id);
  if (--place->second.mappings > 0) return;
  occupied_.erase(place->second.offset);
  places_.erase(place);
}

// The handle's own place stays, so that the caller can undo this.
void HostDevice::add_pieces(const Handle& handle, const std::vector<Handle>& pieces) {
  Place place = places_.at(handle.id);
  const bool is_occupied = occupied_.count(place.offset) > 0;
  for (const Handle& piece : pieces) {
    places_.emplace(piece.id, place);
    if (is_occupied) occupied_.emplace(place.offset, place.offset + piece.bytes);  // the first one has an entry
    place.offset += piece.bytes;
  }
}

void HostDevice::remove_pieces(const std::vector<Handle>& pieces) noexcept {
  for (const Handle& piece : pieces) {
    const auto place = places_.find(piece.id);
    if (place == places_.end()) continue;
    if (piece.id != pieces.front().id) occupied_.erase(place->second.offset);
    places_.erase(place);
  }
}

bool HostDevice::has_room(std::uint64_t offset, std::uint64_t bytes) const noexcept {
  const auto behind = occupied_.lower_bound(offset + bytes);
  return behind == occupied_.begin() || std::prev(behind)->second <= offset;
}

// Releases the memory; pages that are mapped there read as zeros afterwards.
void HostDevice::punch(std::uint64_t offset, std::uint64_t bytes) {
  const int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
  if (fallocate(file_.get(), mode, static_cast<off_t>(offset), static_cast<off_t>(bytes)) != 0) {
    fail("fallocate giving back " + std::to_string(bytes) + " bytes", errno);
  }
}

// One mmap for handles that are adjacent in the file. If one fails, nothing stays mapped.
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
  } catch (...) {
    if (end > at) hide(at, end - at);
    throw;
  }
}

void HostDevice::map_run(Address at, std::uint64_t bytes, std::uint64_t offset) {
  areas_.take();
  const int access = PROT_READ | PROT_WRITE;
  if (mmap(pointer(at), bytes, access, MAP_FIXED | MAP_SHARED, file_.get(), static_cast<off_t>(offset)) == MAP_FAILED) {
    fail("mmap of " + std::to_string(bytes) + " bytes", errno);
  }
}

// Replaces the mappings of a range by inaccessible pages.
void HostDevice::hide(Address at, std::uint64_t bytes) {
  areas_.count_unmap();
  if (mmap(pointer(at), bytes, PROT_NONE, MAP_FIXED | kHidden, -1, 0) == MAP_FAILED) {
    fail("mmap hiding " + std::to_string(bytes) + " bytes", errno);
  }
}

}  // namespace vattention
