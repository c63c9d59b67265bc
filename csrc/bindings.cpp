// The table of everything that the native code can run: one row per kernel. A row is a function of a dict of the
// fields of its params struct (fields.h), and on CUDA of a stream. HYPENET_CUDA chooses the device of the module, HYPENET_RTC
// CUDA kernels that are compiled when they are first used.
#include "bind.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "fields.h"
#if HYPENET_EMULATED
#include "emu/module.h"
#elif HYPENET_RTC
#include "cuda/rtc/module.h"
#endif

namespace hypenet {
namespace {

#if HYPENET_CUDA
namespace device = cuda;
#else
namespace device = cpu;
#endif

void bind_kernels(py::module_& m) {
  def_kernel(m, "gated_delta_chunk_fwd", device::gated_delta_chunk_fwd);
  def_kernel(m, "gated_delta_chunk_bwd", device::gated_delta_chunk_bwd);
  def_kernel(m, "gated_delta_step", device::gated_delta_step);
  def_kernel(m, "commit_states", device::commit_states);
  def_kernel(m, "hype_attention_fwd", device::hype_attention_fwd);
  def_kernel(m, "hype_attention_bwd", device::hype_attention_bwd);
  def_kernel(m, "hype_attention_decode", device::hype_attention_decode);
  def_kernel(m, "causal_conv1d_fwd", device::causal_conv1d_fwd);
  def_kernel(m, "causal_conv1d_bwd", device::causal_conv1d_bwd);
  def_kernel(m, "causal_conv1d_update", device::causal_conv1d_update);
#if !HYPENET_CUDA
  def_kernel(m, "gated_delta_recurrent_fwd", cpu::gated_delta_recurrent_fwd);
  // On CUDA these are Triton kernels.
  def_kernel(m, "rms_norm_rope_fwd", cpu::rms_norm_rope_fwd);
  def_kernel(m, "rms_norm_rope_bwd", cpu::rms_norm_rope_bwd);
  def_kernel(m, "rms_norm_gated_fwd", cpu::rms_norm_gated_fwd);
  def_kernel(m, "rms_norm_gated_bwd", cpu::rms_norm_gated_bwd);
  def_kernel(m, "add_rms_norm_fwd", cpu::add_rms_norm_fwd);
  def_kernel(m, "add_rms_norm_bwd", cpu::add_rms_norm_bwd);
  def_kernel(m, "swiglu_fwd", cpu::swiglu_fwd);
  def_kernel(m, "swiglu_bwd", cpu::swiglu_bwd);
#endif
}

#if HYPENET_CUDA
// The limits of the CUDA kernels, which the wrappers check and pad to.
void bind_limits(py::module_& m) {
  py::list head_dims;
  for (const int64_t D : cuda::kAttentionHeadDims) head_dims.append(D);
  m.attr("ATTENTION_HEAD_DIMS") = py::tuple(head_dims);
  m.attr("STEP_MAX_KEY_DIM") = cuda::kStepMaxKeyDim;
  m.attr("DECODE_MAX_DIM") = cuda::kDecodeMaxDim;
  m.attr("DECODE_SEGMENT") = cuda::kDecodeSegment;
  m.attr("DECODE_MAX_SEGMENTS") = cuda::kDecodeMaxSegments;
}
#endif

}  // namespace
}  // namespace hypenet

#if HYPENET_CUDA && !HYPENET_EMULATED && !HYPENET_RTC
// Of the CUDA runtime, which is linked into this module.
extern "C" int cudaRuntimeGetVersion(int* version);
extern "C" int cudaDriverGetVersion(int* version);

namespace hypenet {
namespace {

void bind_versions(py::module_& m) {
  m.def(
      "versions",
      [] {
        int runtime = 0, driver = 0;
        cudaRuntimeGetVersion(&runtime);
        cudaDriverGetVersion(&driver);
        return py::make_tuple(runtime, driver);
      },
      "The newest CUDA of this module's runtime and of the driver (0: none), each as 1000 major + 10 minor.");
}

}  // namespace
}  // namespace hypenet
#endif

// This object is linked into every module of its kind; each is entered by its own name.
#if HYPENET_CUDA
#if HYPENET_EMULATED
PYBIND11_MODULE(_emulated, m) {
  hypenet::emu::bind_machine(m);
#elif HYPENET_RTC
PYBIND11_MODULE(_cuda_rtc, m) {
  hypenet::cuda::rtc::bind_compiler(m);
#else
PYBIND11_MODULE(_cuda, m) {
  hypenet::bind_versions(m);
#endif
  hypenet::bind_kernels(m);
  hypenet::bind_limits(m);
}
#else
PYBIND11_MODULE(_cpu_baseline, m) { hypenet::bind_kernels(m); }
PYBIND11_MODULE(_cpu_v3, m) { hypenet::bind_kernels(m); }
PYBIND11_MODULE(_cpu_v4, m) { hypenet::bind_kernels(m); }
PYBIND11_MODULE(_cpu_v4_bf16, m) { hypenet::bind_kernels(m); }
#endif
