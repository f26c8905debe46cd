#include "vattention/reservation.h"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>

#include "vattention/errors.h"

namespace vattention {
namespace {

// A live reservation of host memory. Entries are reused and never freed: a signal handler reads the list without a
// lock.
struct Entry {
  std::atomic<const Reservation*> reservation{nullptr};
  Entry* next = nullptr;
};

std::atomic<Entry*> first_entry{nullptr};
std::mutex entries_mutex;

template <typename Visit>
void for_each_reservation(Visit visit) noexcept {
  for (Entry* entry = first_entry.load(); entry != nullptr; entry = entry->next) {
    if (const Reservation* reservation = entry->reservation.load()) visit(*reservation);
  }
}

void add_entry(const Reservation* reservation) {
  const std::lock_guard<std::mutex> lock(entries_mutex);
  for (Entry* entry = first_entry.load(); entry != nullptr; entry = entry->next) {
    if (entry->reservation.load() != nullptr) continue;
    entry->reservation.store(reservation);
    return;
  }
  auto* entry = new Entry;
  entry->reservation.store(reservation);
  entry->next = first_entry.load();
  first_entry.store(entry);
}

void remove_entry(const Reservation* reservation) noexcept {
  const std::lock_guard<std::mutex> lock(entries_mutex);
  for (Entry* entry = first_entry.load(); entry != nullptr; entry = entry->next) {
    if (entry->reservation.load() == reservation) entry->reservation.store(nullptr);
  }
}

void* pointer(Address at) {
  return reinterpret_cast<void*>(at);
}

void before_fork() {
  entries_mutex.lock();
}

void after_fork_in_parent() {
  entries_mutex.unlock();
}

// The pages are shared memory: the parent would see what the child writes. Inaccessible pages in their place turn that
// into a fault, and keep the child's next mmap out of the range.
void after_fork_in_child() {
  for_each_reservation([](const Reservation& reservation) {
    const int flags = MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    mmap(pointer(reservation.base()), reservation.geometry().total_bytes(), PROT_NONE, flags, -1, 0);
  });
  entries_mutex.unlock();
}

void hide_in_children() {
  static const int error = pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
  if (error != 0) throw DeviceError(std::string("pthread_atfork failed: ") + std::strerror(error));
}

// Text for a signal handler, which must not allocate.
class Line {
 public:
  Line& operator<<(const char* text) noexcept {
    for (; *text != '\0' && size_ < text_.size(); ++text) text_[size_++] = *text;
    return *this;
  }
  Line& operator<<(std::uint64_t number) noexcept {
    std::array<char, 21> digits{};
    std::size_t begin = digits.size() - 1;
    do {
      digits[--begin] = static_cast<char>('0' + number % 10);
      number /= 10;
    } while (number > 0);
    return *this << &digits[begin];
  }
  void write_to(int file) const noexcept {
    if (write(file, text_.data(), size_) < 0) return;  // a handler can report nothing
  }

 private:
  std::array<char, 256> text_{};
  std::size_t size_ = 0;
};

void explain(Address at) noexcept {
  for_each_reservation([at](const Reservation& reservation) {
    const Geometry& geometry = reservation.geometry();
    if (at < reservation.base() || at - reservation.base() >= geometry.total_bytes()) return;
    const Address offset = at - reservation.base(), in_region = offset % geometry.region_bytes();
    Line line;
    line << "vattention: access to unprepared memory of a KV cache: region " << offset / geometry.region_bytes()
         << ", slot " << in_region / geometry.slot_bytes() << ", token "
         << in_region % geometry.slot_bytes() / geometry.token_bytes() << " of max_tokens " << geometry.max_tokens()
         << "\n";
    line.write_to(STDERR_FILENO);
  });
}

struct sigaction previous_segv, previous_bus;

// Restores the previous handler and returns, so that the faulting instruction runs again and the handler gets the
// fault.
void on_fault(int signal, siginfo_t* info, void*) {
  const int error = errno;
  explain(reinterpret_cast<Address>(info->si_addr));
  sigaction(signal, signal == SIGSEGV ? &previous_segv : &previous_bus, nullptr);
  errno = error;
}

void install(int signal, struct sigaction& previous) {
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  if (sigaction(signal, &action, &previous) != 0) {
    throw DeviceError(std::string("sigaction failed: ") + std::strerror(errno));
  }
}

}  // namespace

Reservation::Reservation(std::shared_ptr<Device> device, const Geometry& geometry)
    : device_(std::move(device)), geometry_(geometry), base_(device_->reserve(geometry.total_bytes())) {
  if (device_->type() != DeviceType::kHost) return;
  try {
    hide_in_children();
    add_entry(this);
  } catch (...) {
    device_->release(base_, geometry_.total_bytes());
    throw;
  }
}

Reservation::~Reservation() {
  remove_entry(this);
  if (owner_.is_current()) device_->release(base_, geometry_.total_bytes());
}

void report_faults() {
  static std::mutex mutex;
  static bool installed = false;
  const std::lock_guard<std::mutex> lock(mutex);
  if (installed) return;
  install(SIGSEGV, previous_segv);
  install(SIGBUS, previous_bus);
  installed = true;
}

}  // namespace vattention
