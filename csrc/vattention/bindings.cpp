// The native module: C++ types as Python sees them. The GIL is released around everything that can block; nothing here
// is called from a native thread.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <string>
#include <type_traits>

#include "vattention/cuda_device.h"
#include "vattention/dlpack.h"
#include "vattention/errors.h"
#include "vattention/host_device.h"
#include "vattention/kv_cache.h"

namespace py = pybind11;

namespace vattention {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

// Raises the class of vattention.errors with that name.
template <typename... Args>
void raise(const char* name, Args&&... args) {
  const py::object type = py::module_::import("vattention.errors").attr(name);
  const py::object error = type(std::forward<Args>(args)...);
  PyErr_SetObject(type.ptr(), error.ptr());
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const OutOfMemory& error) {
    raise("OutOfMemoryError", error.what(), error.needed, error.available);
  } catch (const NoFreeSlot& error) {
    raise("NoFreeSlotError", error.what());
  } catch (const DeviceError& error) {
    raise("DeviceError", error.what());
  } catch (const ForkError& error) {
    raise("ForkError", error.what());
  } catch (const IntegrityError& error) {
    raise("IntegrityError", error.what());
  } catch (const Error& error) {
    raise("VAttentionError", error.what());
  }
}

// rule: what is allowed, such as " must be an integer, got ".
[[noreturn]] void refuse(const char* name, const char* rule, PyObject* object) {
  PyErr_Clear();
  throw py::type_error(name + (rule + std::string(py::repr(object))));
}

std::int64_t to_int(PyObject* item, const char* name, const char* rule = " must be an integer, got ") {
  const long long value = PyLong_AsLongLong(item);
  if (value != -1 || !PyErr_Occurred()) return value;
  if (PyErr_ExceptionMatches(PyExc_OverflowError) == 0) refuse(name, rule, item);
  PyErr_Clear();
  throw py::value_error(std::string(name) + " holds a number of more than 64 bits");
}

constexpr const char* kNotIntegers = " must be a sequence of integers, got ";

py::object sequence(const py::object& object, const char* name) {
  PyObject* items = PySequence_Fast(object.ptr(), "");
  if (items == nullptr) refuse(name, kNotIntegers, object.ptr());
  return py::reinterpret_steal<py::object>(items);
}

py::object snapshot(const py::object& items) {
  return py::reinterpret_steal<py::object>(PySequence_Tuple(items.ptr()));
}

// Reads the two sequences without pybind11's converters, which took most of a prepare of 512 slots. Items that are not
// plain ints run Python code, which may change the lists: then copies are read.
Targets to_targets(const py::object& slots, const py::object& tokens) {
  const py::object s = sequence(slots, "slots");
  const py::object t = sequence(tokens, "tokens");
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(s.ptr());
  if (size != PySequence_Fast_GET_SIZE(t.ptr())) {
    throw py::value_error("slots and tokens must be of one length, got " + std::to_string(size) + " and " +
                          std::to_string(PySequence_Fast_GET_SIZE(t.ptr())));
  }
  const bool may_change = PyList_Check(s.ptr()) || PyList_Check(t.ptr());
  Targets targets(static_cast<std::size_t>(size));
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject *slot = PySequence_Fast_GET_ITEM(s.ptr(), i), *token = PySequence_Fast_GET_ITEM(t.ptr(), i);
    if (may_change && !(PyLong_CheckExact(slot) && PyLong_CheckExact(token))) {
      return to_targets(snapshot(s), snapshot(t));
    }
    targets[static_cast<std::size_t>(i)] = {to_int(slot, "slots", kNotIntegers), to_int(token, "tokens", kNotIntegers)};
  }
  return targets;
}

// A method with one integer argument. Numbers beyond 64 bits are a ValueError that names the argument.
template <auto kMethod>
auto with_int(const char* name) {
  return [name](KVCache& cache, const py::object& value) {
    const std::int64_t number = to_int(value.ptr(), name);
    const py::gil_scoped_release no_gil;
    return (cache.*kMethod)(number);
  };
}

// A tensor of bytes over one region. It keeps the address range alive, not the pages.
template <typename Managed>
struct RegionTensor {
  Managed managed{};
  std::int64_t shape = 0;
  std::shared_ptr<Reservation> reservation;
};

template <typename Managed>
constexpr const char* kCapsuleName = "dltensor";
template <>
constexpr const char* kCapsuleName<DLManagedTensorVersioned> = "dltensor_versioned";

template <typename Managed>
void drop_unused(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, kCapsuleName<Managed>) == 0) return;  // consumed: the tensor owns it now
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, kCapsuleName<Managed>));
  managed->deleter(managed);
}

std::shared_ptr<Reservation> reservation_of(KVCache& cache) {
  const py::gil_scoped_release no_gil;
  return cache.reservation();
}

template <typename Managed>
py::object make_capsule(KVCache& cache, std::uint64_t region) {
  const Geometry& geometry = cache.geometry();
  auto owner = std::make_unique<RegionTensor<Managed>>();
  owner->reservation = reservation_of(cache);
  if (!owner->reservation) throw Error("the cache is closed");
  owner->shape = static_cast<std::int64_t>(geometry.region_bytes());
  DLTensor& tensor = owner->managed.dl_tensor;
  tensor = {reinterpret_cast<void*>(owner->reservation->base() + region * geometry.region_bytes()),
            {static_cast<std::int32_t>(cache.device()->type()), cache.device()->index()},
            1,
            {1, 8, 1},
            &owner->shape,
            nullptr,
            0};
  owner->managed.manager_ctx = owner.get();
  owner->managed.deleter = [](Managed* self) { delete static_cast<RegionTensor<Managed>*>(self->manager_ctx); };
  if constexpr (std::is_same_v<Managed, DLManagedTensorVersioned>) owner->managed.version = {1, 0};
  PyObject* capsule = PyCapsule_New(&owner->managed, kCapsuleName<Managed>, drop_unused<Managed>);
  if (capsule == nullptr) throw py::error_already_set();
  owner.release();
  return py::reinterpret_steal<py::object>(capsule);
}

// is_versioned: whether the capsule is of DLPack 1.0.
py::object region_capsule(KVCache& cache, std::uint64_t region, bool is_versioned) {
  if (region >= cache.geometry().num_regions()) {
    throw py::index_error("region must be from 0 to " + std::to_string(cache.geometry().num_regions() - 1) + ", got " +
                          std::to_string(region));
  }
  return is_versioned ? make_capsule<DLManagedTensorVersioned>(cache, region)
                      : make_capsule<DLManagedTensor>(cache, region);
}

std::unique_ptr<KVCache> make_cache(std::shared_ptr<Device> device, std::uint64_t num_regions,
                                    std::uint64_t token_bytes, std::uint64_t num_slots, std::uint64_t max_tokens,
                                    std::uint64_t page_bytes, std::int64_t budget_bytes, const Policy& policy) {
  const py::gil_scoped_release no_gil;
  const Geometry geometry(num_regions, token_bytes, num_slots, max_tokens, page_bytes);
  return std::make_unique<KVCache>(std::move(device), geometry, budget_bytes, policy);
}

py::dict to_dict(const Stats& stats) {
  py::dict calls, seconds;
  for (std::size_t kind = 0; kind < kNumCallKinds; ++kind) {
    calls[kCallNames[kind]] = stats.device[kind].calls;
    seconds[kCallNames[kind]] = static_cast<double>(stats.device[kind].nanoseconds) * 1e-9;
  }
  py::dict pooled;
  for (std::size_t c = 0; c < kNumClasses; ++c) pooled[py::int_(kClassRows[c])] = stats.pooled_extents[c];
  const Counters& counters = stats.counters;
  using py::literals::operator""_a;
  return py::dict("reserved_bytes"_a = stats.reserved_bytes, "capacity_bytes"_a = stats.capacity_bytes,
                  "created_bytes"_a = stats.created_bytes, "mapped_bytes"_a = stats.mapped_bytes,
                  "idle_bytes"_a = stats.idle_bytes, "wasted_bytes"_a = stats.wasted_bytes,
                  "peak_mapped_bytes"_a = stats.peak_mapped_bytes, "prepares"_a = counters.prepares,
                  "prepares_waited"_a = counters.prepares_waited, "prefetches"_a = counters.prefetches,
                  "prefetches_short"_a = counters.prefetches_short, "rows_prefetched"_a = counters.rows_prefetched,
                  "rows_reclaimed"_a = counters.rows_reclaimed, "worker_failures"_a = counters.worker_failures,
                  "worker_error"_a = counters.worker_error, "pooled_extents"_a = pooled, "calls"_a = calls,
                  "seconds"_a = seconds);
}

void define_devices(py::module_& m) {
  py::class_<Device, std::shared_ptr<Device>>(m, "Device")
      .def_property_readonly("granularity", &Device::granularity)
      .def_property_readonly("index", &Device::index)
      .def_property_readonly("is_cuda", [](const Device& device) { return device.type() == DeviceType::kCuda; });
  m.def("report_faults", &report_faults);
  m.def("host_device", []() -> std::shared_ptr<Device> { return std::make_shared<HostDevice>(); });
  m.def(
      "cuda_device", [](std::int32_t index) -> std::shared_ptr<Device> { return std::make_shared<CudaDevice>(index); },
      py::arg("index"), NoGil());
}

void define_cache(py::module_& m) {
  py::class_<Policy>(m, "Policy")
      .def(py::init([](bool deferred, double threshold, std::uint64_t extent_rows) {
             return Policy{deferred, threshold, extent_rows};
           }),
           py::kw_only(), py::arg("deferred_reclamation"), py::arg("reclaim_threshold"), py::arg("max_extent_rows"));
  const auto prepare = [](KVCache& cache, const py::object& slots, const py::object& tokens) {
    const Targets targets = to_targets(slots, tokens);
    const py::gil_scoped_release no_gil;
    cache.prepare(targets);
  };
  const auto prefetch = [](KVCache& cache, const py::object& slots, const py::object& tokens, const py::object& lead) {
    const std::int64_t lead_tokens = to_int(lead.ptr(), "lead_tokens");
    const Targets targets = to_targets(slots, tokens);
    const py::gil_scoped_release no_gil;
    cache.prefetch(targets, lead_tokens);
  };
  const auto share = [](KVCache& cache, const py::object& source, const py::object& target, const py::object& tokens) {
    const std::int64_t from = to_int(source.ptr(), "source"), to = to_int(target.ptr(), "target");
    const std::int64_t count = to_int(tokens.ptr(), "tokens");
    const py::gil_scoped_release no_gil;
    return cache.share(from, to, count);
  };
  const auto trim = [](KVCache& cache, const py::object& slot, const py::object& tokens) {
    const std::int64_t index = to_int(slot.ptr(), "slot"), length = to_int(tokens.ptr(), "tokens");
    const py::gil_scoped_release no_gil;
    return cache.trim(index, length);
  };
  py::class_<KVCache>(m, "KVCache")
      .def(py::init(&make_cache), py::kw_only(), py::arg("device"), py::arg("num_regions"), py::arg("token_bytes"),
           py::arg("num_slots"), py::arg("max_tokens"), py::arg("page_bytes"), py::arg("budget_bytes"),
           py::arg("policy"))
      .def_property_readonly("device", &KVCache::device)
      .def_property_readonly("slot_bytes", [](const KVCache& cache) { return cache.geometry().slot_bytes(); })
      .def("rows_for", [](const KVCache& cache, std::uint64_t tokens) { return cache.geometry().rows_for(tokens); })
      .def("capacity_rows", &KVCache::capacity_rows, NoGil())
      .def("region_capsule", &region_capsule, py::arg("region"), py::arg("is_versioned") = false)
      .def("alloc", with_int<&KVCache::alloc>("tokens"), py::arg("tokens"))
      .def("claim", with_int<&KVCache::claim>("slot"), py::arg("slot"))
      .def("free", with_int<&KVCache::free>("slot"), py::arg("slot"))
      .def("prepare", prepare, py::arg("slots"), py::arg("tokens"))
      .def("prefetch", prefetch, py::arg("slots"), py::arg("tokens"), py::arg("lead_tokens"))
      .def("wait", &KVCache::wait, NoGil())
      .def("share", share, py::arg("source"), py::arg("target"), py::arg("tokens"))
      .def("trim", trim, py::arg("slot"), py::arg("tokens"))
      .def("map_ahead", with_int<&KVCache::map_ahead>("tokens"), py::arg("tokens"))
      .def("set_deferred_reclamation", &KVCache::set_deferred_reclamation, py::arg("deferred"), NoGil())
      .def("reclaim_idle", &KVCache::reclaim_idle, NoGil())
      .def("resize", with_int<&KVCache::resize>("budget_bytes"), py::arg("budget_bytes"))
      .def("fill_pool", with_int<&KVCache::fill_pool>("bytes"), py::arg("bytes"))
      .def("slot_state", with_int<&KVCache::slot_state>("slot"), py::arg("slot"))
      .def("stats",
           [](KVCache& cache) {
             return to_dict([&] {
               const py::gil_scoped_release no_gil;
               return cache.stats();
             }());
           })
      .def("check_integrity", &KVCache::check_integrity, NoGil())
      .def("close", &KVCache::close, NoGil());
}

}  // namespace
}  // namespace vattention

PYBIND11_MODULE(_native, m) {
  m.doc() = "Page-mapping allocator: reserved address space, physical rows mapped into slots on demand.";
  pybind11::register_exception_translator(&vattention::translate);
  vattention::define_devices(m);
  vattention::define_cache(m);
}
