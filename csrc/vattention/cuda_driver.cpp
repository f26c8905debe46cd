#include "vattention/cuda_driver.h"

#include <dlfcn.h>

#include <string>

#include "vattention/errors.h"

namespace vattention::cuda {
namespace {

template <typename Function>
void find(void* library, const char* name, Function& function) {
  void* symbol = dlsym(library, name);
  if (symbol == nullptr)
    throw DeviceError(std::string("libcuda.so.1 has no ") + name + ": the NVIDIA driver is too old");
  function = reinterpret_cast<Function>(symbol);
}

Driver load() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw DeviceError(std::string("no NVIDIA driver on this machine: ") + dlerror());
  Driver driver{};
  find(library, "cuInit", driver.init);
  find(library, "cuDeviceGet", driver.device_get);
  find(library, "cuDeviceGetCount", driver.device_get_count);
  find(library, "cuDeviceGetAttribute", driver.device_get_attribute);
  find(library, "cuDevicePrimaryCtxRetain", driver.primary_retain);
  find(library, "cuDevicePrimaryCtxRelease_v2", driver.primary_release);
  find(library, "cuCtxPushCurrent_v2", driver.push_current);
  find(library, "cuCtxPopCurrent_v2", driver.pop_current);
  find(library, "cuGetErrorName", driver.error_name);
  find(library, "cuGetErrorString", driver.error_string);
  find(library, "cuMemGetAllocationGranularity", driver.granularity);
  find(library, "cuMemAddressReserve", driver.address_reserve);
  find(library, "cuMemAddressFree", driver.address_free);
  find(library, "cuMemCreate", driver.create);
  find(library, "cuMemRelease", driver.release);
  find(library, "cuMemMap", driver.map);
  find(library, "cuMemUnmap", driver.unmap);
  find(library, "cuCtxSynchronize", driver.synchronize);
  find(library, "cuMemcpyDtoD_v2", driver.copy_in_device);
  find(library, "cuMemSetAccess", driver.set_access);
  driver.check(driver.init(0), "cuInit");
  return driver;
}

}  // namespace

const Driver& Driver::get() {
  static const Driver driver = load();  // a failure is thrown and tried again at the next call
  return driver;
}

void Driver::check(Result result, const char* call) const {
  if (result == kSuccess) return;
  const char *name = nullptr, *text = nullptr;
  error_name(result, &name);
  error_string(result, &text);
  const std::string message = std::string(call) + " failed: " + (name ? name : "unknown error") + " (" +
                              std::to_string(result) + "): " + (text ? text : "no text");
  if (result == kOutOfMemory) throw DeviceOutOfMemory(message);
  throw DeviceError(message);
}

}  // namespace vattention::cuda
