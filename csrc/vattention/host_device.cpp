#include "vattention/host_device.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "vattention/errors.h"

namespace vattention {
namespace {

constexpr std::uint64_t kFileBytes = std::uint64_t{1} << 62;  // sparse: holes cost nothing
constexpr std::uint64_t kSpareAreas = 64;
constexpr int kHidden = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

void* pointer(Address at) {
  return reinterpret_cast<void*>(at);
}

[[noreturn]] void fail(const std::string& call, int error) {
  std::string text = call + " failed: " + std::strerror(error);
  if (error == ENOMEM) {
    text +=
        "; the process may have reached vm.max_map_count (sysctl vm.max_map_count, often 65530 mapped areas): "
        "raise it, or use larger pages or the megacache layout";
  }
  throw DeviceError(text);
}

}  // namespace

HostDevice::HostDevice() : page_bytes_(static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE))) {
  file_ = memfd_create("vattention", MFD_CLOEXEC);
  if (file_ < 0) fail("memfd_create", errno);
  if (ftruncate(file_, static_cast<off_t>(kFileBytes)) != 0) {
    const int error = errno;
    close(file_);
    fail("ftruncate of the memfd", error);
  }
}

HostDevice::~HostDevice() {
  drop_spares();
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
  if (bytes > kFileBytes - next_offset_) throw DeviceError("the memfd has no offsets left");
  const Handle handle{next_offset_, bytes};
  next_offset_ += bytes;
  return handle;
}

void HostDevice::destroy(const Handle& handle) {
  const int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
  if (fallocate(file_, mode, static_cast<off_t>(handle.id), static_cast<off_t>(handle.bytes)) != 0) {
    fail("fallocate giving back " + std::to_string(handle.bytes) + " bytes", errno);
  }
}

void HostDevice::map(Address at, const std::vector<Handle>& handles) {
  if (spares_ == nullptr) arm_spares();
  Address end = at;
  try {
    for (std::size_t i = 0; i < handles.size();) {
      std::uint64_t bytes = 0;
      const std::uint64_t offset = handles[i].id;
      while (i < handles.size() && handles[i].id == offset + bytes) bytes += handles[i++].bytes;
      map_run(end, bytes, offset);
      end += bytes;
    }
  } catch (const DeviceError&) {
    if (end > at) cover(at, end - at);
    throw;
  }
}

void HostDevice::unmap(Address at, const Handle& handle) {
  cover(at, handle.bytes);
}

void HostDevice::map_run(Address at, std::uint64_t bytes, std::uint64_t offset) {
  const int access = PROT_READ | PROT_WRITE;
  if (mmap(pointer(at), bytes, access, MAP_FIXED | MAP_SHARED, file_, static_cast<off_t>(offset)) == MAP_FAILED) {
    fail("mmap of " + std::to_string(bytes) + " bytes", errno);
  }
}

// Lays inaccessible pages over a range, which drops whatever was mapped there.
void HostDevice::cover(Address at, std::uint64_t bytes) {
  const auto hide = [&] { return mmap(pointer(at), bytes, PROT_NONE, MAP_FIXED | kHidden, -1, 0) != MAP_FAILED; };
  if (hide()) return;
  drop_spares();
  if (!hide()) fail("mmap hiding " + std::to_string(bytes) + " bytes", errno);
}

// Pages of alternating protection, each an area of its own; one munmap gives them all back.
void HostDevice::arm_spares() {
  void* base = mmap(nullptr, 2 * kSpareAreas * page_bytes_, PROT_NONE, kHidden, -1, 0);
  if (base == MAP_FAILED) fail("mmap of spare areas", errno);
  spares_ = base;
  for (std::uint64_t i = 0; i < kSpareAreas; ++i) {
    if (mprotect(static_cast<char*>(base) + 2 * i * page_bytes_, page_bytes_, PROT_READ) == 0) continue;
    const int error = errno;
    drop_spares();
    fail("mprotect of spare areas", error);
  }
}

void HostDevice::drop_spares() noexcept {
  if (spares_ != nullptr) munmap(spares_, 2 * kSpareAreas * page_bytes_);
  spares_ = nullptr;
}

}  // namespace vattention
