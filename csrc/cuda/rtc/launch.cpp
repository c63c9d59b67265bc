#include <cxxabi.h>

#include <cstdlib>
#include <memory>
#include <optional>

#include "compiler.h"
#include "driver.h"

namespace hypenet::cuda {

namespace rtc {

Compile compile = nullptr;

namespace {

std::mutex collection_mutex;
std::optional<Collection> collection;
std::atomic<bool> collecting = false;

// The kernel is loaded also while a graph is captured: no allocation is recorded or forbidden in between.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Driver& driver) : driver_(driver) {
    driver_.cuThreadExchangeStreamCaptureMode(&mode_);
  }
  ~RelaxedCapture() { driver_.cuThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  const Driver& driver_;
  int mode_ = kCaptureRelaxed;
};

// "gated_delta_scan.cuh" from the path of gated_delta_scan.cu
std::string header_of(const std::string& file) {
  const size_t folder = file.find_last_of('/');
  return file.substr(folder == std::string::npos ? 0 : folder + 1) + "h";
}

// "<float, int>" from TypeList<float, int>, "" from TypeList<>
std::string arguments_in(const std::type_info& type) {
  int failed = 0;
  const std::unique_ptr<char, void (*)(void*)> name(
      abi::__cxa_demangle(type.name(), nullptr, nullptr, &failed), std::free);
  const std::string text = failed == 0 ? name.get() : type.name();
  const std::string arguments = text.substr(text.find('<'));
  return arguments == "<>" ? "" : arguments;
}

}  // namespace

void start_collecting(const Device& device) {
  const std::lock_guard lock(collection_mutex);
  collection = Collection{device, {}};
  collecting = true;
}

Collection stop_collecting() {
  const std::lock_guard lock(collection_mutex);
  collecting = false;
  Collection done = collection.value_or(Collection{});
  collection.reset();
  return done;
}

}  // namespace rtc

Status find_device(int index, Device& device) {
  if (rtc::collecting) {
    const std::lock_guard lock(rtc::collection_mutex);
    if (rtc::collection) {
      device = rtc::collection->device;
      return nullptr;
    }
  }
  static thread_local std::string message;
  const rtc::Driver* driver = rtc::driver(message);
  if (driver == nullptr) return message.c_str();
  int id = 0;
  rtc::Result error = driver->cuDeviceGet(&id, index);
  if (error == 0) error = driver->cuDeviceGetAttribute(&device.num_processors, rtc::kNumProcessors, id);
  if (error == 0) error = driver->cuDeviceGetAttribute(&device.max_shared_bytes, rtc::kMaxSharedBytes, id);
  if (error == 0) return nullptr;
  message = "device " + std::to_string(index) + ": " + rtc::describe(*driver, error);
  return message.c_str();
}

KernelState::KernelState(const char* file, const char* qualified, const std::type_info& arguments)
    : qualified(qualified),
      source(rtc::header_of(file)),
      expression(std::string("hypenet::cuda::") + qualified + rtc::arguments_in(arguments)) {}

// Compiles the kernel if this device has none yet, and lets its blocks have their shared memory.
Status KernelState::load(const Size& size, int index) {
  std::string why;
  const rtc::Driver* driver = rtc::driver(why);
  if (driver == nullptr) return launch_error(qualified, size, why.c_str());
  const auto failed = [&](rtc::Result error) {
    return launch_error(qualified, size, rtc::describe(*driver, error).c_str());
  };
  Device facts;
  if (const Status status = find_device(index, facts); status != nullptr)
    return launch_error(qualified, size, status);
  const int bytes = static_cast<int>(size.shared_bytes);
  if (bytes > facts.max_shared_bytes) return too_much_shared_memory(qualified, size, facts.max_shared_bytes);

  const std::lock_guard lock(mutex_);
  Loaded& loaded = loaded_[index];
  if (loaded.allowed >= bytes) return nullptr;
  int device = 0;
  if (const auto error = driver->cuDeviceGet(&device, index); error != 0) return failed(error);
  void* kernel = loaded.kernel;
  const rtc::RelaxedCapture relaxed(*driver);
  if (kernel == nullptr) {
    int major = 0, minor = 0;
    rtc::Result error = driver->cuDeviceGetAttribute(&major, rtc::kComputeCapabilityMajor, device);
    if (error == 0) error = driver->cuDeviceGetAttribute(&minor, rtc::kComputeCapabilityMinor, device);
    if (error == 0) error = driver->cuDevicePrimaryCtxRetain(&loaded.context, device);
    if (error != 0) return failed(error);
    const rtc::Cubin cubin = rtc::compile(source, expression, major, minor);
    void* library = nullptr;  // for as long as the process
    error = driver->cuLibraryLoadData(&library, cubin.code.data(), nullptr, nullptr, 0, nullptr, nullptr, 0);
    if (error == 0) error = driver->cuLibraryGetKernel(&kernel, library, cubin.entry.c_str());
    if (error != 0) return failed(error);
    loaded.kernel = kernel;
  }
  if (bytes > 0) {
    rtc::Result error = driver->cuKernelSetAttribute(rtc::kDynamicSharedBytes, bytes, kernel, device);
    if (error == 0) {
      error = driver->cuKernelSetAttribute(rtc::kSharedCarveout, rtc::kCarveoutMaxShared, kernel, device);
    }
    if (error != 0) return failed(error);
  }
  loaded.allowed = bytes;
  return nullptr;
}

Status KernelState::start(const Size& size, Stream stream, const void* params, size_t params_bytes) {
  if (rtc::collecting) {
    const std::lock_guard lock(rtc::collection_mutex);
    if (rtc::collection) {
      const int most = rtc::collection->device.max_shared_bytes;
      if (size.shared_bytes > static_cast<size_t>(most)) return too_much_shared_memory(qualified, size, most);
      rtc::collection->launches.push_back(
          {this, size, std::string(static_cast<const char*>(params), params_bytes)});
      return nullptr;
    }
  }
  if (stream.device < 0 || stream.device >= kMaxDevices)
    return launch_error(qualified, size, "no such device");
  Loaded& loaded = loaded_[stream.device];
  if (loaded.allowed.load(std::memory_order_acquire) < static_cast<int>(size.shared_bytes)) {
    if (const Status status = load(size, stream.device); status != nullptr) return status;
  }
  std::string why;
  const rtc::Driver& driver = *rtc::driver(why);
  // A thread of autograd's may have no context, or another device's.
  void* current = nullptr;
  rtc::Result error = driver.cuCtxGetCurrent(&current);
  if (error == 0 && current != loaded.context) error = driver.cuCtxSetCurrent(loaded.context);
  if (error == 0) {
    void* arguments[] = {const_cast<void*>(params)};
    error = driver.cuLaunchKernel(
        loaded.kernel, static_cast<unsigned>(size.num_blocks), 1, 1, static_cast<unsigned>(size.num_threads),
        1, 1, static_cast<unsigned>(size.shared_bytes), stream.handle, arguments, nullptr);
  }
  return error == 0 ? nullptr : launch_error(qualified, size, rtc::describe(driver, error).c_str());
}

}  // namespace hypenet::cuda
