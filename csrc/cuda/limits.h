// The limits of the CUDA kernels.
#pragma once

#include <cstdint>

namespace hypenet::cuda {

// The largest K of gated_delta_step.
constexpr int64_t kStepMaxKeyDim = 256;

// The head dimensions of hype_attention_fwd and hype_attention_bwd.
constexpr int64_t kAttentionHeadDims[] = {64, 128, 256};

// hype_attention_decode: the largest D; the least length of a segment of keys, and the most segments of a
// sequence.
constexpr int kDecodeMaxDim = 256, kDecodeSegment = 256, kDecodeMaxSegments = 256;

}  // namespace hypenet::cuda
