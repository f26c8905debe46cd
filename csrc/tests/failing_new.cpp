#include "failing_new.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace {

std::atomic<bool> armed{false};
std::atomic<bool> failed{false};
std::atomic<std::uint64_t> calls{0}, begin_at{0}, end_at{0};

bool must_fail() noexcept {
  if (!armed.load()) return false;
  const std::uint64_t call = calls.fetch_add(1);
  if (call < begin_at.load() || call >= end_at.load()) return false;
  failed.store(true);
  return true;
}

void* allocate(std::size_t bytes) noexcept {
  return must_fail() ? nullptr : std::malloc(bytes > 0 ? bytes : 1);
}

}  // namespace

void* operator new(std::size_t bytes) {
  if (void* memory = allocate(bytes)) return memory;
  throw std::bad_alloc();
}
void* operator new[](std::size_t bytes) {
  return operator new(bytes);
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return allocate(bytes);
}
void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept {
  return allocate(bytes);
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete[](void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
void operator delete[](void* memory, std::size_t) noexcept {
  std::free(memory);
}

namespace vattention::test {

FailingNew::FailingNew(std::uint64_t first, std::uint64_t length) noexcept {
  calls = 0;
  begin_at = first;
  end_at = first + length;
  failed = false;
  armed = true;
}

FailingNew::~FailingNew() {
  armed = false;
}

bool FailingNew::has_failed() const noexcept {
  return failed;
}

FailingNew::Pause::Pause() noexcept {
  armed = false;
}

FailingNew::Pause::~Pause() {
  armed = true;
}

}  // namespace vattention::test
