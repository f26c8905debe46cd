// What the tests share: small caches, and slots filled with bytes that name their owner.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "check.h"
#include "vattention/kv_cache.h"

namespace vattention::test {

inline constexpr std::uint64_t kPage = 4096;

// A token is a quarter of a page, so that four tokens are one row.
inline Geometry small_geometry(std::uint64_t slots = 6, std::uint64_t max_tokens = 600, std::uint64_t regions = 3) {
  return Geometry(regions, kPage / 4, slots, max_tokens, kPage);
}

inline std::int64_t budget(const Geometry& geometry, std::uint64_t rows) {
  return static_cast<std::int64_t>(rows * geometry.row_bytes());
}

inline std::unique_ptr<KVCache> make_cache(std::shared_ptr<Device> device, const Geometry& geometry, std::uint64_t rows,
                                           Policy policy = {true, 0.0}) {
  return std::make_unique<KVCache>(std::move(device), geometry, budget(geometry, rows), policy);
}

inline std::uint64_t fresh_seed() {
  const char* given = std::getenv("VATTENTION_SEED");
  const std::uint64_t seed = given ? std::strtoull(given, nullptr, 10) : std::random_device{}();
  std::printf("VATTENTION_SEED=%llu\n", static_cast<unsigned long long>(seed));
  return seed;
}

// How many random histories to try. More than a build can wait for are a run of their own: make HISTORIES=5000.
inline std::uint64_t num_histories() {
  const char* given = std::getenv("HISTORIES");
  return given ? std::strtoull(given, nullptr, 10) : 300;
}

inline std::int64_t at(std::uint64_t slot) {
  return static_cast<std::int64_t>(slot);
}

// Bytes [begin, end) of a slot in every region.
class SlotBytes {
 public:
  SlotBytes(KVCache& cache, std::uint64_t slot) : cache_(cache), slot_(slot) {}

  void fill(std::uint64_t begin, std::uint64_t end, std::uint8_t value) const {
    each([&](std::uint8_t* data) {
      for (std::uint64_t i = begin; i < end; i += 512) data[i] = value;
    });
  }
  bool holds(std::uint64_t begin, std::uint64_t end, std::uint8_t value) const {
    bool same = true;
    each([&](std::uint8_t* data) {
      for (std::uint64_t i = begin; i < end; i += 512) same = same && data[i] == value;
    });
    return same;
  }

 private:
  template <typename Visit>
  void each(Visit visit) const {
    const Geometry& geometry = cache_.geometry();
    for (std::uint64_t region = 0; region < geometry.num_regions(); ++region) {
      visit(reinterpret_cast<std::uint8_t*>(cache_.reservation()->base() + geometry.offset_of(region, slot_, 0)));
    }
  }

  KVCache& cache_;
  std::uint64_t slot_;
};

}  // namespace vattention::test
