"""HyPE attention: causal grouped-query softmax attention without position encoding, and its decode form.

x_ti = s_t scale q_t . k_i,  i <= t        logits; query head h reads key head h // (H / HK)
s_t  = ln(t + a) / ln(a)                   position scale, t counted from 0 at the first key; a = logit_scale_base
o_t  = sum_i softmax_i(x_ti) v_i           times sigmoid(gate_t) where there is a gate
"""

from functools import partial

import torch

from hypenet_kernels import _checks, _differentiable, _native


def hype_attention(q, k, v, *, logit_scale_base=None, gate=None, scale=None, query_offset=0, cu_seqlens=None):
    """Causal attention of T queries at positions query_offset ... query_offset + T - 1 over all keys up to each.

    q: [B, T, H, D]; k, v: [B, S, HK, D] with S = query_offset + T and H a multiple of HK; gate: [B, T, H, D], before
    the sigmoid. Any strides. All of one dtype, float64, float32 or bfloat16; on CUDA bfloat16 or float16, with D up to
    256. Sums are taken in float64 or float32, where q is also scaled. logit_scale_base: a > 1, in tokens, or None for
    s_t = 1. scale: default D ** -0.5. cu_seqlens: [N + 1] int32 or int64, the bounds of sequences packed along T
    (B = 1, query_offset = 0); positions restart and attention ends at each. Returns o: [B, T, H, D]. Differentiable
    once in q, k, v and gate.

    Raises TypeError (dtype), ValueError (shape, device, range), NotImplementedError (device, dtype or D not built).
    Source: HALO (arXiv 2601.22156), HyPE and the softmax layer of HypeNet; online softmax as in FlashAttention-2.
    """
    op = "hype_attention"
    _checks.tensors(op, {"q": q, "k": k, "v": v}, {"gate": gate, "cu_seqlens": cu_seqlens})
    arguments = (q, k, v, gate, cu_seqlens, logit_scale_base, scale, query_offset)
    return _forward(*arguments)[0] if _checks.wants_gradient(q, k, v, gate) else _inference(*arguments)


def hype_attention_decode(
    q, k_cache, v_cache, cache_seqlens, *, k=None, v=None, logit_scale_base=None, gate=None, scale=None
):
    """The last T tokens of each sequence against its preallocated cache of keys and values.

    q, gate: [B, T, H, D], T small; k_cache, v_cache: [B, capacity, HK, D], any strides but a contiguous last
    dimension; cache_seqlens: [B] int32 or int64. With k, v: [B, T, HK, D], sequence b's cache holds cache_seqlens[b]
    keys before the call, k and v are written behind them, and the queries stand at those positions. Without, it holds
    cache_seqlens[b] >= T keys, and the queries are the last T of them. Cache rows beyond are neither read nor written.
    cache_seqlens itself is not changed. dtypes, logit_scale_base, scale and errors as in `hype_attention`; a length
    that does not fit is a ValueError. On CUDA (bfloat16 or float16, D up to 256) lengths are read on the device alone,
    so that a graph can be captured: one that does not fit gives its sequence o = NaN and leaves its cache as it is.
    Returns o: [B, T, H, D]. No gradient.
    """
    op = "hype_attention_decode"
    required = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "cache_seqlens": cache_seqlens}
    optional = {"k": k, "v": v, "gate": gate}
    _checks.tensors(op, required, optional)
    _checks.no_grad(op, required, optional)
    return _decode(q, k_cache, v_cache, cache_seqlens, k, v, gate, logit_scale_base, scale)


def _check_forward(q, k, v, gate, cu_seqlens, logit_scale_base, query_offset):
    op = "hype_attention"
    B, T, _, D, HK = _check_heads(op, q, "k", k, gate, logit_scale_base)
    if query_offset < 0:
        _checks.fail(ValueError, op, "query_offset", "be at least 0", query_offset)
    if cu_seqlens is not None:
        _checks.cu_seqlens(op, cu_seqlens, B, T)
        if query_offset != 0:
            _checks.fail(ValueError, op, "query_offset", "be 0 with cu_seqlens", query_offset)
    _checks.shape(op, "k", k, (B, query_offset + T, HK, D))
    _checks.like(op, "v", v, "k", k)


def _check_decode(q, k_cache, v_cache, cache_seqlens, k, v, gate, logit_scale_base):
    op = "hype_attention_decode"
    B, T, _, D, HK = _check_heads(op, q, "k_cache", k_cache, gate, logit_scale_base)
    _checks.shape(op, "k_cache", k_cache, (B, k_cache.shape[1], HK, D))
    _checks.like(op, "v_cache", v_cache, "k_cache", k_cache)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if D > 1 and cache.stride(-1) != 1:
            _checks.fail(ValueError, op, name, "have a contiguous last dimension", f"strides {cache.stride()}")
        if k is not None and any(n > 1 and stride == 0 for n, stride in zip(cache.shape, cache.stride(), strict=True)):
            _checks.fail(ValueError, op, name, "not be expanded (it is written to)", f"strides {cache.stride()}")
    if (k is None) != (v is None):
        given, missing = ("v", "k") if k is None else ("k", "v")
        _checks.fail(ValueError, op, missing, f"be given with {given}", None)
    for name, x in (("k", k), ("v", v)):
        if x is not None:
            _checks.shape(op, name, x, [B, T, HK, D])
            _checks.same_dtype(op, name, x, q)
    _checks.shape(op, "cache_seqlens", cache_seqlens, [B])
    _checks.dtype(op, "cache_seqlens", cache_seqlens, (torch.int32, torch.int64))


def _check_heads(op, q, key_name, k, gate, logit_scale_base):
    """What both ops ask of queries, keys and gate. Returns B, T, H, D, HK."""
    _checks.rank(op, "q", q, "B T H D")
    _checks.rank(op, key_name, k, "B S HK D")
    _checks.element(op, "q", q)
    _checks.same_dtype(op, key_name, k, q)
    (B, T, H, D), HK = q.shape, k.shape[2]
    if D == 0:
        _checks.fail(ValueError, op, "q", "have a head dimension of at least 1", list(q.shape))
    _checks.multiple(op, "q's number of heads", H, f"{key_name}'s", HK)
    if gate is not None:
        _checks.like(op, "gate", gate, "q", q)
    if logit_scale_base is not None and not 1 < logit_scale_base < float("inf"):
        _checks.fail(ValueError, op, "logit_scale_base", "be greater than 1 and finite", logit_scale_base)
    return B, T, H, D, HK


def _check_lengths(cache_seqlens, T, capacity, appends):
    """The one check that reads values: made on the CPU, where that costs nothing."""
    op = "hype_attention_decode"
    lowest, highest = (0, capacity - T) if appends else (T, capacity)
    lengths = cache_seqlens.tolist()
    if lengths and min(lengths) < lowest:
        _checks.fail(ValueError, op, "cache_seqlens", f"be at least {lowest}", lengths)
    if lengths and max(lengths) > highest:
        rule = f"leave room for T = {T} more keys in a" if appends else "not exceed the"
        _checks.fail(ValueError, op, "cache_seqlens", f"{rule} capacity of {capacity}", lengths)


def _forward_fake(q, k, v, gate, cu_seqlens, logit_scale_base, scale, query_offset, save):
    """save: whether the backward's o_ungated (empty without gate) and lse are wanted besides o."""
    _check_forward(q, k, v, gate, cu_seqlens, logit_scale_base, query_offset)
    o = _native.empty_like(q)
    return (o, q.new_empty(0) if gate is None else torch.empty_like(o), _new_lse(q)) if save else o


def _new_lse(q):
    B, T, H, _ = q.shape
    return q.new_empty(B, H, T, dtype=_native.accumulator(q.dtype))


def _forward_native(q, k, v, gate, cu_seqlens, logit_scale_base, scale, query_offset, save):
    outputs = _forward_fake(q, k, v, gate, cu_seqlens, logit_scale_base, scale, query_offset, save)
    o, o_ungated, lse = outputs if save else (outputs, None, _new_lse(q) if _native.on_cuda(q) else None)
    D, width = q.shape[3], _built_width("hype_attention", q)
    if o.numel() == 0:
        return outputs
    if width != D:
        wide = (_widen(x, width) for x in (q, k, v, gate))
        scale = D**-0.5 if scale is None else scale
        wide = _forward_native(*wide, cu_seqlens, logit_scale_base, scale, query_offset, save)
        if not save:
            return wide[..., :D].contiguous()
        o, o_ungated, lse = wide
        return o[..., :D].contiguous(), o_ungated[..., :D].contiguous(), lse
    q, k, v, gate = map(_readable, (q, k, v, gate))
    bounds = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    fields = {
        **_sizes(q, k, logit_scale_base, scale),
        **_sequences(q, k, query_offset, bounds),
        "q": _native.view(q),
        "k": _native.view(k),
        "v": _native.view(v),
        "gate": _native.view(gate),
        "o": _native.pointer(o),
        "o_ungated": _native.pointer(None if gate is None else o_ungated),
        "lse": _native.pointer(lse),
    }
    _native.kernel("hype_attention", "hype_attention_fwd", q.device)(fields)
    return outputs


def _backward_fake(do, q, k, v, gate, cu_seqlens, o_ungated, lse, logit_scale_base, scale, query_offset):
    _check_forward(q, k, v, gate, cu_seqlens, logit_scale_base, query_offset)
    op = "hype_attention_bwd"
    _checks.like(op, "do", do, "q", q)
    _checks.like(op, "o_ungated", o_ungated, "q", q)
    _checks.shape(op, "lse", lse, [q.shape[0], q.shape[2], q.shape[1]])
    _checks.dtype(op, "lse", lse, (_native.accumulator(q.dtype),))
    dq, dk, dv = (_native.empty_like(x) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(0) if gate is None else _native.empty_like(q)


def _backward_native(do, q, k, v, gate, cu_seqlens, o_ungated, lse, logit_scale_base, scale, query_offset):
    options = (logit_scale_base, scale, query_offset)
    gradients = _backward_fake(do, q, k, v, gate, cu_seqlens, o_ungated, lse, *options)
    D, width = q.shape[3], _built_width("hype_attention", q)
    if q.numel() == 0:
        return tuple(x.zero_() for x in gradients)
    if width != D:
        do, q, k, v, gate, o_ungated = (_widen(x, width) for x in (do, q, k, v, gate, o_ungated))
        options = (logit_scale_base, D**-0.5 if scale is None else scale, query_offset)
        wide = _backward_native(do, q, k, v, gate, cu_seqlens, o_ungated, lse, *options)
        return tuple(x[..., :D].contiguous() for x in wide)
    _run_backward(gradients, do, q, k, v, gate, cu_seqlens, o_ungated, lse, *options)
    return gradients


def _run_backward(gradients, do, q, k, v, gate, cu_seqlens, o_ungated, lse, logit_scale_base, scale, query_offset):
    dq, dk, dv, dgate = gradients
    do, q, k, v, gate = map(_readable, (do, q, k, v, gate))
    o_ungated, lse = o_ungated.contiguous(), lse.contiguous()
    bounds = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    on_cuda = _native.on_cuda(q)
    do_ungated = torch.empty_like(dgate) if on_cuda and gate is not None else None
    row_terms = lse.new_empty(3, *lse.shape) if on_cuda else None
    fields = {
        **_sizes(q, k, logit_scale_base, scale),
        **_sequences(q, k, query_offset, bounds),
        "gate": _native.view(gate),
        "q": _native.view(q),
        "k": _native.view(k),
        "v": _native.view(v),
        "o_ungated": _native.pointer(o_ungated),
        "lse": _native.pointer(lse),
        "do_": _native.view(do),
        "dq": _native.pointer(dq),
        "dk": _native.pointer(dk),
        "dv": _native.pointer(dv),
        "dgate": 0 if gate is None else _native.pointer(dgate),
        "do_ungated": _native.pointer(do_ungated),
        "row_terms": _native.pointer(row_terms),
    }
    _native.kernel("hype_attention_bwd", "hype_attention_bwd", q.device)(fields)


def _built_width(op, q):
    """The head dimension with which the kernel runs: q's own on the CPU, on CUDA the next one that is built."""
    D = q.shape[3]
    if not _native.on_cuda(q):
        return D
    built = _native.cuda().ATTENTION_HEAD_DIMS
    if built[-1] < D:
        _checks.fail(NotImplementedError, op, "q", f"have a head dimension of at most {built[-1]} on CUDA", D)
    return next(width for width in built if width >= D)


def _widen(x, width):
    """x with zeros behind its last dimension: they change no product and no output but their own."""
    return x if x is None else torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def _readable(x):
    """x itself where the kernels can read it, else a copy."""
    if x is None:
        return None
    return _native.aligned_rows(x) if _native.on_cuda(x) else _native.dense_last(x)


def _decode_fake(q, k_cache, v_cache, cache_seqlens, k, v, gate, logit_scale_base, scale):
    _check_decode(q, k_cache, v_cache, cache_seqlens, k, v, gate, logit_scale_base)
    return _native.empty_like(q)


def _decode_cpu(q, k_cache, v_cache, cache_seqlens, k, v, gate, logit_scale_base, scale):
    o = _decode_fake(q, k_cache, v_cache, cache_seqlens, k, v, gate, logit_scale_base, scale)
    _check_lengths(cache_seqlens, q.shape[1], k_cache.shape[1], appends=k is not None)
    _run_decode(o, q, k_cache, v_cache, cache_seqlens, k, v, gate, logit_scale_base, scale)
    return o


def _decode_cuda(q, k_cache, v_cache, cache_seqlens, k, v, gate, logit_scale_base, scale):
    """What the values of cache_seqlens break raises on the CPU; here it gives a sequence o = NaN."""
    op, cuda = "hype_attention_decode", _native.cuda()
    o = _decode_fake(q, k_cache, v_cache, cache_seqlens, k, v, gate, logit_scale_base, scale)
    (B, T, H, D), capacity = q.shape, k_cache.shape[1]
    if cuda.DECODE_MAX_DIM < D:
        rule = f"have a head dimension of at most {cuda.DECODE_MAX_DIM} on CUDA"
        _checks.fail(NotImplementedError, op, "q", rule, D)
    segments = min(cuda.DECODE_MAX_SEGMENTS, -(-capacity // cuda.DECODE_SEGMENT))
    partial_o = q.new_empty(B, segments, T, H, -(-D // 4) * 4, dtype=torch.float32)
    partial_softmax = q.new_empty(B, segments, T, H, 2, dtype=torch.float32)
    inputs = (o, q, k_cache, v_cache, cache_seqlens, k, v, gate, logit_scale_base, scale)
    _run_decode(*inputs, partial_o, partial_softmax)
    return o


def _run_decode(
    o, q, k_cache, v_cache, lengths, k, v, gate, logit_scale_base, scale, partial_o=None, partial_softmax=None
):
    if o.numel() == 0:
        return
    q, k, v, gate = map(_native.dense_last, (q, k, v, gate))
    lengths = lengths.contiguous()
    fields = {
        **_sizes(q, k_cache, logit_scale_base, scale),
        "capacity": k_cache.shape[1],
        "num_segments": 0 if partial_o is None else partial_o.shape[1],
        "q": _native.view(q),
        "k": _native.view(k),
        "v": _native.view(v),
        "gate": _native.view(gate),
        "cache_seqlens": _native.indices(lengths),
        "k_cache": _native.view(k_cache),
        "v_cache": _native.view(v_cache),
        "o": _native.pointer(o),
        "partial_o": _native.pointer(partial_o),
        "partial_softmax": _native.pointer(partial_softmax),
    }
    _native.kernel("hype_attention_decode", "hype_attention_decode", q.device)(fields)


def _sizes(q, k, logit_scale_base, scale):
    """The fields that all three params structs share; k is [B, S, HK, D] or a cache."""
    B, T, H, D = q.shape
    return {
        "dtype": _native.DTYPES[q.dtype],
        "num_threads": torch.get_num_threads(),
        "B": B,
        "T": T,
        "H": H,
        "HK": k.shape[2],
        "D": D,
        "scale": D**-0.5 if scale is None else scale,
        "logit_scale_base": 0.0 if logit_scale_base is None else logit_scale_base,
    }


def _sequences(q, k, query_offset, bounds):
    return {
        "S": k.shape[1],
        "N": q.shape[0] if bounds is None else bounds.numel() - 1,
        "query_offset": query_offset,
        "cu_seqlens": _native.pointer(bounds),
    }


def _setup_context(ctx, inputs, output):
    q, k, v, gate, cu_seqlens, *ctx.options = inputs
    o, o_ungated, lse = output
    ctx.save_for_backward(q, k, v, gate, cu_seqlens, o if gate is None else o_ungated, lse)
    ctx.mark_non_differentiable(o_ungated, lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, do, *_):
    if do is None:
        return (None,) * 8
    q, k, v, gate, cu_seqlens, o_ungated, lse = ctx.saved_tensors
    dq, dk, dv, dgate = _backward_op(do, q, k, v, gate, cu_seqlens, o_ungated, lse, *ctx.options)
    return dq, dk, dv, None if gate is None else dgate, None, None, None, None


_library = torch.library.Library("hypenet", "FRAGMENT")
_OPTIONS = "float? logit_scale_base, float? scale"
_INPUTS = f"Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? cu_seqlens, {_OPTIONS}, SymInt query_offset"
_library.define(f"hype_attention_inference({_INPUTS}) -> Tensor")
for _name in ("hype_attention_saving", "hype_attention"):
    _library.define(f"{_name}({_INPUTS}) -> (Tensor o, Tensor o_ungated, Tensor lse)")
_library.define(
    "hype_attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? cu_seqlens, Tensor o_ungated, "
    f"Tensor lse, {_OPTIONS}, SymInt query_offset) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dgate)"
)
_library.define(
    "hype_attention_decode(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor? k, "
    f"Tensor? v, Tensor? gate, {_OPTIONS}) -> Tensor"
)
_inference_runs = [partial(run, save=False) for run in (_forward_fake, _forward_native, _forward_native)]
_forward_runs = [partial(run, save=True) for run in (_forward_fake, _forward_native, _forward_native)]
for _name, _fake, _cpu, _cuda in (
    ("hype_attention_inference", *_inference_runs),
    ("hype_attention_saving", *_forward_runs),
    ("hype_attention", *_forward_runs),
    ("hype_attention_bwd", _backward_fake, _backward_native, _backward_native),
    ("hype_attention_decode", _decode_fake, _decode_cpu, _decode_cuda),
):
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"hypenet::{_name}", _fake, lib=_library)
_saving = torch.ops.hypenet.hype_attention_saving.default
_differentiable.register(_library, "hype_attention", _saving, _setup_context, _backward)
_backward_op = _differentiable.once(
    torch.ops.hypenet.hype_attention_bwd.default,
    NotImplementedError,
    "hype_attention: q, k, v and gate must not want a second derivative: it is not built",
)
_inference = torch.ops.hypenet.hype_attention_inference.default
_forward = torch.ops.hypenet.hype_attention.default
_decode = torch.ops.hypenet.hype_attention_decode.default
