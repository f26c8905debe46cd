// Devices for tests: one that only keeps accounts and refuses every misuse, and one that fails at a given call.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "vattention/device.h"
#include "vattention/errors.h"

namespace vattention::test {

// Holds no memory. A misuse (mapping over a mapping, unmapping what is not there, destroying what is mapped) is a
// logic_error, which the allocator never catches.
class AccountingDevice final : public Device {
 public:
  DeviceType type() const noexcept override { return DeviceType::kHost; }
  std::int32_t index() const noexcept override { return 0; }
  std::uint64_t granularity() const noexcept override { return 4096; }
  bool can_cut() const noexcept override { return cuts; }

  Address reserve(std::uint64_t bytes) override {
    reserved_ += bytes;
    return Address{1} << 40;
  }
  void release(Address, std::uint64_t bytes) noexcept override {
    released_while_mapped = released_while_mapped || !mapped_.empty();
    reserved_ -= bytes;
  }

  Handle create(std::uint64_t bytes) override {
    if (physical_bytes_ + bytes > limit_bytes) throw DeviceOutOfMemory("create failed: out of memory");
    const Handle handle{next_id_++, bytes};
    mappings_of_[handle.id] = 0;
    physical_bytes_ += bytes;
    return handle;
  }

  void destroy(const Handle& handle) override {
    require(mappings_of_.at(handle.id) == 0, "destroyed while mapped");
    mappings_of_.erase(handle.id);
    physical_bytes_ -= handle.bytes;
  }

  void map(Address at, const std::vector<Handle>& handles) override {
    if (mapped_.size() + handles.size() > limit_mappings) throw DeviceOutOfMemory("map failed: the table is full");
    std::map<Address, Handle> fresh;
    for (const Handle& handle : handles) {
      const auto next = mapped_.lower_bound(at);
      require(next == mapped_.end() || next->first >= at + handle.bytes, "mapped over a mapping");
      require(next == mapped_.begin() || std::prev(next)->first + std::prev(next)->second.bytes <= at,
              "mapped into a mapping");
      fresh[at] = handle;
      at += handle.bytes;
    }
    for (const Handle& handle : handles) ++mappings_of_.at(handle.id);
    mapped_.merge(fresh);
  }

  void unmap(Address at, const Handle& handle) override {
    const auto found = mapped_.find(at);
    require(found != mapped_.end() && found->second.id == handle.id, "unmapped what is not mapped there");
    --mappings_of_.at(handle.id);
    mapped_.erase(found);
  }

  std::vector<std::vector<Handle>> cut(const std::vector<Handle>& handles,
                                       const std::vector<std::uint64_t>& sizes) override {
    require(cuts, "cut on a device that cannot");
    std::vector<std::vector<Handle>> pieces(handles.size());
    std::map<Address, Handle> mapped = mapped_;
    std::map<std::uint64_t, int> mappings_of = mappings_of_;
    for (std::size_t i = 0; i < handles.size(); ++i) {
      std::uint64_t bytes = 0;
      for (const std::uint64_t size : sizes) {
        pieces[i].push_back({next_id_++, size});
        mappings_of[pieces[i].back().id] = mappings_of.at(handles[i].id);
        bytes += size;
      }
      require(bytes == handles[i].bytes, "cut into another size");
      require(mappings_of.at(handles[i].id) > 0, "cut what is not mapped");
      mappings_of.erase(handles[i].id);
      for (const auto& [begin, handle] : mapped_) {
        if (handle.id != handles[i].id) continue;
        Address at = begin;
        for (const Handle& piece : pieces[i]) {
          mapped[at] = piece;
          at += piece.bytes;
        }
      }
    }
    mapped_.swap(mapped);
    mappings_of_.swap(mappings_of);
    return pieces;
  }

  void copy(Address to, Address from, std::uint64_t bytes) override {
    require(mapped_in(to, bytes) && mapped_in(from, bytes), "copied what is not mapped");
    copied_bytes += bytes;
  }

  std::uint64_t mapped_bytes() const {
    std::uint64_t bytes = 0;
    for (const auto& [at, handle] : mapped_) bytes += handle.bytes;
    return bytes;
  }
  std::uint64_t physical_bytes() const { return physical_bytes_; }
  std::uint64_t reserved_bytes() const { return reserved_; }

  std::uint64_t limit_bytes = ~std::uint64_t{0};
  std::uint64_t limit_mappings = ~std::uint64_t{0};
  bool released_while_mapped = false;
  bool cuts = false;
  std::uint64_t copied_bytes = 0;

 private:
  bool mapped_in(Address at, std::uint64_t bytes) const {
    const Address end = at + bytes;
    auto next = mapped_.upper_bound(at);
    if (next == mapped_.begin()) return false;
    for (--next; next != mapped_.end() && next->first <= at; ++next) at = next->first + next->second.bytes;
    return at >= end;
  }

  static void require(bool holds, const char* what) {
    if (!holds) throw std::logic_error(std::string("device misused: ") + what);
  }

  std::uint64_t next_id_ = 1, physical_bytes_ = 0, reserved_ = 0;
  std::map<Address, Handle> mapped_;
  std::map<std::uint64_t, int> mappings_of_;
};

// Passes calls on until the countdown reaches one of them; that one, and `length` - 1 after it, fail.
class FaultyDevice final : public Device {
 public:
  explicit FaultyDevice(std::shared_ptr<Device> device) : device_(std::move(device)) {}

  void fail_at(std::uint64_t call, std::uint64_t length) {
    begin_ = calls_ + call;
    end_ = begin_ + length;
  }
  void heal() { begin_ = end_ = 0; }
  bool has_failed() const { return failed_; }

  DeviceType type() const noexcept override { return device_->type(); }
  std::int32_t index() const noexcept override { return device_->index(); }
  std::uint64_t granularity() const noexcept override { return device_->granularity(); }
  bool can_cut() const noexcept override { return cuts && device_->can_cut(); }
  Address reserve(std::uint64_t bytes) override { return device_->reserve(bytes); }
  void release(Address base, std::uint64_t bytes) noexcept override { device_->release(base, bytes); }
  Handle create(std::uint64_t bytes) override {
    step("create");
    return device_->create(bytes);
  }
  void destroy(const Handle& handle) override {
    step("destroy");
    device_->destroy(handle);
  }
  void map(Address at, const std::vector<Handle>& handles) override {
    step("map");
    device_->map(at, handles);
  }
  void unmap(Address at, const Handle& handle) override {
    step("unmap");
    device_->unmap(at, handle);
  }
  std::vector<std::vector<Handle>> cut(const std::vector<Handle>& handles,
                                       const std::vector<std::uint64_t>& sizes) override {
    step("cut");
    return device_->cut(handles, sizes);
  }
  void copy(Address to, Address from, std::uint64_t bytes) override {
    step("copy");
    device_->copy(to, from, bytes);
  }

  bool cuts = true;  // if the device can

 private:
  void step(const char* name) {
    const std::uint64_t call = calls_++;
    if (call < begin_ || call >= end_) return;
    failed_ = true;
    throw DeviceError(std::string(name) + " failed: told to");
  }

  std::shared_ptr<Device> device_;
  std::uint64_t calls_ = 0, begin_ = 0, end_ = 0;
  bool failed_ = false;
};

}  // namespace vattention::test
