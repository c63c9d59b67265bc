// One struct of raw pointers and sizes per kernel, filled by the Python wrappers and read by the kernels.
//
// Notation: B batch, T tokens, H key heads, HV value heads (a multiple of H), K and V head dimensions, N
// sequences, S keys, HK key-value heads, D head dimension of attention. `acc` is the accumulation type:
// double where dtype is float64, float otherwise. Tensors without strides are contiguous. "or null" marks
// optional tensors.
#pragma once

#include <cstdint>

namespace hypenet {

enum class DType : int { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

// A [B, T, heads, dim] tensor whose last dimension is contiguous, or a [B, T, heads] tensor; strides in
// elements.
struct View {
  void* data;
  int64_t batch, token, head;
};

// [n] int64 or int32, contiguous.
struct Indices {
  const void* data;
  bool is_int32;
};

// The result of a launch: null, or the reason why the kernel did not run.
using Status = const char*;

// ---- gated delta rule and simple GLA (delta = false: no beta, no correction) ----

// Read by every kernel of the family.
struct GatedDeltaOperands {
  DType dtype;
  bool delta;
  int64_t num_threads, B, T, H, HV, K, V;
  double scale;
  View q, k;  // [B, T, H, K] dtype
  View v;     // [B, T, HV, V] dtype
  View g;     // [B, T, HV] acc, log decay <= 0
  View beta;  // [B, T, HV] acc, null data without delta
};

// Chunk and recurrent forward. N = B without cu_seqlens; B = 1 with it, and rows of o from cu_seqlens[N] on
// are written as zeros.
struct GatedDeltaFwdParams : GatedDeltaOperands {
  int64_t N;
  const int64_t* cu_seqlens;  // [N + 1] or null
  const void* initial_state;  // [N, HV, K, V] acc, or null
  // outputs
  void* o;            // [B, T, HV, V] dtype
  void* final_state;  // [N, HV, K, V] acc
  // With state_indices, initial_state and final_state are one pool [num_slots, HV, K, V] that is updated in
  // place. A negative index skips its sequence: o is zero, no state is read or written.
  Indices state_indices;     // [N] slot of each sequence; null data: no pool
  int64_t num_slots;         // of the pool
  int64_t slot_stride;       // elements between slots, each of which is contiguous; 0: HV K V
  int64_t checkpoint_every;  // a multiple of 64; 0: no checkpoints
  void* checkpoints;         // [B, T / checkpoint_every, HV, K, V] acc: the state after every
                             // checkpoint_every tokens. Sequence n of packed ones begins at row
                             // cu_seqlens[n] / checkpoint_every; rows of no sequence are not written
  // on CUDA, for NT chunks of 64 tokens: tensors saved for backward (h alone is null if no gradient is
  // needed)
  int64_t num_chunks;  // NT; with cu_seqlens an upper bound
  float* G;            // [NT, HV, 64] cumulative sum of max(g, -50) log2(e) within the chunk
  void* L;             // [NT, HV, 64, 64] dtype, hi/lo split (gated_delta.cuh); null without delta
  void* h;             // [NT, HV, K, V] dtype, the state before the chunk
  // sequence split on CUDA: NS segments of segment_chunks chunks each, the last one of a sequence shorter
  int64_t segment_chunks;  // 0: no split
  int64_t num_segments;    // NS; with cu_seqlens an upper bound; N without split
  float* transfers;        // [NS, HV, K, K], [NS, HV] without delta: factor of the state; saved for backward
  float* segment_states;   // [NS, HV, K, V] workspace: the state before the segment
  // workspace on CUDA
  int64_t* chunk_offsets;  // [2, N + 1] chunks before each sequence, and legal cu_seqlens; null without these
  int64_t* segment_offsets;  // [N + 1] segments before each sequence, null without cu_seqlens or split
  void* P;                   // [NT, HV, 64, 64] dtype, scale (Q K^T) . Gamma; null without delta
};

// Rows of dq, dk, dv, dg and dbeta from cu_seqlens[N] on are written as zeros.
struct GatedDeltaBwdParams : GatedDeltaOperands {
  int64_t N;
  // inputs, as in the forward
  const int64_t* cu_seqlens;
  const void* initial_state;
  View do_;                  // [B, T, HV, V] dtype
  const void* dfinal_state;  // [N, HV, K, V] acc, or null
  // saved by the forward on CUDA, null on the CPU: NT chunks of 64 tokens
  int64_t num_chunks;            // NT; with cu_seqlens an upper bound
  const int64_t* chunk_offsets;  // [2, N + 1] as in the forward
  const float* G;                // [NT, HV, 64]
  const void* L;                 // [NT, HV, 64, 64] dtype, null without delta
  const void* h;                 // [NT, HV, K, V] dtype, the state before the chunk
  // sequence split on CUDA, as in the forward
  int64_t segment_chunks, num_segments;
  const int64_t* segment_offsets;
  const float* transfers;
  float* segment_states;  // [NS, HV, K, V] workspace: the gradient of the state after the segment
  // workspace on CUDA
  void* dstates;  // [NT, HV, K, V] dtype, the gradient of the state after the chunk
  void* dB_low;   // [B, T, HV, V] dtype, low part of dv / beta if some beta of a chunk exceeds 1; or null
  // outputs
  void *dq, *dk;         // [B, T, H, K] dtype
  void* dv;              // [B, T, HV, V] dtype
  void* dg;              // [B, T, HV] acc
  void* dbeta;           // [B, T, HV] acc, null without delta
  void* dinitial_state;  // [N, HV, K, V] acc
};

// Decode: T tokens (usually one) per sequence, the state updated in place, or with `states` left as it is.
struct GatedDeltaStepParams : GatedDeltaOperands {
  bool use_qk_l2norm;
  bool gates_in_dtype;  // g and beta are dtype, not acc
  int64_t num_slots;
  int64_t slot_stride;  // elements between slots, each of which is contiguous; 0: HV K V
  double beta_limit;    // 0: beta as given; otherwise beta_limit sigmoid(beta)
  // inputs
  const void* A_log;      // [HV] acc, or null; with it the log decay is -exp(A_log) softplus(g + dt_bias)
  const void* dt_bias;    // [HV] acc, or null for 0
  Indices state_indices;  // [B] slot of each sequence, negative = skip it; null data = slot b
  // in place
  void* state;  // [num_slots, HV, K, V] acc
  // outputs
  void* o;       // [B, T, HV, V] dtype
  void* states;  // [B, T, HV, K, V] acc, the state after each token; or null. Zero for skipped sequences
};

// After draft tokens: slot of sequence b := states[b, num_accepted[b] - 1]. A slot is unchanged if
// num_accepted is 0 or if either number is out of range.
struct CommitStatesParams {
  DType dtype;  // of the states: float32 or float64
  int64_t num_threads, B, T, HV, K, V;
  int64_t num_slots, slot_stride;  // as in GatedDeltaStepParams
  // inputs
  Indices state_indices;  // [B] slot of each sequence, negative = skip it; null data = slot b
  Indices num_accepted;   // [B] in [0, T]
  const void* states;     // [B, T, HV, K, V]
  // in place
  void* state;  // [num_slots, HV, K, V]
};

// ---- HyPE attention ----

// Read by every kernel of the family. logit_scale_base = 0 means s_t = 1.
struct HypeAttentionOperands {
  DType dtype;
  int64_t num_threads, B, T, H, HK, D;
  double scale, logit_scale_base;
  View q;     // [B, T, H, D] dtype
  View k, v;  // [B, S, HK, D] dtype
  View gate;  // [B, T, H, D] dtype before the sigmoid, or null data
};

// Query t of a sequence is at position query_offset + t. Rows of outputs from cu_seqlens[N] on are written as zeros.
struct HypeAttentionFwdParams : HypeAttentionOperands {
  int64_t S, N, query_offset;
  const int64_t* cu_seqlens;  // [N + 1] or null; with it B = 1, S = T, query_offset = 0
  // [N] or null; with it, and cu_seqlens, k and v are caches [N, S, HK, D], and query t of sequence n is at position
  // query_offsets[n] + t
  const int64_t* query_offsets;
  // outputs
  void* o;          // [B, T, H, D] dtype, gated
  void* o_ungated;  // [B, T, H, D] dtype, or null without gate or if no gradient is needed
  void* lse;        // [B, H, T] acc, natural log of the softmax denominator; on the CPU may be null
};

struct HypeAttentionBwdParams : HypeAttentionOperands {
  int64_t S, N, query_offset;
  // inputs
  const int64_t* cu_seqlens;
  const void* o_ungated;  // [B, T, H, D] dtype; the output itself without gate
  const void* lse;        // [B, H, T] acc
  View do_;               // [B, T, H, D] dtype
  // outputs
  void* dq;       // [B, T, H, D] dtype
  void *dk, *dv;  // [B, S, HK, D] dtype
  void* dgate;    // [B, T, H, D] dtype, null without gate
  // workspace, null on the CPU
  void* do_ungated;  // [B, T, H, D] dtype, null without gate
  void* row_terms;   // [3, B, H, T] float32
};

// T query tokens (one or a few) per sequence against its cache. k, v: [B, T, HK, D], appended first; or null
// data.
struct HypeAttentionDecodeParams : HypeAttentionOperands {
  int64_t capacity, num_segments;
  // inputs
  Indices cache_seqlens;  // [B] valid keys before the append
  // in place
  View k_cache, v_cache;  // [B, capacity, HK, D] dtype
  // outputs
  void* o;  // [B, T, H, D] dtype
  // workspace on CUDA, per query row and segment of keys: the weighted sum of values and (max, sum) of the
  // softmax
  void* partial_o;        // [B, num_segments, T, H, D up to a multiple of 4] float
  void* partial_softmax;  // [B, num_segments, T, H, 2] float
};

// ---- causal depthwise convolution ----

constexpr int64_t kConvBlock = 64;  // tokens whose part of dweight is summed together

// Operands of every kernel of the family. W taps, C channels.
struct CausalConv1dOperands {
  DType dtype, weight_dtype, bias_dtype;
  bool silu;
  int64_t num_threads, B, T, C, W;
  View x;       // [B, T, C] dtype; token, head: strides of token and channel
  View weight;  // [1, C, W] weight_dtype, the tap of the token itself last; strides as for conv_state
  View bias;    // [1, C, 1] bias_dtype, or null data
};

// The sequences of every batch: packed ones by seq_idx or by cu_seqlens, else one per batch.
struct CausalConv1dSequences : CausalConv1dOperands {
  Indices seq_idx;     // [B, T] a change of value begins a sequence, negative = none (y = 0); or null data
  int64_t N;           // sequences of cu_seqlens
  Indices cu_seqlens;  // [N + 1], B = 1; tokens from cu_seqlens[N] on have y = 0; or null data
  const void* initial_states;  // [B or N, W - 1, C] dtype, inputs before each sequence, or null for 0
};

struct CausalConv1dFwdParams : CausalConv1dSequences {
  // outputs
  void* y;  // [B, T, C] dtype
};

struct CausalConv1dBwdParams : CausalConv1dSequences {
  View dy;             // [B, T, C] dtype, channels contiguous
  int64_t num_blocks;  // B ceil(T / kConvBlock)
  // outputs
  void* dx;               // [B, T, C] dtype
  void* dweight;          // [W + 1, C] acc, dbias last
  void* dinitial_states;  // [B or N, W - 1, C] dtype, zeros before the call, or null
  // workspace
  void* partials;  // [num_blocks, W + 1, C] acc
};

// Decode: T tokens (usually one) per sequence.
struct CausalConv1dUpdateParams : CausalConv1dOperands {
  int64_t L, num_slots;
  Indices cache_seqlens;  // [B] inputs seen before: state is a ring, input i at i % L; null data: a window
  Indices state_indices;  // [B] slot of each sequence, negative = skip it (y = 0); null data = slot b
  // in place
  View conv_state;  // [num_slots, C, L] dtype; batch, token, head: strides of slot, channel, input
  // outputs
  void* y;  // [B, T, C] dtype
};

// ---- RMSNorm with rotary embedding, output gate or residual connection; on CUDA these are Triton kernels ----

constexpr int64_t kNormBlock = 64;  // rows whose part of dweight is summed together

// Read by every kernel of the family. Tensors are rows of D elements, [rows, D].
struct RmsNormOperands {
  DType dtype, weight_dtype;
  int64_t num_threads, rows, D;
  double eps;
  const void* weight;  // [D] weight_dtype; rms_norm_rope: or null, for no norm
  // of the backward, null in the forward and without weight
  int64_t num_blocks;  // ceil(rows / kNormBlock)
  void* dweight;       // [D] acc
  void* partials;      // [num_blocks, D] acc, workspace
};

// Row (b T + t) H + h is of token t and head h.
struct RmsNormRopeOperands : RmsNormOperands {
  int64_t T, H;
  const void* x;  // [rows, D] dtype
  DType angle_dtype;
  bool shared_angles;     // cos and sin are [T, D], the same for every b; otherwise [B, T, D]
  const void *cos, *sin;  // angle_dtype, or null for no rotation
};

struct RmsNormRopeFwdParams : RmsNormRopeOperands {
  // outputs
  void* y;  // [rows, D] dtype
};

struct RmsNormRopeBwdParams : RmsNormRopeOperands {
  const void* dy;  // [rows, D] dtype
  // outputs
  void* dx;  // [rows, D] dtype
};

struct RmsNormGatedOperands : RmsNormOperands {
  bool silu;          // the gate is g sigmoid(g), otherwise sigmoid(g)
  const void *x, *g;  // [rows, D] dtype
};

struct RmsNormGatedFwdParams : RmsNormGatedOperands {
  // outputs
  void* y;  // [rows, D] dtype
};

struct RmsNormGatedBwdParams : RmsNormGatedOperands {
  const void* dy;  // [rows, D] dtype
  // outputs
  void *dx, *dg;  // [rows, D] dtype
};

struct AddRmsNormFwdParams : RmsNormOperands {
  DType x_dtype;
  // inputs
  const void* x;         // [rows, D] x_dtype
  const void* residual;  // [rows, D] dtype
  // outputs
  void *sum, *y;  // [rows, D] dtype
};

struct AddRmsNormBwdParams : RmsNormOperands {
  DType x_dtype;
  // inputs
  const void *sum, *dsum, *dy;  // [rows, D] dtype
  // outputs
  void* dresidual;  // [rows, D] dtype
  void* dx;         // [rows, D] x_dtype, or null if that is dtype: dx is dresidual
};

// ---- the gated activation of an MLP; on CUDA a Triton kernel ----

struct SwigluOperands {
  DType dtype;
  int64_t num_threads, size;
  const void *x, *y;  // [size] dtype
};

struct SwigluFwdParams : SwigluOperands {
  // outputs
  void* z;  // [size] dtype, silu(x) y
};

struct SwigluBwdParams : SwigluOperands {
  const void* dz;  // [size] dtype
  // outputs
  void *dx, *dy;  // [size] dtype
};

}  // namespace hypenet
