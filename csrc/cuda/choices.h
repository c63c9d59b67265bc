// Which of the kernels that are built a call launches, by its sizes and the device. Pure functions.
#pragma once

#include <cstdint>

#include "launch.h"

namespace hypenet::cuda {

inline bool fits(size_t shared_bytes, const Device& device) {
  return shared_bytes <= static_cast<size_t>(device.max_shared_bytes);
}

enum class ScanBlock {
  kWide,    // eight warps, which share their tiles and so need half the traffic of four
  kNarrow,  // four
  kSlim,    // two, which share an SM's issue slots and shared memory with fewer others
  kSingle,  // four, with space for one chunk where there is none for two
};

// warps: of a head of all sequences or segments, 16 columns of V each. Eight warps a block are worth it where most SMs
// have such a block, two where four would leave SMs idle. bytes: of shared memory of the first two kinds.
inline ScanBlock choose_scan(int64_t warps, bool whole_wide_blocks, size_t wide_bytes, size_t narrow_bytes,
                             const Device& device) {
  if (whole_wide_blocks && 4 * (warps / 8) >= 3 * device.num_processors && fits(wide_bytes, device)) {
    return ScanBlock::kWide;
  }
  if (!fits(narrow_bytes, device)) return ScanBlock::kSingle;
  return warps / 4 < device.num_processors ? ScanBlock::kSlim : ScanBlock::kNarrow;
}

// Blocks of the split pass of decode attention, which take units of work in turn.
inline int64_t choose_decode_blocks(int64_t units, int blocks_per_processor, const Device& device) {
  const int64_t resident = int64_t{device.num_processors} * blocks_per_processor;
  return units < resident ? units : resident;
}

}  // namespace hypenet::cuda
