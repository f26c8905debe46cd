// Random histories against a model that is only a sum: whatever fits the budget can be prepared.
#include <map>
#include <random>
#include <vector>

#include "check.h"
#include "fake_device.h"
#include "fixture.h"
#include "vattention/errors.h"

namespace vattention::test {
namespace {

class Simulation {
 public:
  explicit Simulation(std::uint64_t seed)
      : random_(seed),
        geometry_(1 + pick(4), 1 + pick(kPage), 2 + pick(6), 1 + pick(700), kPage),
        rows_(pick(4) == 0 ? geometry_.num_slots() * geometry_.slot_rows() : 1 + pick(300)),
        device_(std::make_shared<AccountingDevice>()),
        cache_(make_cache(device_, geometry_, rows_, {pick(2) == 0, 0.25 * static_cast<double>(pick(4))})) {
    device_->cuts = pick(2) == 0;
  }

  void run(int steps) {
    for (int i = 0; i < steps; ++i) {
      step();
      cache_->check_integrity();
      CHECK(device_->physical_bytes() <= rows_ * geometry_.row_bytes());
    }
    cache_->close();
    CHECK_EQUAL(device_->physical_bytes(), 0U);
  }

 private:
  std::uint64_t pick(std::uint64_t bound) { return random_() % bound; }

  void step() {
    switch (pick(10)) {
      case 0:
      case 1:
        return alloc();
      case 2:
        return free_one();
      case 3:
        return prefetch();
      case 4:
        return resize();
      case 5:
        return share();
      case 6:
        return trim();
      case 7:
        return cache_->map_ahead(at(pick(geometry_.max_tokens() + 1)));
      default:
        return prepare();
    }
  }

  void alloc() {
    if (tokens_.size() == geometry_.num_slots()) {
      CHECK_THROWS(NoFreeSlot, cache_->alloc(0));
      return;
    }
    tokens_[cache_->alloc(at(pick(geometry_.max_tokens() + 1)))] = 0;
  }

  std::uint64_t any() { return std::next(tokens_.begin(), static_cast<std::ptrdiff_t>(pick(tokens_.size())))->first; }

  void free_one() {
    if (tokens_.empty()) return;
    const std::uint64_t slot = any();
    cache_->free(at(slot));
    tokens_.erase(slot);
  }

  // Growth of a few slots at once; the model says whether it must succeed. Sharing only makes the truth smaller.
  void prepare() {
    std::map<std::uint64_t, std::uint64_t> goal = tokens_;
    Targets targets;
    for (auto& [slot, tokens] : goal) {
      if (pick(2) == 0) continue;
      tokens = std::min(geometry_.max_tokens(), tokens + pick(pick(4) == 0 ? 300 : 4));
      targets.push_back({at(slot), at(tokens)});
    }
    std::uint64_t needed = 0;
    for (const auto& [slot, tokens] : goal) needed += geometry_.rows_for(tokens);
    try {
      cache_->prepare(targets);
      tokens_ = goal;
    } catch (const OutOfMemory& error) {
      CHECK(needed > rows_);
      CHECK(error.needed > error.available);
    }
  }

  void prefetch() {
    Targets targets;
    for (const auto& [slot, tokens] : tokens_) {
      if (pick(2) == 0) targets.push_back({at(slot), at(tokens + pick(pick(3) == 0 ? 200 : 3))});
    }
    cache_->prefetch(targets, at(pick(6)));
  }

  void trim() {
    if (tokens_.empty()) return;
    const std::uint64_t slot = any(), before = tokens_[slot], tokens = pick(before + 1);
    try {
      tokens_[slot] = cache_->trim(at(slot), at(tokens));
      CHECK(tokens_[slot] >= tokens && tokens_[slot] <= before);
      CHECK(tokens_[slot] == tokens || !device_->cuts);
    } catch (const std::invalid_argument&) {  // shared with another slot
    }
  }

  void resize() {
    const std::uint64_t all = geometry_.num_slots() * geometry_.slot_rows();  // extents may be used past a length
    const std::uint64_t rows = pick(3) == 0 ? all + pick(5) : 1 + pick(300);
    try {
      cache_->resize(budget(geometry_, rows));
      rows_ = rows;
    } catch (const OutOfMemory&) {
      CHECK(rows < rows_);
    }
  }

  void share() {
    if (tokens_.size() < 2) return;
    const std::uint64_t source = any(), target = any();
    if (source == target || tokens_[target] > 0) return;
    const std::uint64_t tokens = pick(tokens_[source] + 1), shared = geometry_.whole_page_tokens(tokens);
    std::uint64_t needed = geometry_.rows_for(shared);
    for (const auto& [slot, length] : tokens_) needed += geometry_.rows_for(length);
    try {
      CHECK_EQUAL(cache_->share(at(source), at(target), at(tokens)), shared);
      tokens_[target] = shared;
    } catch (const OutOfMemory&) {  // no room for what a device that cannot cut has to copy
      CHECK(needed > rows_ && !device_->cuts);
    }
  }

  std::mt19937_64 random_;
  Geometry geometry_;
  std::uint64_t rows_;
  std::shared_ptr<AccountingDevice> device_;
  std::unique_ptr<KVCache> cache_;
  std::map<std::uint64_t, std::uint64_t> tokens_;  // prepared length of each active slot
};

}  // namespace

TEST(random_histories_keep_the_books_and_the_promise) {
  const std::uint64_t seed = fresh_seed();
  for (std::uint64_t i = 0; i < num_histories(); ++i) Simulation(seed + i).run(60);
}

}  // namespace vattention::test
