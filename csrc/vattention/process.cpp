#include "vattention/process.h"

#include <pthread.h>

#include <atomic>
#include <cstring>
#include <string>

#include "vattention/errors.h"

namespace vattention {
namespace {

std::atomic<std::uint64_t> num_forks{0};  // between the process that loaded this library and this one

void count_forks() {
  static const int error = pthread_atfork(nullptr, nullptr, [] { num_forks.fetch_add(1); });
  if (error != 0) throw DeviceError(std::string("pthread_atfork failed: ") + std::strerror(error));
}

}  // namespace

Process::Process() {
  count_forks();
  forks_ = num_forks.load();
}

bool Process::is_current() const noexcept {
  return forks_ == num_forks.load();
}

}  // namespace vattention
