// A forked child cannot use, change or wait for its parent's cache.
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <string>

#include "check.h"
#include "fixture.h"
#include "vattention/errors.h"
#include "vattention/host_device.h"

namespace vattention::test {
namespace {

// Runs the action in a forked child; its exit status, or minus the signal that ended it. A hang is SIGALRM.
template <typename Action>
int in_child(Action action) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    std::signal(SIGSEGV, SIG_DFL);  // the sanitizer's handler would print a report
    int status = 1;
    try {
      status = action();
    } catch (...) {
      status = 99;
    }
    _exit(status);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

template <typename Call>
bool is_refused(Call call) {
  try {
    call();
  } catch (const ForkError& error) {
    return std::string(error.what()).find("spawn") != std::string::npos;
  }
  return false;
}

// A thread that is just starting holds the lock of AddressSanitizer's allocator, which a child would wait for for ever.
void let_worker_start(KVCache& cache, std::uint64_t slot) {
  cache.prefetch({{at(slot), 1}});
  cache.wait();
}

}  // namespace

TEST(a_forked_child_is_refused_and_its_parent_unchanged) {
  auto cache = make_cache(std::make_shared<HostDevice>(), small_geometry(), 100);
  const std::uint64_t slot = cache->alloc(0);
  let_worker_start(*cache, slot);
  cache->prepare({{at(slot), 100}});
  const SlotBytes bytes(*cache, slot);
  bytes.fill(0, 25 * kPage, 7);
  const Address base = cache->reservation()->base();
  CHECK_EQUAL(in_child([&] {
                bool refused = is_refused([&] { cache->alloc(0); });
                refused = refused && is_refused([&] { cache->prepare({{at(slot), 200}}); });
                refused = refused && is_refused([&] { cache->free(at(slot)); });
                refused = refused && is_refused([&] { cache->stats(); });
                refused = refused && is_refused([&] { cache->wait(); });
                cache->close();
                cache.reset();
                return refused ? 0 : 1;
              }),
              0);
  CHECK_EQUAL(in_child([&] { return *reinterpret_cast<std::uint8_t*>(base); }), -SIGSEGV);
  CHECK_EQUAL(in_child([&] {
                *reinterpret_cast<std::uint8_t*>(base) = 1;
                return 0;
              }),
              -SIGSEGV);
  CHECK(bytes.holds(0, 25 * kPage, 7));
  cache->check_integrity();
  cache->prepare({{at(slot), 200}});
}

TEST(a_child_may_fork_while_the_worker_is_busy) {
  auto cache = make_cache(std::make_shared<HostDevice>(), small_geometry(6, 600, 60), 600);
  const std::uint64_t slot = cache->alloc(0);
  let_worker_start(*cache, slot);
  for (std::int64_t tokens = 10; tokens <= 600; tokens += 10) {
    cache->prefetch({{at(slot), tokens}});
    CHECK_EQUAL(in_child([&] {
                  cache.reset();
                  return 0;
                }),
                0);
    cache->prepare({{at(slot), tokens}});
  }
  cache->check_integrity();
}

TEST(a_child_has_caches_of_its_own) {
  const auto parents = make_cache(std::make_shared<HostDevice>(), small_geometry(), 100);
  let_worker_start(*parents, parents->alloc(0));
  CHECK_EQUAL(in_child([] {
                const auto cache = make_cache(std::make_shared<HostDevice>(), small_geometry(), 100);
                const std::uint64_t slot = cache->alloc(0);
                cache->prepare({{at(slot), 100}});
                SlotBytes(*cache, slot).fill(0, 25 * kPage, 3);
                const bool holds = SlotBytes(*cache, slot).holds(0, 25 * kPage, 3);
                cache->check_integrity();
                return holds ? 0 : 1;
              }),
              0);
  parents->check_integrity();
}

}  // namespace vattention::test
