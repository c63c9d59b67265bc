"""The CUDA decode steps against the reference, on the emulator or a GPU (-m cuda)."""

import pytest
import torch
from compare import assert_matches_reference

from hypenet_kernels import gated_delta_step, reference, simple_gla_step

SHAPES = {  # B, T, H, HV, K, V
    "model": (4, 1, 16, 32, 128, 128),
    "several tokens": (3, 4, 2, 4, 64, 64),
    "tails of K and V": (2, 2, 1, 2, 100, 33),
    "largest K": (1, 2, 1, 1, 256, 40),
    "smallest": (1, 1, 1, 1, 1, 1),
}
MANY = (70_000, 1, 1, 1, 16, 4)  # more sequences than a grid's y
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(B, T, H, HV, K, V, dtype):
    q, k = (torch.nn.functional.normalize(torch.randn(B, T, H, K), dim=-1).to(dtype) for _ in range(2))
    v, state = torch.randn(B, T, HV, V).to(dtype), torch.randn(B, HV, K, V)
    return q, k, v, -2 * torch.rand(B, T, HV), torch.rand(B, T, HV), state


def expected(q, k, v, g, beta, state, **options):
    rule = reference.chunk_simple_gla if beta is None else reference.chunk_gated_delta_rule
    gates = (g,) if beta is None else (g, beta)
    exact = [x.double() for x in (q, k, v, *gates)]
    return rule(*exact, initial_state=state.double(), output_final_state=True, **options)


def check(op, o, state, reference_results):
    o_reference, state_reference = reference_results
    assert_matches_reference(f"{op}: o", o.cpu(), o_reference)
    assert_matches_reference(f"{op}: state", state.cpu(), state_reference)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_delta_step(device, shape, dtype):
    q, k, v, g, beta, state = inputs(*SHAPES[shape], dtype)
    moved = state.to(device, copy=True)
    o = gated_delta_step(*(x.to(device) for x in (q, k, v, g, beta)), moved)
    check("gated_delta_step", o, moved, expected(q, k, v, g, beta, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_simple_gla_step(device, shape, dtype):
    q, k, v, g, _, state = inputs(*SHAPES[shape], dtype)
    moved = state.to(device, copy=True)
    o = simple_gla_step(*(x.to(device) for x in (q, k, v, g)), moved)
    check("simple_gla_step", o, moved, expected(q, k, v, g, None, state))


def test_l2norm_and_strided_inputs(device):
    q, k, v, g, beta, state = inputs(2, 3, 2, 4, 64, 64, torch.float32)
    q, k = 3 * q, 5 * k
    fused = torch.cat([q.flatten(2), k.flatten(2)], dim=-1).to(device)
    q_view, k_view = (x.unflatten(-1, (2, 64)) for x in fused.split(128, dim=-1))
    moved = state.to(device, copy=True)
    o = gated_delta_step(q_view, k_view, *(x.to(device) for x in (v, g, beta)), moved, use_qk_l2norm_in_kernel=True)
    results = expected(q, k, v, g, beta, state, use_qk_l2norm_in_kernel=True)
    check("gated_delta_step", o, moved, results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [gated_delta_step, simple_gla_step])
def test_raw_gate_projections(device, op, dtype):
    q, k, v, _, _, state = inputs(2, 3, 2, 4, 64, 64, dtype)
    a, b = (3 * torch.randn(2, 3, 4).to(dtype) for _ in range(2))
    a[0, 0, 0], a[0, 1, 1] = 1e4, -1e4
    A_log, dt_bias = torch.randn(4), torch.randn(4)
    g = reference.log_decay(a.double(), A_log.double(), dt_bias.double()).clamp(min=-50)
    options = {"use_gate_in_kernel": True, "A_log": A_log.to(device), "dt_bias": dt_bias.to(device)}
    gates, beta = (a.to(device),), None
    if op is gated_delta_step:
        gates, beta = (a.to(device), b.to(device)), 2 * b.double().sigmoid()
        options |= {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}
    moved = state.to(device, copy=True)
    o = op(*(x.to(device) for x in (q, k, v)), *gates, moved, **options)
    check(op.__name__, o, moved, expected(q, k, v, g, beta, state))


@pytest.mark.parametrize("dim", [64, 128, 100])
def test_bits_depend_on_the_sequence_alone(device, dim):
    q, k, v, g, beta, state = (x.to(device) for x in inputs(3, 2, 1, 2, dim, dim, torch.bfloat16))
    together = state.clone()
    o = gated_delta_step(q, k, v, g, beta, together)
    for b in range(3):
        one = slice(b, b + 1)
        alone, steps = state[one].clone(), []
        for t in range(2):
            steps.append(gated_delta_step(*(x[one, t : t + 1] for x in (q, k, v, g, beta)), alone))
        assert torch.equal(torch.cat(steps, dim=1), o[one]) and torch.equal(alone, together[one])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_pool_of_states(device, index_dtype):
    q, k, v, g, beta, state = inputs(3, 1, 2, 4, 64, 64, torch.float32)
    pool = torch.full((6, *state.shape[1:]), float("nan"))
    used, unused, sequences = [4, 0], [1, 2, 3, 5], [0, 2]
    pool[used] = state[sequences]
    moved, slots = pool.to(device, copy=True), torch.tensor([4, -1, 0], dtype=index_dtype)
    o = gated_delta_step(*(x.to(device) for x in (q, k, v, g, beta)), moved, state_indices=slots.to(device))
    results = expected(*(x[sequences] for x in (q, k, v, g, beta, state)))
    check("gated_delta_step", o[sequences], moved[used], results)
    assert (o[1] == 0).all() and moved[unused].isnan().all()


def test_invalid_slot_gives_nan_and_changes_nothing(device):
    q, k, v, g, beta, state = inputs(1, 1, 1, 1, 16, 16, torch.float32)
    moved = state.to(device, copy=True)
    o = gated_delta_step(*(x.to(device) for x in (q, k, v, g, beta)), moved, state_indices=torch.tensor([1]).to(device))
    assert o.isnan().all() and torch.equal(moved.cpu(), state)


@pytest.mark.cuda
def test_many_sequences():
    q, k, v, g, beta, state = inputs(*MANY, torch.float32)
    moved = state.cuda()
    o = gated_delta_step(*(x.cuda() for x in (q, k, v, g, beta)), moved)
    check("gated_delta_step", o, moved, expected(q, k, v, g, beta, state))


@pytest.mark.cuda
def test_graph_replay_and_repeatability():
    q, k, v, g, beta, state = (x.cuda() for x in inputs(2, 1, 2, 4, 128, 128, torch.bfloat16))
    eager_state, graph_state = state.clone(), state.clone()
    eager = [gated_delta_step(q, k, v, g, beta, eager_state) for _ in range(3)][-1]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = gated_delta_step(q, k, v, g, beta, graph_state)
    graph_state.copy_(state)
    for _ in range(3):
        graph.replay()
    assert torch.equal(o, eager) and torch.equal(graph_state, eager_state)
