// A libcuda that runs nothing and remembers launches: what csrc/cuda/rtc asks of the driver, with one device.
#include <string.h>

enum { kMaxLaunches = 4096, kParamBytes = 512, kNameBytes = 512 };

struct Kernel {
  char name[kNameBytes];
  int shared_bytes, carveout;  // that it may ask for, and the preferred share, in percent
};

struct Launch {
  struct Kernel kernel;
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  char params[kParamBytes];  // the first bytes of the one parameter, and whatever lies behind it
};

static struct Kernel kernels[kMaxLaunches];
static struct Launch launches[kMaxLaunches];
static int num_kernels, num_launches, num_relaxed, capture_mode;
static void* current;
int fake_num_processors = 132, fake_max_shared_bytes = 227 * 1024, fake_major = 9, fake_minor = 0;

struct Launch* fake_launch(int i) { return &launches[i]; }
int fake_num_launches(void) { return num_launches; }
int fake_num_kernels(void) { return num_kernels; }
int fake_num_relaxed_loads(void) { return num_relaxed; }
void fake_forget_launches(void) { num_launches = 0; }

int cuInit(unsigned flags) { return flags == 0 ? 0 : 1; }
int cuGetErrorString(int error, const char** text) {
  *text = error == 101 ? "invalid device ordinal" : "invalid argument";
  return 0;
}
int cuDeviceGet(int* device, int index) {
  *device = 40 + index;  // not the index: nobody may confuse the two
  return index == 0 ? 0 : 101;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (device != 40) return 101;
  switch (attribute) {
    case 16:
      *value = fake_num_processors;
      return 0;
    case 75:
      *value = fake_major;
      return 0;
    case 76:
      *value = fake_minor;
      return 0;
    case 97:
      *value = fake_max_shared_bytes;
      return 0;
  }
  return 1;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &launches;
  return device == 40 ? 0 : 101;
}
int cuCtxGetCurrent(void** context) {
  *context = current;
  return 0;
}
int cuCtxSetCurrent(void* context) {
  current = context;
  return 0;
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
  const int before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return 0;
}
int cuLibraryLoadData(void** library, const void* code, const int* jit_options, void** jit_values,
                      unsigned num_jit_options, const int* options, void** values, unsigned num_options) {
  (void)jit_options, (void)jit_values, (void)options, (void)values;
  if (num_jit_options != 0 || num_options != 0 || strncmp(code, "cubin", 5) != 0) return 1;
  num_relaxed += capture_mode == 2;
  *library = &kernels[num_kernels];
  return 0;
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  struct Kernel* found = library;
  strncpy(found->name, name, kNameBytes - 1);
  ++num_kernels;
  *kernel = found;
  return 0;
}
int cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
  if (device != 40) return 101;
  if (attribute == 8) ((struct Kernel*)kernel)->shared_bytes = value;
  if (attribute == 9) ((struct Kernel*)kernel)->carveout = value;
  return attribute == 8 || attribute == 9 ? 0 : 1;
}
int cuLaunchKernel(void* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared_bytes, void* stream, void** params, void** extra) {
  const struct Kernel* launched = kernel;
  if (current != &launches || extra != 0 || (int)shared_bytes > launched->shared_bytes) return 1;
  struct Launch* launch = &launches[num_launches++];
  *launch = (struct Launch){*launched, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, stream, {0}};
  memcpy(launch->params, params[0], kParamBytes);
  return 0;
}
