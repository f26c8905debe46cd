// Memory of one NVIDIA GPU through the driver's virtual memory calls.
#pragma once

#include "vattention/cuda_driver.h"
#include "vattention/device.h"
#include "vattention/process.h"

namespace vattention {

// Works in the device's primary context, which torch and the runtime use too, and leaves the caller's current context
// as it was. May be called from any thread.
class CudaDevice final : public Device {
 public:
  explicit CudaDevice(std::int32_t index);
  ~CudaDevice() override;
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  DeviceType type() const noexcept override { return DeviceType::kCuda; }
  std::int32_t index() const noexcept override { return index_; }
  std::uint64_t granularity() const noexcept override { return granularity_; }
  bool can_cut() const noexcept override { return false; }  // cuMemMap's offset into a handle must be zero

  Address reserve(std::uint64_t bytes) override;
  void release(Address base, std::uint64_t bytes) noexcept override;
  Handle create(std::uint64_t bytes) override;
  void destroy(const Handle& handle) override;
  void map(Address at, const std::vector<Handle>& handles) override;
  void unmap(Address at, const Handle& handle) override;
  std::vector<std::vector<Handle>> cut(const std::vector<Handle>& handles,
                                       const std::vector<std::uint64_t>& sizes) override;
  void copy(Address to, Address from, std::uint64_t bytes) override;

 private:
  class Current;

  cuda::AllocationProp allocation() const noexcept;
  void probe();

  const Process owner_;
  const cuda::Driver& driver_;
  std::int32_t index_;
  cuda::DeviceId device_ = 0;
  cuda::Context context_ = nullptr;
  std::uint64_t granularity_ = 0;
};

}  // namespace vattention
