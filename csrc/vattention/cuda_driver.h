// The few calls of the CUDA driver API that virtual memory needs, found in libcuda.so.1 at run time, so that neither
// toolkit nor driver is needed to build or import. Names and layouts follow docs.nvidia.com/cuda/cuda-driver-api.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vattention::cuda {

using Result = int;
using DeviceId = int;
using DevicePtr = unsigned long long;
using AllocationHandle = unsigned long long;
using Context = void*;

inline constexpr Result kSuccess = 0;
inline constexpr Result kOutOfMemory = 2;
inline constexpr int kAllocationPinned = 1;
inline constexpr int kLocationDevice = 1;
inline constexpr int kAccessReadWrite = 3;
inline constexpr int kGranularityMinimum = 0;
inline constexpr int kAttributeVirtualMemory = 102;

struct Location {
  int type;
  int id;
};

struct AllocationProp {
  int type;
  int requested_handle_types;
  Location location;
  void* win32_handle_meta_data;
  struct {
    unsigned char compression_type;
    unsigned char gpu_direct_rdma_capable;
    unsigned short usage;
    unsigned char reserved[4];
  } alloc_flags;
};

static_assert(sizeof(AllocationProp) == 32, "the driver reads CUmemAllocationProp");

struct AccessDesc {
  Location location;
  int flags;
};

static_assert(sizeof(AccessDesc) == 12, "the driver reads CUmemAccessDesc");

struct Driver {
  // Opens the library and finds every call; throws DeviceError saying what is missing.
  static const Driver& get();

  Result (*init)(unsigned flags);
  Result (*device_get)(DeviceId* device, int ordinal);
  Result (*device_get_count)(int* count);
  Result (*device_get_attribute)(int* value, int attribute, DeviceId device);
  Result (*primary_retain)(Context* context, DeviceId device);
  Result (*primary_release)(DeviceId device);
  Result (*push_current)(Context context);
  Result (*pop_current)(Context* context);
  Result (*error_name)(Result error, const char** text);
  Result (*error_string)(Result error, const char** text);
  Result (*granularity)(std::size_t* bytes, const AllocationProp* prop, int option);
  Result (*address_reserve)(DevicePtr* at, std::size_t bytes, std::size_t alignment, DevicePtr hint,
                            unsigned long long flags);
  Result (*address_free)(DevicePtr at, std::size_t bytes);
  Result (*create)(AllocationHandle* handle, std::size_t bytes, const AllocationProp* prop, unsigned long long flags);
  Result (*release)(AllocationHandle handle);
  Result (*map)(DevicePtr at, std::size_t bytes, std::size_t offset, AllocationHandle handle, unsigned long long flags);
  Result (*unmap)(DevicePtr at, std::size_t bytes);
  Result (*synchronize)();  // the current context
  Result (*copy_in_device)(DevicePtr to, DevicePtr from, std::size_t bytes);
  Result (*set_access)(DevicePtr at, std::size_t bytes, const AccessDesc* desc, std::size_t count);

  // Throws DeviceError naming the call and the driver's own text unless the result is success.
  void check(Result result, const char* call) const;
};

}  // namespace vattention::cuda
