#include "vattention/process.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "vattention/errors.h"

namespace vattention {
namespace {

std::atomic<std::uint64_t> num_forks{0};  // from the process that loaded this library to this one

void at_fork(void (*before)(), void (*in_parent)(), void (*in_child)()) {
  const int error = pthread_atfork(before, in_parent, in_child);
  if (error != 0) throw DeviceError(std::string("pthread_atfork failed: ") + std::strerror(error));
}

struct Guarded {
  std::mutex mutex;
  std::vector<std::mutex*> mutexes;
};

// Never destroyed: caches may be destroyed, and processes forked, after the end of main().
Guarded& guarded() {
  static Guarded* const all = new Guarded;
  return *all;
}

void lock_all() {
  guarded().mutex.lock();
  for (std::mutex* mutex : guarded().mutexes) mutex->lock();
}

void unlock_all() {
  for (std::mutex* mutex : guarded().mutexes) mutex->unlock();
  guarded().mutex.unlock();
}

}  // namespace

Process::Process() {
  static const bool counted = (at_fork(nullptr, nullptr, [] { num_forks.fetch_add(1); }), true);
  static_cast<void>(counted);
  forks_ = num_forks.load();
}

bool Process::is_current() const noexcept {
  return forks_ == num_forks.load();
}

ForkGuard::ForkGuard(std::mutex& mutex) : mutex_(mutex) {
  static const bool locked = (at_fork(lock_all, unlock_all, unlock_all), true);
  static_cast<void>(locked);
  const std::lock_guard<std::mutex> lock(guarded().mutex);
  guarded().mutexes.push_back(&mutex);
}

ForkGuard::~ForkGuard() {
  const std::lock_guard<std::mutex> lock(guarded().mutex);
  std::vector<std::mutex*>& all = guarded().mutexes;
  all.erase(std::find(all.begin(), all.end(), &mutex_));
}

}  // namespace vattention
