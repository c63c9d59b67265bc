"""The CUDA chunk forward of the gated delta rule and simple GLA against the reference, on the emulator or a GPU."""

import math
from itertools import pairwise

import emulation
import pytest
import torch
from compare import assert_accurate_as_hi_lo, assert_matches_reference
from recurrence_suite import DECAYS, Shape, arguments, bounds, forward, in_double, make_inputs, raise_some_betas

import hypenet_kernels
from hypenet_kernels import reference
from hypenet_kernels._recurrence_cuda import Saved

CHUNK = 64
BF16, FP16 = torch.bfloat16, torch.float16
OPS = {
    True: (hypenet_kernels.chunk_gated_delta_rule, reference.chunk_gated_delta_rule),
    False: (hypenet_kernels.chunk_simple_gla, reference.chunk_simple_gla),
}
SHAPES = (
    (Shape(2, 1, 1, 1, 64, 64), BF16),  # one token
    (Shape(1, 63, 1, 1, 64, 64), FP16),  # one short of a chunk
    (Shape(1, 64, 2, 2, 64, 64), BF16),  # a chunk
    (Shape(2, 65, 1, 3, 40, 64), FP16),  # one more; value heads in groups; K is padded
    (Shape(1, 135, 1, 2, 128, 128), BF16),  # two chunks and 7
    (Shape(1, 200, 1, 1, 100, 33), BF16),  # K and V are padded
    (Shape(1, 70, 1, 1, 64, 192), FP16),  # V in three tiles
    (Shape(1, 135, 1, 2, 256, 64), BF16),  # the widest K
    (Shape(2, 65, 1, 1, 160, 128), FP16),  # and padded to it
)
ORDINARY = Shape(1, 135, 1, 2, 64, 64)


def to(device, inputs):
    return {name: None if x is None else x.to(device) for name, x in inputs.items()}


def run(device, delta, inputs, **options):
    return [x.cpu() for x in forward(OPS[delta][0], to(device, inputs), **to(device, options))]


def eager(inputs, delta):
    """Return (o, final_state) by the chunk formulas in float64, with the kernels' roundings to q's dtype.

    Rounded are the state, P, the values decayed to the end of the chunk, and o; everything else is float32 or a hi/lo
    split. If some beta of a chunk exceeds 1, the state that is subtracted from the values, and the decayed values, are
    hi/lo splits too.
    """
    dtype, exact = inputs["q"].dtype, in_double(inputs)
    q, k, v, g, state = (exact[name] for name in ("q", "k", "v", "g", "initial_state"))
    beta = exact.get("beta")
    group, scale = v.shape[2] // q.shape[2], q.shape[3] ** -0.5
    o, final_state = torch.empty_like(v), torch.empty_like(state)

    def rounded(x):
        return x.to(dtype).double()

    for b, head in torch.cartesian_prod(torch.arange(v.shape[0]), torch.arange(v.shape[2])).tolist():
        S = state[b, head]
        for t in range(0, v.shape[1], CHUNK):
            span = slice(t, t + CHUNK)
            Q, K, V = q[b, span, head // group], k[b, span, head // group], v[b, span, head]
            G = g[b, span, head].clamp_min(-50).cumsum(0)
            Gamma, gamma = (G[:, None] - G).tril().exp().tril(), G.exp()[:, None]
            E, hi_lo = V, False
            if beta is not None:
                betas = beta[b, span, head, None]
                hi_lo = (betas > 1).any()
                T = torch.linalg.inv(torch.eye(len(G)).double() + (betas * (K @ K.T)).tril(-1)) * Gamma
                E = T @ (betas * (V - gamma * (K @ (S if hi_lo else rounded(S)))))
            P = rounded(scale * (Q @ K.T) * Gamma)
            o[b, span, head] = rounded(scale * gamma * (Q @ rounded(S)) + P @ E)
            to_end = (G[-1] - G).exp()[:, None] * E
            S = gamma[-1] * S + K.T @ (to_end if hi_lo else rounded(to_end))
        final_state[b, head] = S
    return o, final_state


def assert_forward(device, delta, inputs, eager_results=None):
    results = run(device, delta, inputs)
    expected = forward(OPS[delta][1], in_double(inputs))
    eager_results = eager(inputs, delta) if eager_results is None else eager_results
    for name, result, exact, low in zip(("o", "final_state"), results, expected, eager_results, strict=True):
        assert_matches_reference(name, result, exact, eager=low, dtype=inputs["q"].dtype)


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "gla"])
@pytest.mark.parametrize("shape, dtype", SHAPES, ids=str)
def test_forward(device, shape, dtype, delta):
    assert_forward(device, delta, make_inputs(shape, delta, dtype))


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "gla"])
@pytest.mark.parametrize("kind", DECAYS)
def test_decay(device, kind, delta):
    inputs = make_inputs(ORDINARY, delta, BF16, decay_kind=kind)
    assert_forward(device, delta, inputs)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("keys", ["random", "identical", "periodic"])
def test_hard_systems(device, keys, beta, dtype):
    """Repeated keys make the triangular system of a chunk as ill-conditioned as possible."""
    inputs = make_inputs(ORDINARY, True, dtype, decay_kind="none")
    inputs["beta"].fill_(beta)
    if keys != "random":
        period = 1 if keys == "identical" else 4
        inputs["k"] = inputs["k"][:, :period].repeat(1, ORDINARY.T, 1, 1)[:, : ORDINARY.T]
    assert_forward(device, True, inputs)


@pytest.mark.parametrize("K, V", [(64, 64), (256, 192)])
def test_chunks_with_and_without_beta_above_one(device, K, V):
    """Four chunks and two value heads of one key head: every combination of some beta above 1 and none."""
    inputs = make_inputs(Shape(1, 200, 1, 2, K, V), True, BF16, decay_kind="none")
    inputs["k"] = inputs["k"][:, :4].repeat(1, 50, 1, 1)
    raise_some_betas(inputs["beta"])
    assert_forward(device, True, inputs)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("K", [64, 256])
def test_state_with_beta_above_one(device, K, dtype):
    """Every factor of the state is a hi/lo split."""
    inputs = make_inputs(Shape(1, 200, 1, 2, K, 64), True, dtype, decay_kind="none")
    inputs["beta"] *= 2
    _, exact = forward(OPS[True][1], in_double(inputs))
    assert_accurate_as_hi_lo("final_state", run(device, True, inputs)[1], exact, dtype)


def system(k, beta, g):
    """(A, (I + A)^-1) for A = stril(diag(beta) K K^T . Gamma) of one chunk and head, in float64."""
    G = g.double().cumsum(0)
    A = (beta.double()[:, None] * (k.double() @ k.double().T) * (G[:, None] - G).tril().exp()).tril(-1)
    return A, torch.linalg.inv(torch.eye(len(G)).double() + A)


def assert_inverse(L, A, T):
    """Assert that the hi/lo split L is T - I up to eps^2 of its dtype, given a system accurate to 20 bits."""
    found = L.double().tril(-1) + L.double().triu(1).mT
    info = torch.finfo(L.dtype)
    bound = info.eps**2 * T.abs() + info.eps * info.tiny + 2**-20 * (T.abs() @ A.abs() @ T.abs())
    assert ((found - T.tril(-1)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("keys", ["random", "identical"])
def test_inverse(device, keys, beta, dtype):
    inputs = make_inputs(ORDINARY, True, dtype, decay_kind="none" if keys == "identical" else "mild")
    inputs["beta"].fill_(beta)
    if keys == "identical":
        inputs["k"] = inputs["k"][:, :1].expand(inputs["k"].shape).contiguous()
    exact = system(*(inputs[name][0, :CHUNK, head] for name, head in (("k", 0), ("beta", 1), ("g", 1))))
    assert_inverse(save(device, inputs).L[0, 1], *exact)


def test_large_predictable_values(device):
    """v = S^T k for a fixed S: the residual is a small difference of large numbers."""
    inputs = make_inputs(ORDINARY, True, BF16, decay_kind="none")
    S = 1e3 * inputs["initial_state"]
    keys = inputs["k"].float().repeat_interleave(2, dim=2)
    inputs["initial_state"], inputs["v"] = S, torch.einsum("bthk,bhkv->bthv", keys, S).bfloat16()
    assert_forward(device, True, inputs)


def save(device, inputs, cu_seqlens=None):
    inputs = to(device, inputs)
    args = [*arguments(inputs), None if cu_seqlens is None else cu_seqlens.to(device), 0.25, 0]
    op = torch.ops.hypenet.chunk_gated_delta_rule if "beta" in inputs else torch.ops.hypenet.chunk_simple_gla
    return Saved(*(x.cpu() for x in op.default(*args)[2]))


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "gla"])
def test_saved(device, delta):
    """Tensors saved for backward, with packed sequences: chunk offsets, inverse, decays and states."""
    lengths = (70, 0, 64, 1)
    inputs = make_inputs(Shape(1, sum(lengths), 1, 2, 64, 64), delta, BF16, N=len(lengths))
    cu_seqlens = bounds(*lengths)
    saved = save(device, inputs, cu_seqlens)
    assert saved.chunk_offsets.tolist() == [[0, 2, 2, 3, 4], cu_seqlens.tolist()]
    assert saved.h.shape == (sum(lengths) // CHUNK + len(lengths), 2, 64, 64)
    for n, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        alone = {name: x[:, start:stop] for name, x in inputs.items()}
        alone["initial_state"] = inputs["initial_state"][n : n + 1]
        for i, t in enumerate(range(0, stop - start, CHUNK)):
            chunk = saved.chunk_offsets[0, n] + i
            c = min(CHUNK, stop - start - t)
            G = torch.nn.functional.pad(alone["g"][0, t : t + c].double().T, (0, CHUNK - c)).cumsum(-1)
            G = G / torch.tensor(2.0).double().log()
            assert_matches_reference("G", saved.G[chunk], G)
            before = {name: x[:, :t] for name, x in alone.items()} | {"initial_state": alone["initial_state"]}
            _, state = forward(OPS[delta][1], in_double(before))
            assert_matches_reference("h", saved.h[chunk], state[0], eager=state[0].bfloat16())
            if delta:
                for head in range(2):
                    gates = (alone[name][0, t : t + c, head] for name in ("beta", "g"))
                    exact = system(alone["k"][0, t : t + c, 0], *gates)
                    assert_inverse(saved.L[chunk, head, :c, :c], *exact)
                    assert (saved.L[chunk, head, c:, :c] == 0).all() and (saved.L[chunk, head, :c, c:] == 0).all()


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "gla"])
@pytest.mark.parametrize("K", [64, 256])
def test_packed_sequences_are_each_alone(device, K, delta):
    lengths = (5, 0, 65, 128, 0)
    inputs = make_inputs(Shape(1, sum(lengths), 1, 2, K, 64), delta, BF16, N=len(lengths))
    if delta:
        inputs["beta"][:, 5:70] *= 2  # above 1 in the third sequence only
    cu_seqlens = bounds(*lengths, dtype=torch.int32)
    o, final_state = run(device, delta, inputs, cu_seqlens=cu_seqlens)
    for n, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        alone = {name: x[:, start:stop] for name, x in inputs.items()}
        alone["initial_state"] = inputs["initial_state"][n : n + 1]
        o_alone, state_alone = run(device, delta, alone)
        assert o[:, start:stop].equal(o_alone) and final_state[n].equal(state_alone[0])


def test_two_calls_carrying_the_state_are_one(device):
    inputs = make_inputs(ORDINARY, True, BF16)
    o, final_state = run(device, True, inputs)
    first = {name: x[:, :CHUNK] for name, x in inputs.items()} | {"initial_state": inputs["initial_state"]}
    o_first, state = run(device, True, first)
    second = {name: x[:, CHUNK:] for name, x in inputs.items()} | {"initial_state": state}
    o_second, state = run(device, True, second)
    assert torch.cat([o_first, o_second], dim=1).equal(o) and state.equal(final_state)


def test_without_initial_state_it_starts_from_zero(device):
    inputs = make_inputs(ORDINARY, True, BF16)
    zero = run(device, True, inputs | {"initial_state": torch.zeros_like(inputs["initial_state"])})
    assert all(a.equal(b) for a, b in zip(run(device, True, inputs | {"initial_state": None}), zero, strict=True))


@pytest.mark.parametrize("offset", [8, 3], ids=["aligned", "unaligned"])
def test_strided_views_beside_nan(device, offset):
    """q, k and v are slices of one buffer that is NaN elsewhere; unaligned slices are copied."""
    s = ORDINARY
    inputs = make_inputs(s, True, BF16)
    expected = run(device, True, inputs)
    wide = 3 * 128 + 16
    buffer = torch.full((s.B, s.T + 1, wide), torch.nan, dtype=BF16, device=device)
    for i, name in enumerate("qkv"):
        x = inputs[name].flatten(2).to(device)
        part = buffer[:, : s.T, offset + i * 128 :][..., : x.shape[-1]]
        part.copy_(x)
        inputs[name] = part.unflatten(-1, inputs[name].shape[2:])
    for name in ("g", "beta"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert all(a.equal(b) for a, b in zip(run(device, True, inputs), expected, strict=True))


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "initial_state"])
def test_nan_propagates(device, name):
    """A NaN reaches its own token and, unless it is in q, all tokens after the chunk."""
    inputs = make_inputs(Shape(1, 200, 1, 1, 64, 64), True, BF16)
    inputs[name][:, 0 if name == "initial_state" else 70] = math.nan
    o, final_state = run(device, True, inputs)
    assert o[:, 70].isnan().all()
    if name == "q":
        assert o[:, CHUNK * 2 :].isfinite().all() and final_state.isfinite().all()
    else:
        assert o[:, CHUNK * 2 :].isnan().all() and final_state.isnan().all()


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "gla"])
def test_bits_do_not_depend_on_number_of_sms_or_schedule(delta):
    """For one SM blocks have eight warps, for two SMs four, for many two."""
    inputs = make_inputs(Shape(1, 135, 1, 1, 64, 128), delta, BF16)
    results = []
    for processors in (1, 2, 132):
        for seed in emulation.SEEDS:
            with emulation.emulated(seed):
                emulation.module().set_num_processors(processors)
                results.append(run("cpu", delta, inputs))
    emulation.module().set_num_processors(4)
    assert all(a.equal(b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("T", [3, 70])
def test_recurrent_form(device, T):
    """Few tokens use the step kernel, more use the chunk form."""
    inputs = make_inputs(Shape(2, T, 1, 2, 64, 64), True, BF16)
    results = forward(hypenet_kernels.fused_recurrent_gated_delta_rule, to(device, inputs))
    expected = forward(OPS[True][1], in_double(inputs))
    for name, result, exact, low in zip(("o", "final_state"), results, expected, eager(inputs, True), strict=True):
        assert_matches_reference(name, result.cpu(), exact, eager=low, dtype=BF16)
    gla = {name: x for name, x in inputs.items() if name != "beta"}
    o, _ = forward(hypenet_kernels.fused_recurrent_simple_gla, to(device, gla))
    expected, _ = forward(OPS[False][1], in_double(gla))
    assert_matches_reference("o", o.cpu(), expected, eager=eager(gla, False)[0])


def test_recurrent_form_in_float32(device):
    inputs = make_inputs(Shape(1, 20, 1, 2, 40, 24), True)
    results = forward(hypenet_kernels.fused_recurrent_gated_delta_rule, to(device, inputs))
    for result, exact in zip(results, forward(OPS[True][1], in_double(inputs)), strict=True):
        assert_matches_reference("float32", result.cpu(), exact)


@pytest.mark.parametrize("B, T", [(0, 5), (2, 0)])
def test_empty_problems(device, B, T):
    inputs = make_inputs(Shape(B, T, 1, 2, 64, 64), True, BF16)
    o, final_state = run(device, True, inputs)
    assert o.shape == (B, T, 2, 64) and final_state.equal(inputs["initial_state"])


def test_not_built(device):
    op = hypenet_kernels.chunk_gated_delta_rule
    with pytest.raises(NotImplementedError, match="chunk_gated_delta_rule: q must be bfloat16 or float16 on CUDA"):
        op(**to(device, make_inputs(ORDINARY, True)))
    wide = make_inputs(Shape(1, 5, 1, 1, 320, 64), True, BF16)
    with pytest.raises(NotImplementedError, match="q must have a head dimension of at most 256 on CUDA, got 320"):
        op(**to(device, wide))


@pytest.mark.cuda
def test_more_sequences_than_a_grids_y():
    N = 70_000
    inputs = to("cuda", make_inputs(Shape(1, N, 1, 1, 64, 64), False, BF16, N=N))
    o, _ = forward(OPS[False][0], inputs, cu_seqlens=torch.arange(N + 1, device="cuda"))
    q, k, v, g = (inputs[name].double()[0] for name in "qkvg")
    S = inputs["initial_state"].double()[:, 0] * g.exp()[:, :, None] + k[:, 0, :, None] * v[:, 0, None]
    expected = 64**-0.5 * torch.einsum("tk,tkv->tv", q[:, 0], S)
    assert_matches_reference("o", o[0, :, 0], expected, eager=expected.bfloat16())


@pytest.mark.cuda
def test_graph_replay_with_packed_sequences():
    inputs = to("cuda", make_inputs(Shape(1, 300, 2, 4, 128, 128), True, BF16, N=3))
    cu_seqlens = torch.tensor([0, 65, 65, 300], device="cuda")
    op = OPS[True][0]
    eager_results = forward(op, inputs, cu_seqlens=cu_seqlens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = forward(op, inputs, cu_seqlens=cu_seqlens)
    graph.replay()
    assert all(a.equal(b) for a, b in zip(results, eager_results, strict=True))
    cu_seqlens.copy_(torch.tensor([0, 10, 200, 300]))
    graph.replay()
    assert all(a.equal(b) for a, b in zip(results, forward(op, inputs, cu_seqlens=cu_seqlens), strict=True))
