"""Every op at sizes around its block sizes, on inputs surrounded by NaN, so that a read out of bounds shows.

Made for `make test-asan`, which aborts at any access out of bounds; without it, a NaN in a result fails the test.
The last tests put NaN and infinity into single tokens, and hold how far these spread to the README's numbers.
"""

import itertools

import pytest
import torch
from compare import assert_matches_reference

import hypenet_kernels as kernels
from hypenet_kernels import reference

LENGTHS = (0, 1, 2, 15, 16, 17, 31, 33, 65)  # around every chunk and block
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = ((1, 1), (3, 5), (16, 16), (17, 8), (40, 33), (64, 72))  # K, V: below, at and past a vector
RECURRENCES = {  # (o, gradients): how many tokens away NaN can show where it does not belong
    kernels.chunk_gated_delta_rule: (15, 31),
    kernels.fused_recurrent_gated_delta_rule: (0, 31),
    kernels.chunk_simple_gla: (15, 31),
    kernels.fused_recurrent_simple_gla: (0, 31),
}
HEADS = ((1, 1), (2, 2), (1, 3))  # H, HV (or HK, H)


def inside_nan(*shape, dtype=torch.float32, low=-1.0, high=1.0):
    """Return random numbers as a slice, one element from each border, of a tensor that is NaN elsewhere."""
    outer = torch.full([n + 2 for n in shape], float("nan"), dtype=dtype)
    inner = outer[tuple(slice(1, n + 1) for n in shape)]
    return inner.copy_(low + (high - low) * torch.rand(shape))


def recurrence_inputs(B, T, H, HV, K, V, dtype):
    q, k = (inside_nan(B, T, H, K, dtype=dtype, low=-1 / K, high=1 / K) for _ in range(2))  # |k| < 1, or states diverge
    return q, k, inside_nan(B, T, HV, V, dtype=dtype), inside_nan(B, T, HV, high=0.0), inside_nan(B, T, HV, low=0.0)


def check_finite(run, *inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = run(*leaves)
    gradients = torch.autograd.grad([x.sum() for x in outputs], leaves)
    assert all(x.isfinite().all() for x in (*outputs, *gradients))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", LENGTHS)
def test_recurrences(T, dtype):
    for (K, V), (H, HV) in zip(HEAD_DIMS, 2 * HEADS, strict=True):
        *gla, beta = recurrence_inputs(2, T, H, HV, K, V, dtype)
        state = inside_nan(2, HV, K, V)
        for rule in (kernels.chunk_gated_delta_rule, kernels.fused_recurrent_gated_delta_rule):
            check_finite(
                lambda *x, f=rule: f(*x[:4], beta=x[4], initial_state=x[5], output_final_state=True), *gla, beta, state
            )
        for rule in (kernels.chunk_simple_gla, kernels.fused_recurrent_simple_gla):
            check_finite(lambda *x, f=rule: f(*x[:4], initial_state=x[4], output_final_state=True), *gla, state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_recurrences(dtype):
    cu_seqlens = torch.tensor([0, 0, 1, 17, 17, 50, 66, 66])
    for (K, V), (H, HV) in zip(HEAD_DIMS, 2 * HEADS, strict=True):
        *gla, beta = recurrence_inputs(1, 66, H, HV, K, V, dtype)
        options = {"cu_seqlens": cu_seqlens, "output_final_state": True}
        check_finite(lambda *x, o=options: kernels.chunk_gated_delta_rule(*x, **o), *gla, beta)
        check_finite(lambda *x, o=options: kernels.chunk_simple_gla(*x, **o), *gla)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps(dtype):
    slots = torch.tensor([3, -1])
    for T in (0, 1, 3):
        for (K, V), (H, HV) in zip(HEAD_DIMS, 2 * HEADS, strict=True):
            *gla, beta = recurrence_inputs(2, T, H, HV, K, V, dtype)
            state = torch.rand(4, HV, K, V, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            for norm in (False, True):
                o = kernels.gated_delta_step(*gla, beta, state, state_indices=slots, use_qk_l2norm_in_kernel=norm)
                assert o.isfinite().all() and state.isfinite().all()
            assert kernels.simple_gla_step(*gla, state, state_indices=slots).isfinite().all() and state.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", LENGTHS)
def test_attention(T, dtype):
    for (D, offset), (HK, H) in zip(HEAD_DIMS, 2 * HEADS, strict=True):
        q, gate = (inside_nan(2, T, H, D, dtype=dtype) for _ in range(2))
        k, v = (inside_nan(2, T + offset, HK, D, dtype=dtype) for _ in range(2))

        def run(q, k, v, gate, offset=offset):
            return [kernels.hype_attention(q, k, v, gate=gate, query_offset=offset, logit_scale_base=50.0)]

        check_finite(run, q, k, v, gate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_attention(dtype):
    cu_seqlens = torch.tensor([0, 0, 1, 17, 17, 50, 66, 66])
    for (D, _), (HK, H) in zip(HEAD_DIMS, 2 * HEADS, strict=True):
        q, k, v = (inside_nan(1, 66, heads, D, dtype=dtype) for heads in (H, HK, HK))
        check_finite(lambda *x: [kernels.hype_attention(*x, cu_seqlens=cu_seqlens)], q, k, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [0, 1, 3])
def test_decode(T, dtype):
    """Cache rows beyond a sequence's length are NaN and must not affect the result."""
    for capacity, ((D, _), (HK, H)) in zip(
        (T, 17, 32, 33, 65, 130), zip(HEAD_DIMS, 2 * HEADS, strict=True), strict=True
    ):
        lengths = torch.tensor([0, capacity - T])
        q, gate = (inside_nan(2, T, H, D, dtype=dtype) for _ in range(2))
        k, v = (inside_nan(2, T, HK, D, dtype=dtype) for _ in range(2))
        k_cache, v_cache = (inside_nan(2, capacity, HK, D, dtype=dtype) for _ in range(2))
        k_cache[0], v_cache[0] = float("nan"), float("nan")
        o = kernels.hype_attention_decode(q, k_cache, v_cache, lengths, k=k, v=v, gate=gate, logit_scale_base=50.0)
        assert o.isfinite().all() and k_cache[1].isfinite().all() and k_cache[0, T:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", LENGTHS)
def test_convolution(T, dtype):
    """Sequences named by nothing, by cu_seqlens, the last one with a tail, and by seq_idx."""
    for C, W in ((1, 2), (16, 3), (67, 4)):
        x, weight, bias = inside_nan(1, T, C, dtype=dtype).mT, inside_nan(C, W), inside_nan(C, dtype=dtype)
        for bounds in (None, torch.tensor([0, T // 2, T // 2, max(T // 2, T - 3)])):
            state = inside_nan(1 if bounds is None else 3, C, W - 1, dtype=dtype)
            options = {"cu_seqlens": bounds, "return_final_states": True, "activation": "silu"}
            check_finite(
                lambda *y, o=options: kernels.causal_conv1d_fn(*y[:3], initial_states=y[3], **o), x, weight, bias, state
            )
        seq_idx = (torch.arange(T)[None] // 7 - 1).int()
        check_finite(lambda *y, i=seq_idx: [kernels.causal_conv1d_fn(*y, seq_idx=i)], x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [0, 1, 3, 65])
def test_norms(T, dtype):
    for H, D in ((1, 2), (3, 6), (2, 34), (1, 130)):
        x, g, residual = (inside_nan(2, T, H, D, dtype=dtype) for _ in range(3))
        weight, angles = inside_nan(D), inside_nan(1, T, D, dtype=dtype)
        check_finite(lambda *y, a=angles: [kernels.rms_norm_rope(*y, a, a)], x, weight)
        check_finite(lambda y, a=angles: [kernels.rms_norm_rope(y, None, a, a)], x)
        check_finite(lambda *y: [kernels.rms_norm_rope(*y)], x, weight)
        for activation in ("silu", "sigmoid"):
            check_finite(lambda *y, a=activation: [kernels.rms_norm_gated(*y, activation=a)], x, g, weight)
        check_finite(kernels.add_rms_norm, x, residual, weight)
        check_finite(lambda *y: [kernels.swiglu(*y)], x, g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [0, 1, 3])
def test_convolution_update(T, dtype):
    for C, W, L in ((1, 2, 1), (16, 3, 4), (67, 4, 3)):
        x, weight, bias = inside_nan(2, C, T, dtype=dtype), inside_nan(C, W), inside_nan(C, dtype=dtype)
        for lengths in (None, torch.tensor([0, 5])):
            state = inside_nan(4, C, L, dtype=dtype)
            y = kernels.causal_conv1d_update(x, state, weight, bias, "silu", lengths, torch.tensor([3, -1]))
            assert y.isfinite().all() and state.isfinite().all()


def depends(result, name, result_token, token):
    """Whether a token of a result of attention or of a recurrence depends on a token of an input (or of do).

    o and dq of a token are made of earlier k, v, g and beta; the other gradients are sums over the do of later tokens,
    each of them times what its own o depends on.
    """
    if result in ("o", "dq", "dgate"):
        return token == result_token if name in ("q", "do", "gate") else token <= result_token
    return name not in ("q", "do", "gate") or result_token <= token


def farthest(op, inputs, tokens):
    """(forward, backward): the greatest distance at which a value that is not finite shows where it has no business."""

    def results(inputs, do):
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        o = op(**leaves)
        gradients = torch.autograd.grad(o, list(leaves.values()), do)
        return {"o": o.detach()} | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}

    do = torch.randn_like(op(**inputs))
    clean = results(inputs, do)
    T, forward, backward = do.shape[1], 0, 0
    for name, token, value in itertools.product((*inputs, "do"), tokens, (torch.nan, torch.inf)):
        poisoned = {n: x.clone() for n, x in (inputs | {"do": do}).items()}
        poisoned[name][:, token] = value
        for result, x in results({n: poisoned[n] for n in inputs}, poisoned["do"]).items():
            changed = ~((x == clean[result]) | (x.isnan() & clean[result].isnan())).movedim(1, 0).flatten(1).all(1)
            wrong = [t for t in range(T) if changed[t] and not depends(result, name, t, token)]
            distance = max((abs(t - token) for t in wrong), default=0)
            if result == "o":
                forward = max(forward, distance)
            else:
                backward = max(backward, distance)
    return forward, backward


def attention(q, k, v, gate):
    return kernels.hype_attention(q, k, v, gate=gate)


SINGLE_TOKENS = (0, 15, 31, 32, 40, 63, 69)  # around blocks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("HK, H", [(1, 1), (1, 3), (1, 5), (2, 2)])
def test_attention_keeps_nan_and_infinity_from_what_does_not_see_them(HK, H, dtype):
    q, k, v, gate = (torch.randn(1, 70, heads, 8).to(dtype) for heads in (H, HK, HK, H))
    assert farthest(attention, {"q": q, "k": k, "v": v, "gate": gate}, SINGLE_TOKENS) == (0, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule, reach", RECURRENCES.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_recurrences_spread_nan_and_infinity_within_a_chunk(rule, reach, dtype):
    q, k, v, g, beta = (x.contiguous() for x in recurrence_inputs(1, 70, 1, 2, 64, 64, dtype))
    inputs = {"q": q, "k": k, "v": v, "g": g} | ({"beta": beta} if "delta" in rule.__name__ else {})
    assert farthest(lambda **x: rule(**x)[0], inputs, SINGLE_TOKENS) == reach


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_in_one_column_stays_in_it(dtype):
    q, k, v = (torch.randn(1, 70, heads, 8).to(dtype) for heads in (4, 2, 2))
    expected = reference.hype_attention(q.double(), k.double(), v.double())
    eager = reference.hype_attention(q, k, v) if torch.finfo(dtype).bits == 16 else None
    v[:, 40, :, 3] = torch.inf
    o = kernels.hype_attention(q, k, v)
    assert (o[:, 40:, :, 3] == torch.inf).all()
    o[:, 40:, :, 3] = expected[:, 40:, :, 3].to(dtype)
    assert_matches_reference("o", o, expected, eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_keeps_nan_and_infinity_from_what_does_not_see_them(dtype):
    q, k, v = (torch.randn(1, 4, heads, 8).to(dtype) for heads in (4, 2, 2))
    caches = torch.randn(2, 1, 70, 2, 8).to(dtype)
    for length, bad, token in itertools.product((0, 5, 62), (torch.nan, torch.inf), range(4)):
        outputs = []
        for poison in (False, True):
            new = [x.clone() for x in (k, v)]
            for x in new:
                x[:, token] = bad if poison else x[:, token]
            lengths = torch.tensor([length])
            outputs.append(kernels.hype_attention_decode(q, *caches.clone(), lengths, k=new[0], v=new[1]))
        assert outputs[1][:, :token].equal(outputs[0][:, :token]) and not outputs[1][:, token:].isfinite().any()
