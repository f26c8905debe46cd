#include "vattention/cuda_device.h"

#include <string>

#include "vattention/errors.h"

namespace vattention {

// The primary context is current on this thread for the life of the object.
class CudaDevice::Current {
 public:
  explicit Current(const CudaDevice& device) : driver_(device.driver_) {
    driver_.check(driver_.push_current(device.context_), "cuCtxPushCurrent");
  }
  ~Current() {
    cuda::Context context = nullptr;
    driver_.pop_current(&context);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const cuda::Driver& driver_;
};

CudaDevice::CudaDevice(std::int32_t index) : driver_(cuda::Driver::get()), index_(index) {
  int count = 0;
  driver_.check(driver_.device_get_count(&count), "cuDeviceGetCount");
  if (index < 0 || index >= count) {
    throw DeviceError("there is no CUDA device " + std::to_string(index) + ": this process sees " +
                      std::to_string(count));
  }
  driver_.check(driver_.device_get(&device_, index), "cuDeviceGet");
  driver_.check(driver_.primary_retain(&context_, device_), "cuDevicePrimaryCtxRetain");
  try {
    probe();
  } catch (...) {
    driver_.primary_release(device_);
    throw;
  }
}

CudaDevice::~CudaDevice() {
  if (owner_.is_current()) driver_.primary_release(device_);  // a forked child has no context
}

Address CudaDevice::reserve(std::uint64_t bytes) {
  const Current current(*this);
  cuda::DevicePtr base = 0;
  driver_.check(driver_.address_reserve(&base, bytes, 0, 0, 0), "cuMemAddressReserve");
  return base;
}

void CudaDevice::release(Address base, std::uint64_t bytes) noexcept {
  try {
    const Current current(*this);
    driver_.address_free(base, bytes);
  } catch (const DeviceError&) {  // the last tensor may die after the driver at the end of the process
  }
}

Handle CudaDevice::create(std::uint64_t bytes) {
  const Current current(*this);
  const cuda::AllocationProp prop = allocation();
  cuda::AllocationHandle handle = 0;
  driver_.check(driver_.create(&handle, bytes, &prop, 0), "cuMemCreate");
  return {handle, bytes};
}

void CudaDevice::destroy(const Handle& handle) {
  const Current current(*this);
  driver_.check(driver_.release(handle.id), "cuMemRelease");
}

// One cuMemSetAccess for the whole range costs what one for each handle would; it is one place to fail instead of many.
void CudaDevice::map(Address at, const std::vector<Handle>& handles) {
  const Current current(*this);
  std::size_t mapped = 0;
  Address end = at;
  try {
    for (; mapped < handles.size(); end += handles[mapped++].bytes) {
      driver_.check(driver_.map(end, handles[mapped].bytes, 0, handles[mapped].id, 0), "cuMemMap");
    }
    const cuda::AccessDesc access{{cuda::kLocationDevice, device_}, cuda::kAccessReadWrite};
    driver_.check(driver_.set_access(at, end - at, &access, 1), "cuMemSetAccess");
  } catch (...) {
    while (mapped-- > 0) {
      end -= handles[mapped].bytes;
      driver_.unmap(end, handles[mapped].bytes);
    }
    throw;
  }
}

void CudaDevice::unmap(Address at, const Handle& handle) {
  const Current current(*this);
  driver_.check(driver_.unmap(at, handle.bytes), "cuMemUnmap");
}

std::vector<std::vector<Handle>> CudaDevice::cut(const std::vector<Handle>&, const std::vector<std::uint64_t>&) {
  throw DeviceError("internal error: CUDA cannot cut a handle");
}

// The copy runs on the null stream, which streams made with the non-blocking flag do not wait for: hence both waits.
void CudaDevice::copy(Address to, Address from, std::uint64_t bytes) {
  const Current current(*this);
  driver_.check(driver_.synchronize(), "cuCtxSynchronize");
  driver_.check(driver_.copy_in_device(to, from, bytes), "cuMemcpyDtoD");
  driver_.check(driver_.synchronize(), "cuCtxSynchronize");
}

cuda::AllocationProp CudaDevice::allocation() const noexcept {
  cuda::AllocationProp prop{};
  prop.type = cuda::kAllocationPinned;
  prop.location = {cuda::kLocationDevice, device_};
  return prop;
}

void CudaDevice::probe() {
  int supported = 0;
  driver_.check(driver_.device_get_attribute(&supported, cuda::kAttributeVirtualMemory, device_),
                "cuDeviceGetAttribute");
  if (supported == 0) {
    throw DeviceError("CUDA device " + std::to_string(index_) + " does not support virtual memory management");
  }
  const cuda::AllocationProp prop = allocation();
  std::size_t bytes = 0;
  driver_.check(driver_.granularity(&bytes, &prop, cuda::kGranularityMinimum), "cuMemGetAllocationGranularity");
  granularity_ = bytes;
}

}  // namespace vattention
