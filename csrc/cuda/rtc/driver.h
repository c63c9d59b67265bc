// The CUDA driver, found when it is first needed: a module that links to it could not be imported where there is none.
#pragma once

#include <cstddef>
#include <string>

namespace hypenet::cuda::rtc {

// Names and numbers of the driver's ABI, which does not change.
using Result = int;
constexpr int kComputeCapabilityMajor = 75, kComputeCapabilityMinor = 76;  // CU_DEVICE_ATTRIBUTE_...
constexpr int kNumProcessors = 16, kMaxSharedBytes = 97;                   // of a block that asks for it
constexpr int kDynamicSharedBytes = 8, kSharedCarveout = 9;                // CU_FUNC_ATTRIBUTE_...
constexpr int kCarveoutMaxShared = 100;                                    // percent
constexpr int kCaptureRelaxed = 2;                                         // CU_STREAM_CAPTURE_MODE_RELAXED

struct Driver {
  Result (*cuInit)(unsigned flags);
  Result (*cuGetErrorString)(Result error, const char** text);
  Result (*cuDeviceGet)(int* device, int index);
  Result (*cuDeviceGetAttribute)(int* value, int attribute, int device);
  Result (*cuDevicePrimaryCtxRetain)(void** context, int device);
  Result (*cuCtxGetCurrent)(void** context);
  Result (*cuCtxSetCurrent)(void* context);
  Result (*cuThreadExchangeStreamCaptureMode)(int* mode);
  Result (*cuLibraryLoadData)(void** library, const void* code, const int* jit_options, void** jit_values,
                              unsigned num_jit_options, const int* options, void** values,
                              unsigned num_options);
  Result (*cuLibraryGetKernel)(void** kernel, void* library, const char* name);
  Result (*cuKernelSetAttribute)(int attribute, int value, void* kernel, int device);
  Result (*cuLaunchKernel)(void* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                           unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream,
                           void** params, void** extra);
};

// The driver, initialised, or nullptr; `why` then says why there is none.
const Driver* driver(std::string& why);

// "out of memory (error 2)"
std::string describe(const Driver& driver, Result error);

}  // namespace hypenet::cuda::rtc
