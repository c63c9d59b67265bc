"""What the gated delta rule and simple GLA share: one family of kernels, with beta (delta rule) or without.

Everything here takes beta = None for simple GLA. Fakes check and allocate; the functions for a device add the native
call. g, beta and states arrive in the accumulation type.

A forward op comes three times. <op> is differentiable, and returns besides o and final_state a list of what its
backward reads again (Saved; empty on the CPU, which computes it anew); <op>_saving is the same without a gradient, and
runs below it. <op>_inference (save = False) returns o and final_state alone: where no gradient is wanted, a call pays
neither for more tensors nor for PyTorch's autograd layer. NT chunks of 64 tokens, K and V padded:
    G [NT, HV, 64] float32, L [NT, HV, 64, 64] dtype, h [NT, HV, K, V] dtype, chunk_offsets [N + 1] int64,
and where sequences are split, into NS segments:
    transfers [NS, HV, K, K] ([NS, HV] without delta) float32, segment_offsets [N + 1] int64
"""

import functools
from typing import NamedTuple

import torch

from hypenet_kernels import _checks, _differentiable, _native

# fla's arguments that say how it computes, not what: without meaning here.
HINTS = frozenset({"chunk_size", "cu_seqlens_cpu", "chunk_indices"})
# fla's arguments that change the result, at the values that ask for nothing.
NOT_BUILT = {
    "use_gate_in_kernel": False,
    "use_beta_sigmoid_in_kernel": False,
    "allow_neg_eigval": False,
    "state_v_first": False,
    "transpose_state_layout": False,
    "A_log": None,
    "dt_bias": None,
    "cp_context": None,
    "gk": None,
    "gv": None,
}
# What transformers' layers pass on to whatever stands in for their own function.
MODEL_ARGUMENTS = frozenset(
    {
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "num_items_in_batch",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "position_ids",
        "is_causal",
        "seq_idx",
    }
)
CHUNK = 64  # tokens, on CUDA
# Head dimensions that are built for CUDA; others are padded with zeros, which changes nothing, and narrowed back.
KEY_DIMS, VALUE_DIM_MULTIPLE = (64, 128, 256), 64
# Splitting sequences takes 2.25 times the work, so it is for few heads: at most SPLIT_HEADS of 128 value columns. They
# are cut into DEVICE_HEADS segments, about what a large device runs at once, of at least MIN_SEGMENT chunks, since
# the states still go from segment to segment one by one.
SPLIT_HEADS, DEVICE_HEADS, MIN_SEGMENT = 40, 128, 16
STEP_TOKENS = 16  # up to which the recurrent form on CUDA goes token by token


class Saved(NamedTuple):
    """What the forward keeps for the backward on CUDA."""

    G: torch.Tensor  # sum of max(g, -50) log2(e) from the chunk's start to each token
    L: torch.Tensor  # stril((I + stril(diag(beta) K K^T . Gamma))^-1) of every chunk, in two parts (gated_delta.cuh)
    h: torch.Tensor  # the state before every chunk, rounded
    chunk_offsets: torch.Tensor  # chunks before every sequence; empty without cu_seqlens
    transfers: torch.Tensor  # by what every segment of a split sequence multiplies a state; empty without split
    segment_offsets: torch.Tensor  # segments before every sequence; empty without cu_seqlens or split


def check_other_arguments(op, arguments):
    """Lets pass what asks for nothing; names what is not built, and what nobody knows."""
    for name, value in arguments.items():
        if name in NOT_BUILT:
            if value is not NOT_BUILT[name]:
                _checks.fail(NotImplementedError, op, name, f"be {NOT_BUILT[name]} (nothing else is built)", value)
        elif name not in HINTS and name not in MODEL_ARGUMENTS:
            raise TypeError(f"{op}: unexpected argument {name!r}")


def l2norm(x, eps=1e-6):
    """x / sqrt(sum(x^2) + eps) over the last dimension, in the accumulation type, rounded once."""
    wide = x.to(_native.accumulator(x.dtype))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def run(
    op,
    operators,
    q,
    k,
    v,
    gates,
    scale,
    initial_state,
    output_final_state,
    use_qk_l2norm,
    cu_seqlens,
    split_sequence=False,
    defaults=None,
):
    """A public function over whole sequences: one of `operators` on gates = {"g": ..., "beta": ...}, in that order.

    operators: the op for inference and the differentiable one. defaults: the values of gates that may be None.
    """
    required, optional = {"q": q, "k": k, "v": v}, {"initial_state": initial_state, "cu_seqlens": cu_seqlens}
    if defaults is None:
        check_tensors(op, required | gates, optional)
    else:
        check_tensors(op, required, optional | gates)
        for name, value in defaults.items():
            if gates[name] is None:
                gates[name] = v.new_full((), value, dtype=_native.accumulator(q.dtype)).expand(v.shape[:3])
    if use_qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    gates = [accumulated(op, name, x, q) for name, x in gates.items()]
    initial_state = accumulated(op, "initial_state", initial_state, q)
    operator = operators[_checks.wants_gradient(q, k, v, *gates, initial_state)]
    segment_chunks = chunks_of_segment(op, q, v, cu_seqlens) if split_sequence else 0
    scale = default_scale(q, scale)
    o, final_state, *_ = operator(q, k, v, *gates, initial_state, cu_seqlens, scale, segment_chunks)
    return o, final_state if output_final_state else None


def check_tensors(op, required, optional):
    _checks.tensors(op, required, optional)
    _checks.rank(op, "q", required["q"], "B T H K")


def default_scale(q, scale):
    return max(1, q.shape[-1]) ** -0.5 if scale is None else float(scale)


def accumulated(op, name, x, q):
    """g, beta or a state of any float type, in the accumulation type of q."""
    wide = _native.accumulator(q.dtype)
    if x is None or x.dtype == wide:
        return x
    _checks.dtype(op, name, x, _checks.FLOATS)
    return x.to(wide)


def check_inputs(op, q, k, v, g, beta, gate_dtype=None):
    """gate_dtype: that of g and beta; default the accumulation type."""
    _checks.rank(op, "q", q, "B T H K")
    _checks.rank(op, "v", v, "B T HV V")
    _checks.element(op, "q", q)
    (B, T, H, K), (_, _, HV, V) = q.shape, v.shape
    _checks.like(op, "k", k, "q", q)
    _checks.shape(op, "v", v, (B, T, HV, V))
    _checks.same_dtype(op, "v", v, q)
    if K == 0 or V == 0:
        _checks.fail(ValueError, op, "head dimensions", "be at least 1", f"K = {K}, V = {V}")
    _checks.multiple(op, "v's number of heads", HV, "q's number of heads", H)
    gate_dtypes = (gate_dtype or _native.accumulator(q.dtype),)
    for name, x in (("g", g), ("beta", beta)):
        if x is not None:
            _checks.shape(op, name, x, (B, T, HV))
            _checks.dtype(op, name, x, gate_dtypes)


def num_sequences(q, cu_seqlens):
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def max_chunks(q, cu_seqlens):
    """Chunks that the sequences have together; with cu_seqlens the most that they may have."""
    B, T = q.shape[:2]
    if cu_seqlens is None:
        return B * ((T + CHUNK - 1) // CHUNK)
    return T // CHUNK + num_sequences(q, cu_seqlens)


def chunks_of_segment(op, q, v, cu_seqlens):
    """How many chunks a segment of a split sequence has, from shapes alone; 0 where splitting does not pay."""
    _checks.rank(op, "v", v, "B T HV V")
    if cu_seqlens is not None:
        _checks.rank(op, "cu_seqlens", cu_seqlens, "N+1")
    sequence_heads = v.shape[2] * -(-v.shape[3] // 128)
    if num_sequences(q, cu_seqlens) * sequence_heads > SPLIT_HEADS:
        return 0
    chunks = max(MIN_SEGMENT, -(-max_chunks(q, cu_seqlens) * sequence_heads // DEVICE_HEADS))
    return chunks if 2 * chunks * CHUNK <= q.shape[1] else 0


def max_segments(q, cu_seqlens, segment_chunks):
    """Segments that the sequences have together; with cu_seqlens the most that they may have."""
    N, tokens = num_sequences(q, cu_seqlens), segment_chunks * CHUNK
    if segment_chunks == 0:
        return N
    if cu_seqlens is None:
        return N * max(1, -(-q.shape[1] // tokens))
    return N + q.shape[1] // tokens


def outputs(op, q, k, v, g, beta, initial_state, cu_seqlens):
    """Checks the inputs of a forward op; returns o and final_state."""
    check_inputs(op, q, k, v, g, beta)
    (B, T, _, K), (HV, V) = q.shape, v.shape[2:]
    if cu_seqlens is not None:
        _checks.cu_seqlens(op, cu_seqlens, B, T)
    N = num_sequences(q, cu_seqlens)
    _check_state(op, "initial_state", initial_state, q, [N, HV, K, V])
    return q.new_empty(B, T, HV, V), q.new_empty(N, HV, K, V, dtype=_native.accumulator(q.dtype))


def padded_dims(op, q, v):
    """K and V as CUDA kernels over whole sequences take them."""
    K, V = q.shape[3], v.shape[3]
    built = [n for n in KEY_DIMS if n >= K]
    if not built:
        _checks.fail(NotImplementedError, op, "q", f"have a head dimension of at most {KEY_DIMS[-1]} on CUDA", K)
    return built[0], (V + VALUE_DIM_MULTIPLE - 1) // VALUE_DIM_MULTIPLE * VALUE_DIM_MULTIPLE


def to_save(op, q, v, beta, cu_seqlens, segment_chunks, save=True):
    """What the differentiable forward on CUDA keeps, not yet computed; without `save` what any forward needs of it."""
    NT, HV, (K, V) = max_chunks(q, cu_seqlens), v.shape[2], padded_dims(op, q, v)
    return Saved(
        G=q.new_empty(NT, HV, CHUNK, dtype=torch.float32),
        L=q.new_empty(0) if beta is None else q.new_empty(NT, HV, CHUNK, CHUNK),
        h=q.new_empty(NT, HV, K, V) if save else None,
        chunk_offsets=_offsets(q, cu_seqlens),
        transfers=_transfers(q, v, beta, cu_seqlens, segment_chunks, K),
        segment_offsets=_offsets(q, cu_seqlens if segment_chunks else None),
    )


def forward_fake(op, q, k, v, g, beta, initial_state, cu_seqlens, segment_chunks, save):
    results = outputs(op, q, k, v, g, beta, initial_state, cu_seqlens)
    if not save:
        return results
    return *results, list(to_save(op, q, v, beta, cu_seqlens, segment_chunks) if _native.on_cuda(q) else ())


def forward_cpu(kernel_name, op, q, k, v, g, beta, initial_state, cu_seqlens, scale, save):
    o, final_state = outputs(op, q, k, v, g, beta, initial_state, cu_seqlens)
    q, k, v = map(_native.dense_last, (q, k, v))
    initial_state, cu_seqlens = _contiguous(initial_state), _bounds(cu_seqlens)
    fields = {
        **_operands(q, k, v, g, beta, scale),
        **_sequences(final_state, cu_seqlens, initial_state),
        "o": _native.pointer(o),
        "final_state": _native.pointer(final_state),
    }
    _native.kernel(op, kernel_name, q.device)(fields)
    return (o, final_state, []) if save else (o, final_state)


def forward_cuda(op, q, k, v, g, beta, initial_state, cu_seqlens, scale, segment_chunks, save):
    o, final_state = outputs(op, q, k, v, g, beta, initial_state, cu_seqlens)
    if q.dtype not in _native.HALF:
        rule = "be bfloat16 or float16 on CUDA in chunks and for a gradient"
        _checks.fail(NotImplementedError, op, "q", rule, q.dtype)
    K, V = padded_dims(op, q, v)
    NT, HV = max_chunks(q, cu_seqlens), v.shape[2]
    q, k, v = (_native.aligned_rows(_padded(x, n)) for x, n in ((q, K), (k, K), (v, V)))
    initial_state, cu_seqlens = _contiguous(_padded(initial_state, K, V)), _bounds(cu_seqlens)
    saved = to_save(op, q, v, beta, cu_seqlens, segment_chunks, save)
    num_segments = max_segments(q, cu_seqlens, segment_chunks)
    segment_states = q.new_empty(num_segments, HV, K, V, dtype=torch.float32) if segment_chunks else None
    P = q.new_empty(NT, HV, CHUNK, CHUNK)
    wide_o, wide_state = _with_room(o, V), _with_room(final_state, K, V)
    fields = {
        **_operands(q, k, v, g, beta, scale),
        **_sequences(final_state, cu_seqlens, initial_state),
        "o": _native.pointer(wide_o),
        "final_state": _native.pointer(wide_state),
        "num_chunks": NT,
        "G": _native.pointer(saved.G),
        "L": _native.pointer(saved.L),
        "h": _native.pointer(saved.h),
        "chunk_offsets": _native.pointer(saved.chunk_offsets),
        "segment_chunks": segment_chunks,
        "num_segments": num_segments,
        "segment_offsets": _native.pointer(saved.segment_offsets),
        "transfers": _native.pointer(saved.transfers),
        "segment_states": _native.pointer(segment_states),
        "P": _native.pointer(P),
    }
    _native.kernel(op, "gated_delta_chunk_fwd", q.device)(fields)
    results = _narrowed(wide_o, o), _narrowed(wide_state, final_state)
    return (*results, list(saved)) if save else results


def recurrent_cuda(op, q, k, v, g, beta, initial_state, cu_seqlens, scale, segment_chunks, save):
    """Few tokens go one by one, and float32 always; else this is the chunk form."""
    few = q.shape[1] <= STEP_TOKENS or q.dtype == torch.float32
    if save or cu_seqlens is not None or not few:
        return forward_cuda(op, q, k, v, g, beta, initial_state, cu_seqlens, scale, segment_chunks, save)
    _, final_state = outputs(op, q, k, v, g, beta, initial_state, cu_seqlens)
    final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
    return step(op, q, k, v, g, beta, final_state, None, None, None, scale), final_state


def backward_fake(op, do, dfinal_state, q, k, v, g, beta, initial_state, cu_seqlens):
    o, state = outputs(op, q, k, v, g, beta, initial_state, cu_seqlens)
    _checks.like(op, "do", do, "o", o)
    _check_state(op, "dfinal_state", dfinal_state, q, state.shape)
    gate_gradients = (_native.empty_like(x) for x in (g, beta) if x is not None)
    return *(_native.empty_like(x) for x in (q, k, v)), *gate_gradients, state


def backward_cpu(op, do, dfinal_state, q, k, v, g, beta, initial_state, cu_seqlens, scale):
    gradients = backward_fake(op, do, dfinal_state, q, k, v, g, beta, initial_state, cu_seqlens)
    dq, dk, dv, dg, *dbeta, dinitial_state = gradients
    do, q, k, v = map(_native.dense_last, (do, q, k, v))
    initial_state, dfinal_state = _contiguous(initial_state), _contiguous(dfinal_state)
    cu_seqlens = _bounds(cu_seqlens)
    fields = {
        **_operands(q, k, v, g, beta, scale),
        **_sequences(dinitial_state, cu_seqlens, initial_state),
        "do_": _native.view(do),
        "dfinal_state": _native.pointer(dfinal_state),
        "dq": _native.pointer(dq),
        "dk": _native.pointer(dk),
        "dv": _native.pointer(dv),
        "dg": _native.pointer(dg),
        "dbeta": _native.pointer(dbeta[0] if dbeta else None),
        "dinitial_state": _native.pointer(dinitial_state),
    }
    _native.kernel(op, "gated_delta_chunk_bwd", q.device)(fields)
    return gradients


def backward_cuda(op, do, dfinal_state, q, k, v, g, beta, initial_state, cu_seqlens, saved, scale, segment_chunks):
    gradients = backward_fake(op, do, dfinal_state, q, k, v, g, beta, initial_state, cu_seqlens)
    dq, dk, dv, dg, *dbeta, dinitial_state = gradients
    K, V = padded_dims(op, q, v)
    G, L, h, chunk_offsets, transfers, segment_offsets = saved
    _checks.shape(op, "h", h, [max_chunks(q, cu_seqlens), v.shape[2], K, V])
    do, q, k, v = (_native.aligned_rows(_padded(x, n)) for x, n in ((do, V), (q, K), (k, K), (v, V)))
    dfinal_state, cu_seqlens = _contiguous(_padded(dfinal_state, K, V)), _bounds(cu_seqlens)
    narrow = dq, dk, dv, dinitial_state
    wide = [_with_room(x, *size) for x, size in zip(narrow, ((K,), (K,), (V,), (K, V)), strict=True)]
    dstates = torch.empty_like(h)
    dB_low = None if beta is None else torch.empty_like(wide[2])
    num_segments = max_segments(q, cu_seqlens, segment_chunks)
    segment_states = q.new_empty(num_segments, *h.shape[1:], dtype=torch.float32) if segment_chunks else None
    fields = {
        **_operands(q, k, v, g, beta, scale),
        **_sequences(dinitial_state, cu_seqlens, None),
        "do_": _native.view(do),
        "dfinal_state": _native.pointer(dfinal_state),
        "num_chunks": h.shape[0],
        "chunk_offsets": _native.pointer(chunk_offsets),
        "G": _native.pointer(G),
        "L": _native.pointer(L),
        "h": _native.pointer(h),
        "segment_chunks": segment_chunks,
        "num_segments": num_segments,
        "segment_offsets": _native.pointer(segment_offsets),
        "transfers": _native.pointer(transfers),
        "segment_states": _native.pointer(segment_states),
        "dstates": _native.pointer(dstates),
        "dB_low": _native.pointer(dB_low),
        "dq": _native.pointer(wide[0]),
        "dk": _native.pointer(wide[1]),
        "dv": _native.pointer(wide[2]),
        "dg": _native.pointer(dg),
        "dbeta": _native.pointer(dbeta[0] if dbeta else None),
        "dinitial_state": _native.pointer(wide[3]),
    }
    _native.kernel(op, "gated_delta_chunk_bwd", q.device)(fields)
    dq, dk, dv, dinitial_state = (_narrowed(x, like) for x, like in zip(wide, narrow, strict=True))
    return dq, dk, dv, dg, *dbeta, dinitial_state


def setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.segment_chunks = inputs
    _, _, saved = output
    ctx.num_inputs = len(tensors)
    ctx.save_for_backward(*tensors, *saved)
    ctx.set_materialize_grads(False)


def backward(ctx, backward_op, do, dfinal_state):
    """The gradient of every input of a forward op, None for what is no tensor and for cu_seqlens."""
    tensors = ctx.saved_tensors  # read once: activation checkpointing allows no second time
    (*inputs, initial_state, cu_seqlens), saved = tensors[: ctx.num_inputs], tensors[ctx.num_inputs :]
    q, _, v, *_ = inputs
    if do is None:
        if dfinal_state is None:
            return (None,) * (len(inputs) + 4)
        do = q.new_zeros(v.shape)
    arguments = *inputs, initial_state, cu_seqlens, list(saved), ctx.scale, ctx.segment_chunks
    *gradients, dinitial_state = backward_op(do, dfinal_state, *arguments)
    return *gradients, None if initial_state is None else dinitial_state, None, None, None


def step_gates(op, q, g, beta, use_gate, A_log, dt_bias):
    """(g, beta, A_log, dt_bias) as the step takes them: g and beta in q's dtype, or all in the accumulation type."""
    if use_gate:
        _checks.tensor(op, "A_log", A_log)
    elif A_log is not None or dt_bias is not None:
        name, x = ("dt_bias", dt_bias) if A_log is None else ("A_log", A_log)
        _checks.fail(ValueError, op, name, "be left out without use_gate_in_kernel", list(x.shape))
    if g.dtype != q.dtype or (beta is not None and beta.dtype != q.dtype):
        g, beta = accumulated(op, "g", g, q), accumulated(op, "beta", beta, q)
    return g, beta, accumulated(op, "A_log", A_log, q), accumulated(op, "dt_bias", dt_bias, q)


def step_fake(op, q, k, v, g, beta, state, state_indices, A_log, dt_bias):
    check_inputs(op, q, k, v, g, beta, q.dtype if g.dtype == q.dtype else None)
    (B, T, _, K), (_, _, HV, V) = q.shape, v.shape
    _checks.rank(op, "state", state, "slots HV K V")
    slots = B if state_indices is None else state.shape[0]
    _check_state(op, "state", state, q, (slots, HV, K, V))
    if not state.is_contiguous():
        _checks.fail(ValueError, op, "state", "be contiguous", f"strides {list(state.stride())}")
    if state_indices is not None:
        _checks.shape(op, "state_indices", state_indices, [B])
        _checks.dtype(op, "state_indices", state_indices, (torch.int32, torch.int64))
    _check_state(op, "A_log", A_log, q, (HV,))
    _check_state(op, "dt_bias", dt_bias, q, (HV,))
    return q.new_empty(B, T, HV, V)


def step(op, q, k, v, g, beta, state, state_indices, A_log, dt_bias, scale, use_qk_l2norm=False, beta_limit=0.0):
    """CPU and CUDA alike. What the values of state_indices break raises on the CPU and gives o = NaN on CUDA."""
    o = step_fake(op, q, k, v, g, beta, state, state_indices, A_log, dt_bias)
    if _native.on_cuda(q):
        if q.shape[3] > _native.cuda().STEP_MAX_KEY_DIM:
            rule = f"have a head dimension of at most {_native.cuda().STEP_MAX_KEY_DIM} on CUDA"
            _checks.fail(NotImplementedError, op, "q", rule, q.shape[3])
    elif state_indices is not None:
        _check_slots(op, state_indices.tolist(), state.shape[0])
    q, k, v = map(_native.dense_last, (q, k, v))
    state_indices, A_log, dt_bias = map(_contiguous, (state_indices, A_log, dt_bias))
    fields = {
        **_operands(q, k, v, g, beta, scale),
        "use_qk_l2norm": use_qk_l2norm,
        "gates_in_dtype": g.dtype == q.dtype,
        "beta_limit": beta_limit,
        "A_log": _native.pointer(A_log),
        "dt_bias": _native.pointer(dt_bias),
        "num_slots": state.shape[0],
        "state_indices": _native.indices(state_indices),
        "state": _native.pointer(state),
        "o": _native.pointer(o),
    }
    _native.kernel(op, "gated_delta_step", q.device)(fields)
    return o


def _check_state(op, name, state, q, expected):
    if state is not None:
        _checks.shape(op, name, state, expected)
        _checks.dtype(op, name, state, (_native.accumulator(q.dtype),))


def _check_slots(op, slots, num_slots):
    used = [slot for slot in slots if slot >= 0]
    if used and max(used) >= num_slots:
        _checks.fail(ValueError, op, "state_indices", f"be below the number of slots, {num_slots}", slots)
    if len(set(used)) < len(used):
        _checks.fail(ValueError, op, "state_indices", "name no slot twice", slots)


def _contiguous(x):
    return None if x is None else x.contiguous()


def _padded(x, *size):
    """x with its last dimensions enlarged to `size` by zeros; None for None."""
    if x is None or x.shape[-len(size) :] == size:
        return x
    missing = [n - have for n, have in zip(size, x.shape[-len(size) :], strict=True)]
    return torch.nn.functional.pad(x, [side for n in reversed(missing) for side in (0, n)])


def _with_room(x, *size):
    """x itself, or a new tensor like it where its last dimensions are not `size`."""
    return x if x.shape[-len(size) :] == size else x.new_empty(*x.shape[: -len(size)], *size)


def _narrowed(x, like):
    """What of x, made by _with_room, belongs to `like`."""
    return x if x is like else x[tuple(slice(n) for n in like.shape)].contiguous()


def _offsets(q, cu_seqlens):
    """Room for a number before every sequence; empty without cu_seqlens."""
    size = 0 if cu_seqlens is None else cu_seqlens.shape[0]
    return q.new_empty(size, dtype=torch.int64)


def _transfers(q, v, beta, cu_seqlens, segment_chunks, K):
    if segment_chunks == 0:
        return q.new_empty(0, dtype=torch.float32)
    size = () if beta is None else (K, K)
    return q.new_empty(max_segments(q, cu_seqlens, segment_chunks), v.shape[2], *size, dtype=torch.float32)


def _bounds(x):
    return None if x is None else x.to(torch.int64).contiguous()


def _operands(q, k, v, g, beta, scale):
    """The fields that all params structs of the family share."""
    (B, T, H, K), (_, _, HV, V) = q.shape, v.shape
    return {
        "dtype": _native.DTYPES[q.dtype],
        "delta": beta is not None,
        "num_threads": torch.get_num_threads(),
        "B": B,
        "T": T,
        "H": H,
        "HV": HV,
        "K": K,
        "V": V,
        "scale": scale,
        "q": _native.view(q),
        "k": _native.view(k),
        "v": _native.view(v),
        "g": _native.view(g),
        "beta": _native.view(beta),
    }


def _sequences(states, cu_seqlens, initial_state):
    """The fields that the params of ops over whole sequences share besides; states: one for each sequence."""
    return {
        "N": states.shape[0],
        "cu_seqlens": _native.pointer(cu_seqlens),
        "initial_state": _native.pointer(initial_state),
    }


def register(library, schema, fake, cpu, cuda=None):
    """cuda: None where there is no CUDA kernel."""
    library.define(schema)
    name = schema.split("(")[0]
    library.impl(name, cpu, "CPU")
    if cuda is not None:
        library.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"hypenet::{name}", fake, lib=library)


def register_forward(library, name, inputs, fake, cpu, cuda, backward):
    """Registers the three ops of a forward; returns the one for inference and the differentiable one.

    fake, cpu, cuda: take `save` last.
    """
    for suffix, saved, save in (
        ("_inference", "", False),
        ("_saving", ", Tensor[] saved", True),
        ("", ", Tensor[] saved", True),
    ):
        schema = f"{name}{suffix}({inputs}, float scale, int segment_chunks) -> (Tensor o, Tensor final_state{saved})"
        register(library, schema, *(functools.partial(run, save=save) for run in (fake, cpu, cuda)))
    inference, saving, operator = (
        getattr(torch.ops.hypenet, name + suffix).default for suffix in ("_inference", "_saving", "")
    )
    _differentiable.register(library, name, saving, setup_context, backward)
    return inference, operator


def register_backward(library, forward, inputs, gradients, fake, cpu, cuda):
    """Registers the backward of the op `forward`; returns what its gradient calls."""
    name = f"{forward}_bwd"
    arguments = f"Tensor do, Tensor? dfinal_state, {inputs}, Tensor[] saved, float scale, int segment_chunks"
    register(library, f"{name}({arguments}) -> ({gradients})", fake, cpu, cuda)
    operator = getattr(torch.ops.hypenet, name).default
    return _differentiable.once(operator, RuntimeError, f"{name}: there is no second derivative")
