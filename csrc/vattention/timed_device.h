// Counts and times the calls to a device.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <utility>

#include "vattention/device.h"

namespace vattention {

enum CallKind : std::size_t { kReserve, kCreate, kDestroy, kMap, kUnmap, kNumCallKinds };
inline constexpr std::array<const char*, kNumCallKinds> kCallNames{"reserve", "create", "destroy", "map", "unmap"};

// A map call counts once for each handle: its cost grows with them.
struct CallStats {
  std::uint64_t calls = 0;
  std::uint64_t nanoseconds = 0;
};
using DeviceStats = std::array<CallStats, kNumCallKinds>;

class TimedDevice final : public Device {
 public:
  explicit TimedDevice(std::shared_ptr<Device> device) : device_(std::move(device)) {}

  const DeviceStats& stats() const noexcept { return stats_; }
  DeviceType type() const noexcept override { return device_->type(); }
  std::int32_t index() const noexcept override { return device_->index(); }
  std::uint64_t granularity() const noexcept override { return device_->granularity(); }
  bool can_cut() const noexcept override { return device_->can_cut(); }

  Address reserve(std::uint64_t bytes) override {
    const Timer timer(stats_[kReserve], 1);
    return device_->reserve(bytes);
  }
  void release(Address base, std::uint64_t bytes) noexcept override { device_->release(base, bytes); }
  Handle create(std::uint64_t bytes) override {
    const Timer timer(stats_[kCreate], 1);
    return device_->create(bytes);
  }
  void destroy(const Handle& handle) override {
    const Timer timer(stats_[kDestroy], 1);
    device_->destroy(handle);
  }
  void map(Address at, const std::vector<Handle>& handles) override {
    const Timer timer(stats_[kMap], handles.size());
    device_->map(at, handles);
  }
  void unmap(Address at, const Handle& handle) override {
    const Timer timer(stats_[kUnmap], 1);
    device_->unmap(at, handle);
  }
  std::vector<std::vector<Handle>> cut(const std::vector<Handle>& handles,
                                       const std::vector<std::uint64_t>& sizes) override {
    return device_->cut(handles, sizes);
  }
  void copy(Address to, Address from, std::uint64_t bytes) override { device_->copy(to, from, bytes); }

 private:
  class Timer {
   public:
    Timer(CallStats& stats, std::uint64_t calls) : stats_(stats), start_(Clock::now()) { stats_.calls += calls; }
    ~Timer() {
      stats_.nanoseconds += static_cast<std::uint64_t>((Clock::now() - start_) / std::chrono::nanoseconds(1));
    }
    Timer(const Timer&) = delete;
    Timer& operator=(const Timer&) = delete;

   private:
    using Clock = std::chrono::steady_clock;
    CallStats& stats_;
    Clock::time_point start_;
  };

  std::shared_ptr<Device> device_;
  DeviceStats stats_{};
};

}  // namespace vattention
