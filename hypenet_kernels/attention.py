"""HyPE attention: causal grouped-query softmax attention without position encoding, and its decode form.

x_ti = s_t scale q_t . k_i,  i <= t        logits; query head h reads key head h // (H / HK)
s_t  = ln(t + a) / ln(a)                   position scale, t counted from 0 at the first key; a = logit_scale_base
o_t  = sum_i softmax_i(x_ti) v_i           times sigmoid(gate_t) where there is a gate

Source: HALO (arXiv 2601.22156), HyPE and the softmax layer of HypeNet; online softmax as in FlashAttention-2.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypenet_kernels import _checks, _native, _ops

OP, DECODE_OP = "hype_attention", "hype_attention_decode"


class Inputs(NamedTuple):
    """The arguments of the forward op."""

    q: Tensor  # [B, T, H, D]
    k: Tensor  # [B, S, HK, D], S = query_offset + T
    v: Tensor  # [B, S, HK, D]
    gate: Tensor | None  # [B, T, H, D], before the sigmoid
    cu_seqlens: Tensor | None  # [N + 1]
    logit_scale_base: float | None  # None: s_t = 1
    scale: float
    query_offset: int


class CachedInputs(NamedTuple):
    """The arguments of the forward op on packed sequences that continue a cache."""

    q: Tensor  # [1, T, H, D]
    k: Tensor  # [N, capacity, HK, D]
    v: Tensor  # [N, capacity, HK, D]
    gate: Tensor | None  # [1, T, H, D], before the sigmoid
    cu_seqlens: Tensor | None  # [N + 1]
    query_offset: Tensor  # [N]
    logit_scale_base: float | None
    scale: float


class DecodeInputs(NamedTuple):
    """The arguments of the decode op."""

    q: Tensor  # [B, T, H, D]
    k_cache: Tensor  # [B, capacity, HK, D]
    v_cache: Tensor  # [B, capacity, HK, D]
    cache_seqlens: Tensor  # [B]
    k: Tensor | None  # [B, T, HK, D]
    v: Tensor | None  # [B, T, HK, D]
    gate: Tensor | None  # [B, T, H, D]
    logit_scale_base: float | None
    scale: float


def hype_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    logit_scale_base: float | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
    query_offset: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Compute causal attention of T queries at positions query_offset, ... over all keys up to each.

    `scale` is FlashAttention's softmax_scale. Differentiable once in q, k, v and gate.

    Args:
        q: [B, T, H, D], any strides; float64, float32, bfloat16 or float16, on CUDA bfloat16 or float16 and D up to
            256. Sums are taken in float64 or float32, where q is also scaled.
        k, v: [B, S, HK, D] in q's dtype, with S = query_offset + T and H a multiple of HK.
        logit_scale_base: a > 1, in tokens, or None for s_t = 1.
        gate: [B, T, H, D] in q's dtype: o is multiplied by its sigmoid.
        scale: default D ** -0.5.
        query_offset: position of the first query. With cu_seqlens 0; or [N] int32 or int64, one for each sequence: then
            k and v are caches [N, capacity, HK, D], in which sequence n's own keys follow query_offset[n] earlier
            ones, and there is no gradient. On CUDA its values are not checked: where they do not fit, so does o not.
        cu_seqlens: [N + 1] int32 or int64, bounds of sequences packed along T (B = 1); positions restart and attention
            ends at each. Where it ends before T, o is 0.

    Returns:
        o [B, T, H, D] in q's dtype.

    Raises:
        TypeError: dtype.
        ValueError: shape, device or range.
        NotImplementedError: a device, dtype or D that is not built.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(1, 10, 8, 64), torch.randn(1, 10, 2, 64), torch.randn(1, 10, 2, 64)
        >>> hype_attention(q, k, v, logit_scale_base=512.0).shape
        torch.Size([1, 10, 8, 64])
    """
    offsets = {"query_offset": query_offset} if isinstance(query_offset, Tensor) else {}
    _checks.tensors(OP, {"q": q, "k": k, "v": v} | offsets, {"gate": gate, "cu_seqlens": cu_seqlens})
    base, scale = _logit_scale_base(OP, logit_scale_base), _checks.scale(OP, scale, q)
    if isinstance(query_offset, Tensor):
        return _continue_packed(CachedInputs(q, k, v, gate, cu_seqlens, query_offset, base, scale))
    _checks.integer(OP, "query_offset", query_offset)
    arguments = (q, k, v, gate, cu_seqlens, base, scale, query_offset)
    o: Tensor = _differentiable(*arguments)[0] if _checks.wants_gradient(q, k, v, gate) else _inference(*arguments)
    return o


def hype_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    logit_scale_base: float | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute attention of the last T tokens of each sequence over its preallocated cache of keys and values.

    No gradient. `cache_seqlens` itself is not changed.

    Args:
        q, gate: [B, T, H, D], T small; types, logit_scale_base and scale as in `hype_attention`.
        k_cache, v_cache: [B, capacity, HK, D], any strides but a contiguous last dimension. Rows beyond a sequence's
            length are neither read nor written.
        cache_seqlens: [B] int32 or int64, the number of keys in each cache before the call.
        k, v: [B, T, HK, D], written behind them first; the queries are at the same positions. Without, the queries are
            the last T of the cache_seqlens[b] >= T keys.

    Returns:
        o [B, T, H, D].

    Raises:
        As `hype_attention`; a length that does not fit is a ValueError on the CPU. On CUDA lengths are read on the
        device alone, so that a graph can be captured: one that does not fit gives its sequence o = NaN and leaves its
        cache as it is.

    Example:
        >>> import torch
        >>> cache, q, k = torch.zeros(2, 100, 2, 64), torch.randn(2, 1, 8, 64), torch.randn(2, 1, 2, 64)
        >>> hype_attention_decode(q, cache, cache.clone(), torch.tensor([0, 7]), k=k, v=k).shape
        torch.Size([2, 1, 8, 64])
    """
    required = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "cache_seqlens": cache_seqlens}
    optional = {"k": k, "v": v, "gate": gate}
    _checks.tensors(DECODE_OP, required, optional)
    _checks.no_grad(DECODE_OP, required, optional)
    base, scale = _logit_scale_base(DECODE_OP, logit_scale_base), _checks.scale(DECODE_OP, scale, q)
    o: Tensor = _decode_op(q, k_cache, v_cache, cache_seqlens, k, v, gate, base, scale)
    return o


def _logit_scale_base(op: str, value: Any) -> float | None:
    return None if value is None else _checks.number(op, "logit_scale_base", value)


def _check_heads(op: str, x: Inputs | CachedInputs | DecodeInputs, key_name: str, k: Tensor) -> None:
    """Check what both ops require of queries, keys and gate."""
    q = x.q
    _checks.rank(op, "q", q, "B T H D")
    _checks.rank(op, key_name, k, "B S HK D")
    _checks.element(op, "q", q)
    _checks.same_dtype(op, key_name, k, q)
    if q.shape[3] == 0:
        _checks.fail(ValueError, op, "q", "have a head dimension of at least 1", list(q.shape))
    _checks.multiple(op, "q's number of heads", q.shape[2], f"{key_name}'s", k.shape[2])
    if x.gate is not None:
        _checks.like(op, "gate", x.gate, "q", q)
    base = x.logit_scale_base
    if base is not None and not 1 < base < float("inf"):
        _checks.fail(ValueError, op, "logit_scale_base", "be greater than 1 and finite", base)


def _check(x: Inputs) -> None:
    _check_heads(OP, x, "k", x.k)
    B, T, _, D = x.q.shape
    if x.query_offset < 0:
        _checks.fail(ValueError, OP, "query_offset", "be at least 0", x.query_offset)
    if x.cu_seqlens is not None:
        _checks.cu_seqlens(OP, x.cu_seqlens, x.q)
        if x.query_offset != 0:
            _checks.fail(ValueError, OP, "query_offset", "be 0 with cu_seqlens", x.query_offset)
    _checks.shape(OP, "k", x.k, (B, x.query_offset + T, x.k.shape[2], D))
    _checks.like(OP, "v", x.v, "k", x.k)


def _continue_packed(x: CachedInputs) -> Tensor:
    """Check what only a call with a tensor as query_offset needs, and run it."""
    if x.cu_seqlens is None:
        _checks.fail(ValueError, OP, "query_offset", "be an integer without cu_seqlens", list(x.query_offset.shape))
    inputs = {"q": x.q, "k": x.k, "v": x.v}
    _checks.no_grad(OP, inputs, {"gate": x.gate}, "with a tensor as query_offset (it has no backward)")
    o: Tensor = _cached_op(*x)
    return o


def _check_cached(x: CachedInputs) -> None:
    assert x.cu_seqlens is not None
    _check_heads(OP, x, "k", x.k)
    _checks.cu_seqlens(OP, x.cu_seqlens, x.q)
    N, capacity = x.cu_seqlens.numel() - 1, x.k.shape[1]
    _checks.shape(OP, "k", x.k, (N, capacity, *x.k.shape[2:3], x.q.shape[3]))
    _checks.like(OP, "v", x.v, "k", x.k)
    _checks.indices(OP, "query_offset", x.query_offset, N)
    if _checks.has_values(x.query_offset):
        offsets, lengths = x.query_offset.tolist(), x.cu_seqlens.diff().tolist()
        if any(not 0 <= offset <= capacity - length for offset, length in zip(offsets, lengths, strict=True)):
            rule = f"be at least 0 and leave space for the sequences of {lengths} in a capacity of {capacity}"
            _checks.fail(ValueError, OP, "query_offset", rule, offsets)


def _check_decode(x: DecodeInputs) -> None:
    op = DECODE_OP
    _check_heads(op, x, "k_cache", x.k_cache)
    (B, T, _, D), (_, capacity, HK, _) = x.q.shape, x.k_cache.shape
    _checks.shape(op, "k_cache", x.k_cache, (B, capacity, HK, D))
    _checks.like(op, "v_cache", x.v_cache, "k_cache", x.k_cache)
    for name, cache in (("k_cache", x.k_cache), ("v_cache", x.v_cache)):
        strides = cache.stride()
        if D > 1 and strides[3] != 1:
            _checks.fail(ValueError, op, name, "have a contiguous last dimension", f"strides {strides}")
        expanded = 0 in strides and any(n > 1 and s == 0 for n, s in zip(cache.shape, strides, strict=True))
        if x.k is not None and expanded:
            _checks.fail(ValueError, op, name, "not be expanded (it is written to)", f"strides {strides}")
    if (x.k is None) != (x.v is None):
        given, missing = ("v", "k") if x.k is None else ("k", "v")
        _checks.fail(ValueError, op, missing, f"be given with {given}", None)
    for name, new in (("k", x.k), ("v", x.v)):
        if new is not None:
            _checks.shape(op, name, new, [B, T, HK, D])
            _checks.same_dtype(op, name, new, x.q)
    _checks.indices(op, "cache_seqlens", x.cache_seqlens, B)


def _check_lengths(x: DecodeInputs) -> None:
    """Check the values of cache_seqlens, which is for the CPU, where reading them costs nothing."""
    T, capacity, lengths = x.q.shape[1], x.k_cache.shape[1], x.cache_seqlens.tolist()
    lowest, highest = (T, capacity) if x.k is None else (0, capacity - T)
    if lengths and min(lengths) < lowest:
        _checks.fail(ValueError, DECODE_OP, "cache_seqlens", f"be at least {lowest}", lengths)
    if lengths and max(lengths) > highest:
        rule = "not exceed the" if x.k is None else f"leave space for T = {T} more keys in a"
        _checks.fail(ValueError, DECODE_OP, "cache_seqlens", f"{rule} capacity of {capacity}", lengths)


def _forward_fake(save: bool, *arguments: Any) -> Any:
    return _results(Inputs._make(arguments), save)


def _results(x: Inputs, save: bool) -> Any:
    """Check the arguments; return uninitialised o, with `save` (o, o_ungated or an empty tensor, lse)."""
    _check(x)
    o = _native.empty_like(x.q)
    return (o, x.q.new_empty(0) if x.gate is None else torch.empty_like(o), _new_lse(x.q)) if save else o


def _cached_fake(*arguments: Any) -> Tensor:
    x = CachedInputs._make(arguments)
    _check_cached(x)
    return _native.empty_like(x.q)


def _cached(*arguments: Any) -> Tensor:
    x, o = CachedInputs._make(arguments), _cached_fake(*arguments)
    if o.numel() > 0:
        _launch(x, (o, None, _new_lse(x.q) if _native.on_cuda(x.q) else None))
    return o


def _new_lse(q: Tensor) -> Tensor:
    B, T, H, _ = q.shape
    return q.new_empty(B, H, T, dtype=_native.accumulator(q.dtype))


def _forward(save: bool, *arguments: Any) -> Any:
    x = Inputs._make(arguments)
    results = _results(x, save)
    o, o_ungated, lse = results if save else (results, None, _new_lse(x.q) if _native.on_cuda(x.q) else None)
    if o.numel() == 0:
        return results
    _launch(x, (o, o_ungated, lse))
    return results


def _launch(x: Inputs | CachedInputs, results: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
    """Run the forward kernel, into o and, where they are given, o_ungated and lse."""
    o, o_ungated, lse = results
    width = _built_width(x.q) if _native.on_cuda(x.q) else x.q.shape[3]
    bounds = None if x.cu_seqlens is None else _native.bounds(x.cu_seqlens)
    offsets = _native.bounds(x.query_offset) if isinstance(x.query_offset, Tensor) else None
    q, k, v = _native.rows(x.q, width), _native.rows(x.k, width), _native.rows(x.v, width)
    gate = None if x.gate is None else _native.rows(x.gate, width)
    wide_o = o if width == x.q.shape[3] else _native.buffer(o, width)
    wide_ungated = None if x.gate is None or o_ungated is None else _native.buffer(o_ungated, width)
    fields = {
        **_operands(x, q, k, v, gate),
        **_sequences(x, bounds),
        "query_offsets": _native.pointer(offsets),
        "o": _native.pointer(wide_o),
        "o_ungated": _native.pointer(wide_ungated),
        "lse": _native.pointer(lse),
    }
    _native.kernel(OP, "hype_attention_fwd", x.q.device)(fields)
    if wide_o is not o:
        o.copy_(wide_o[..., : x.q.shape[3]])
        if wide_ungated is not None and o_ungated is not None:
            o_ungated.copy_(wide_ungated[..., : x.q.shape[3]])


def _backward_fake(do: Tensor, o_ungated: Tensor, lse: Tensor, *arguments: Any) -> Any:
    x, op = Inputs._make(arguments), f"{OP}_bwd"
    _check(x)
    _checks.like(op, "do", do, "q", x.q)
    _checks.like(op, "o_ungated", o_ungated, "q", x.q)
    _checks.shape(op, "lse", lse, [x.q.shape[0], x.q.shape[2], x.q.shape[1]])
    _checks.dtype(op, "lse", lse, (_native.accumulator(x.q.dtype),))
    dq, dk, dv = (_native.empty_like(y) for y in x[:3])
    return dq, dk, dv, x.q.new_empty(0) if x.gate is None else _native.empty_like(x.q)


def _backward(do: Tensor, o_ungated: Tensor, lse: Tensor, *arguments: Any) -> Any:
    x, gradients = Inputs._make(arguments), _backward_fake(do, o_ungated, lse, *arguments)
    if x.q.numel() == 0:
        return tuple(y.zero_() for y in gradients)
    width, bounds, on_cuda = _built_width(x.q), _native.bounds(x.cu_seqlens), _native.on_cuda(x.q)
    q, k, v = (_native.rows(y, width) for y in x[:3])
    gate = None if x.gate is None else _native.rows(x.gate, width)
    do, o_ungated, lse = _native.rows(do, width), _native.padded(o_ungated, width).contiguous(), lse.contiguous()
    buffers = [_native.buffer(y, width) if y.dim() > 1 else y for y in gradients]
    do_ungated = torch.empty_like(buffers[3]) if on_cuda and gate is not None else None
    row_terms = lse.new_empty(3, *lse.shape) if on_cuda else None
    fields = {
        **_operands(x, q, k, v, gate),
        **_sequences(x, bounds),
        "o_ungated": _native.pointer(o_ungated),
        "lse": _native.pointer(lse),
        "do_": _native.view(do),
        **{name: _native.pointer(y) for name, y in zip(("dq", "dk", "dv", "dgate"), buffers, strict=True)},
        "do_ungated": _native.pointer(do_ungated),
        "row_terms": _native.pointer(row_terms),
    }
    if gate is None:
        fields["dgate"] = 0
    _native.kernel(f"{OP}_bwd", "hype_attention_bwd", x.q.device)(fields)
    return tuple(_native.narrowed(wide, y) for wide, y in zip(buffers, gradients, strict=True))


def _built_width(q: Tensor) -> int:
    """Return the head dimension with which kernels run: q's own on the CPU, on CUDA the next one that is built."""
    D = q.shape[3]
    if not _native.on_cuda(q):
        return D
    built = _native.cuda().ATTENTION_HEAD_DIMS
    if built[-1] < D:
        _checks.fail(NotImplementedError, OP, "q", f"have a head dimension of at most {built[-1]} on CUDA", D)
    return min(width for width in built if width >= D)


def _decode_fake(*arguments: Any) -> Tensor:
    x = DecodeInputs._make(arguments)
    _check_decode(x)
    return _native.empty_like(x.q)


def _decode(*arguments: Any) -> Tensor:
    """What the values of cache_seqlens break raises on the CPU; on CUDA it gives a sequence o = NaN."""
    x = DecodeInputs._make(arguments)
    _check_decode(x)
    o = _native.empty_like(x.q)
    (B, T, H, D), capacity = x.q.shape, x.k_cache.shape[1]
    partial: tuple[Tensor, ...] = ()
    if not _native.on_cuda(x.q):
        _check_lengths(x)
    else:
        cuda = _native.cuda()
        if cuda.DECODE_MAX_DIM < D:
            rule = f"have a head dimension of at most {cuda.DECODE_MAX_DIM} on CUDA"
            _checks.fail(NotImplementedError, DECODE_OP, "q", rule, D)
        segments = min(cuda.DECODE_MAX_SEGMENTS, -(-capacity // cuda.DECODE_SEGMENT))
        sizes = (B, segments, T, H, -(-D // 4) * 4), (B, segments, T, H, 2)
        partial = tuple(x.q.new_empty(size, dtype=torch.float32) for size in sizes)
    if o.numel() == 0:
        return o
    q = _native.dense_last(x.q)
    k, v = (x.k, x.v) if x.k is None or x.v is None else (_native.dense_last(x.k), _native.dense_last(x.v))
    gate = None if x.gate is None else _native.dense_last(x.gate)
    lengths = x.cache_seqlens.contiguous()
    fields = {
        **_operands(x, q, k, v, gate),
        "HK": x.k_cache.shape[2],
        "capacity": capacity,
        "cache_seqlens": _native.indices(lengths),
        "k_cache": _native.view(x.k_cache),
        "v_cache": _native.view(x.v_cache),
        "o": _native.pointer(o),
    }
    if partial:
        fields["num_segments"] = partial[0].shape[1]
        fields["partial_o"], fields["partial_softmax"] = map(_native.pointer, partial)
    _native.kernel(DECODE_OP, "hype_attention_decode", x.q.device)(fields)
    return o


def _operands(
    x: Inputs | CachedInputs | DecodeInputs, q: Tensor, k: Tensor | None, v: Tensor | None, gate: Tensor | None
) -> dict[str, Any]:
    """The fields that all params structs of the family share; q, k, v, gate: as kernels read them."""
    B, T, H, D = q.shape
    return {
        "dtype": _native.DTYPES[q.dtype],
        "num_threads": _native.threads(),
        "B": B,
        "T": T,
        "H": H,
        "HK": 0 if k is None else k.shape[2],
        "D": D,
        "scale": x.scale,
        "logit_scale_base": 0.0 if x.logit_scale_base is None else x.logit_scale_base,
        "q": _native.view(q),
        "k": _native.view(k),
        "v": _native.view(v),
        "gate": _native.view(gate),
    }


def _sequences(x: Inputs | CachedInputs, bounds: Tensor | None) -> dict[str, Any]:
    return {
        "S": x.k.shape[1],
        "N": x.q.shape[0] if bounds is None else bounds.numel() - 1,
        "query_offset": 0 if isinstance(x.query_offset, Tensor) else x.query_offset,
        "cu_seqlens": _native.pointer(bounds),
    }


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, gate, cu_seqlens, *ctx.options = inputs
    o, o_ungated, lse = output
    ctx.save_for_backward(o if gate is None else o_ungated, lse, q, k, v, gate, cu_seqlens)
    ctx.mark_non_differentiable(o_ungated, lse)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Tensor | None, *_: Any) -> Any:
    if do is None:
        return (None,) * 8
    tensors = ctx.saved_tensors
    dq, dk, dv, dgate = _backward_op(do, *tensors, *ctx.options)
    return dq, dk, dv, None if tensors[5] is None else dgate, None, None, None, None


_OPTIONS = "float? logit_scale_base, float scale"
_SCHEMA = f"Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? cu_seqlens, {_OPTIONS}, SymInt query_offset"
_CACHED_SCHEMA = (
    f"{OP}_cached(Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor cu_seqlens, Tensor query_offset, {_OPTIONS}) -> "
    "Tensor"
)
_DECODE_SCHEMA = (
    f"{DECODE_OP}(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor? k, Tensor? v, "
    f"Tensor? gate, {_OPTIONS}) -> Tensor"
)
_BACKWARD_SCHEMA = (
    f"{OP}_bwd(Tensor do, Tensor o_ungated, Tensor lse, {_SCHEMA}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dgate)"
)
_backward_op = _ops.differentiable_once(
    _ops.define(_BACKWARD_SCHEMA, _backward_fake, _backward),
    f"{OP}: q, k, v and gate must not want a second derivative: it is not built",
)
_inference, _differentiable = _ops.define_differentiable(
    OP, _SCHEMA, "Tensor o", "Tensor o_ungated, Tensor lse", _forward_fake, _forward, (_setup_context, _differentiate)
)
_cached_op = _ops.define(_CACHED_SCHEMA, _cached_fake, _cached)
_decode_op = _ops.define(_DECODE_SCHEMA, _decode_fake, _decode)
