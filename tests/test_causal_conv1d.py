"""The short causal convolution and its update against the loop over t: values, gradients, packing, step by step."""

from itertools import pairwise

import pytest
import torch
from compare import assert_matches_reference
from recurrence_suite import bounds

from hypenet_kernels import causal_conv1d_fn, causal_conv1d_update, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # B, C, T, W
    (2, 5, 1, 4),  # one token, few channels
    (1, 64, 64, 4),  # a block of tokens and a panel of channels
    (2, 67, 65, 4),  # one more of each
    (1, 130, 131, 3),
    (3, 16, 2, 4),  # fewer tokens than taps
    (1, 9, 70, 2),
]


def make_inputs(B, C, T, W, dtype=torch.float32, N=None):
    """x channel-last, weight and bias in dtype, initial states."""
    return {
        "x": torch.randn(B, T, C).to(dtype).transpose(1, 2),
        "weight": torch.randn(C, W).to(dtype),
        "bias": torch.randn(C).to(dtype),
        "initial_states": torch.randn(B if N is None else N, C, W - 1).to(dtype),
    }


def in_double(inputs):
    return {name: x.double() for name, x in inputs.items()}


def forward(inputs, **options):
    return causal_conv1d_fn(**inputs, return_final_states=True, **options)


def gradients(op, inputs, cotangents, **options):
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs = op(leaves, **options)
    given = [dy.to(y.dtype) for dy, y in zip(cotangents, outputs, strict=True)]
    return dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), given), strict=True))


def run_reference(inputs, **options):
    return reference.causal_conv1d_fn(**inputs, **options)


def rounded(x, dtype):
    return x.to(dtype).double() if dtype in (torch.bfloat16, torch.float16) else None


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_every_gradient(shape, dtype, activation):
    inputs = make_inputs(*shape, dtype)
    results, expected = forward(inputs, activation=activation), run_reference(in_double(inputs), activation=activation)
    for name, result, exact in zip(("y", "final_states"), results, expected, strict=True):
        assert result.dtype == dtype
        assert_matches_reference(name, result, exact, eager=rounded(exact, dtype))
    given = [torch.randn_like(x) for x in expected]
    exact = gradients(run_reference, in_double(inputs), given, activation=activation)
    for name, x in gradients(forward, inputs, given, activation=activation).items():
        assert x.dtype == dtype
        assert_matches_reference(f"d{name}", x, exact[name], eager=rounded(exact[name], dtype))


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed):
    inputs = make_inputs(1, 3, 9, 4, torch.float64, N=3 if packed else None)
    names, leaves = inputs.keys(), [x.requires_grad_() for x in inputs.values()]
    options = {"activation": "silu"} | ({"cu_seqlens": bounds(5, 0, 2)} if packed else {})
    assert torch.autograd.gradcheck(lambda *x: forward(dict(zip(names, x, strict=True)), **options), leaves)


@pytest.mark.parametrize("how", ["cu_seqlens", "seq_idx"])
def test_packed_sequences_are_each_alone(how):
    lengths = (5, 1, 70, 2, 64) if how == "seq_idx" else (5, 0, 1, 70, 2, 64, 0)
    inputs = make_inputs(1, 33, sum(lengths), 4, N=len(lengths))
    dy, dstate = torch.randn(1, 33, sum(lengths)), torch.randn(len(lengths), 33, 3)
    if how == "seq_idx":
        del inputs["initial_states"]
        seq_idx = torch.repeat_interleave(torch.tensor([7, 3, 7, 0, 1]), torch.tensor(lengths))[None].int()
        y = causal_conv1d_fn(**inputs, seq_idx=seq_idx, activation="silu")
        found = gradients(lambda x: (causal_conv1d_fn(**x, seq_idx=seq_idx, activation="silu"),), inputs, [dy])
        states = None
    else:
        options = {"cu_seqlens": bounds(*lengths, dtype=torch.int32), "activation": "silu"}
        y, states = forward(inputs, **options)
        found = gradients(forward, inputs, [dy, dstate], **options)
    for n, (start, stop) in enumerate(pairwise(bounds(*lengths).tolist())):
        alone = {name: x[:, :, start:stop] if name == "x" else x for name, x in inputs.items()}
        given = [dy[:, :, start:stop]]
        run = lambda x: (causal_conv1d_fn(**x, activation="silu"),)  # noqa: E731
        if states is not None:
            alone["initial_states"] = inputs["initial_states"][n : n + 1]
            given, run = [*given, dstate[n : n + 1]], lambda x: forward(x, activation="silu")
        results = run(alone)
        assert y[:, :, start:stop].equal(results[0])
        assert states is None or states[n].equal(results[1][0])
        gradients_alone = gradients(run, alone, given)
        assert found["x"][:, :, start:stop].equal(gradients_alone["x"])
        if states is not None:
            assert found["initial_states"][n].equal(gradients_alone["initial_states"][0])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_neighbour_never_leaks(poison):
    inputs = make_inputs(1, 8, 20, 4, N=3)
    inputs["x"][:, :, 6:14] = poison
    y, states = forward(inputs, cu_seqlens=bounds(6, 8, 6))
    assert y[:, :, :6].isfinite().all() and y[:, :, 14:].isfinite().all() and states[[0, 2]].isfinite().all()
    seq_idx = torch.tensor([[0] * 6 + [1] * 8 + [2] * 6])
    y = causal_conv1d_fn(inputs["x"], inputs["weight"], seq_idx=seq_idx)
    assert y[:, :, :6].isfinite().all() and y[:, :, 14:].isfinite().all()


def test_bounds_that_end_before_T_leave_zeros():
    inputs = make_inputs(1, 8, 80, 4, N=2)
    whole = {name: x[:, :, :70] if name == "x" else x for name, x in inputs.items()}
    y, states = forward(inputs, cu_seqlens=bounds(30, 40))
    y_whole, states_whole = forward(whole, cu_seqlens=bounds(30, 40))
    assert y[:, :, :70].equal(y_whole) and (y[:, :, 70:] == 0).all() and states.equal(states_whole)
    given = [torch.randn(1, 8, 80), torch.randn(2, 8, 3)]
    assert (gradients(forward, inputs, given, cu_seqlens=bounds(30, 40))["x"][:, :, 70:] == 0).all()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_runs_of_seq_idx_over_blocks_and_rows(index_dtype):
    """Sequences that begin 1, 2 and 3 tokens before a block of 64 and at its first token, in two rows."""
    inputs = make_inputs(2, 9, 200, 4)
    del inputs["initial_states"]
    starts = ((0, 61, 126, 191), (0, 63, 64, 128))
    seq_idx = torch.zeros(2, 200, dtype=index_dtype)
    for b, row in enumerate(starts):
        for n, start in enumerate(row):
            seq_idx[b, start:] = n % 2  # neighbours differ, and every other sequence has the same value
    y = causal_conv1d_fn(**inputs, seq_idx=seq_idx)
    dy = torch.randn(2, 9, 200)
    dx = gradients(lambda x: (causal_conv1d_fn(**x, seq_idx=seq_idx),), inputs, [dy])["x"]
    for b, row in enumerate(starts):
        for start, stop in pairwise((*row, 200)):
            alone = inputs | {"x": inputs["x"][b, None, :, start:stop]}
            assert y[b, None, :, start:stop].equal(causal_conv1d_fn(**alone))
            given = [dy[b, None, :, start:stop]]
            assert dx[b, None, :, start:stop].equal(gradients(lambda x: (causal_conv1d_fn(**x),), alone, given)["x"])


def check_padding(device):
    inputs = {name: x.to(device) for name, x in make_inputs(1, 16, 150, 4).items() if name != "initial_states"}
    seq_idx = torch.full((1, 150), -1, dtype=torch.int32)
    used = ((3, 63), (66, 120), (120, 129))
    for n, (start, stop) in enumerate(used):
        seq_idx[:, start:stop] = n
    unused = seq_idx[0] < 0
    dy = torch.randn(1, 16, 150)
    poisoned = inputs | {"x": inputs["x"].clone()}
    poisoned["x"][:, :, unused.to(device)], dy[:, :, unused] = torch.nan, torch.nan
    dy, seq_idx = dy.to(device), seq_idx.to(device)
    run = lambda x: (causal_conv1d_fn(**x, seq_idx=seq_idx, activation="silu"),)  # noqa: E731
    y, found = run(poisoned)[0], gradients(run, poisoned, [dy])
    assert (y[:, :, unused.to(device)] == 0).all() and (found["x"][:, :, unused.to(device)] == 0).all()
    alone = lambda x: (causal_conv1d_fn(**x, activation="silu"),)  # noqa: E731
    total = 0
    for start, stop in used:
        own = inputs | {"x": inputs["x"][:, :, start:stop]}
        expected = gradients(alone, own, [dy[:, :, start:stop]])
        assert y[:, :, start:stop].equal(alone(own)[0]) and found["x"][:, :, start:stop].equal(expected["x"])
        total += expected["weight"].double()
    assert_matches_reference("dweight", found["weight"], total)


def test_negative_seq_idx_is_padding():
    check_padding("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_silu_of_every_size(dtype):
    """Below -88 (float32) and -709 (float64) exp(-z) overflows."""
    z = torch.tensor([-1e4, -750.0, -150.0, -100.0, -89.0, -88.0, -1.0, 0.0, 1.0, 89.0, 1e4], dtype=dtype)
    inputs = {"x": z[None, None].expand(1, 19, -1), "weight": torch.tensor([0.0, 1.0]).expand(19, 2)}
    results = [
        gradients(lambda x, f=f: (f(**x, activation="silu"),), x, [torch.ones(1, 19, 11)])["x"]
        for f, x in ((causal_conv1d_fn, inputs), (lambda **x: reference.causal_conv1d_fn(**x)[0], in_double(inputs)))
    ]
    torch.testing.assert_close(results[0], results[1].to(dtype))
    y = causal_conv1d_fn(**inputs, activation="silu")
    torch.testing.assert_close(y[0, 0], torch.nn.functional.silu(z))
    state = torch.zeros(1, 19, 1, dtype=dtype)
    assert causal_conv1d_update(inputs["x"], state, inputs["weight"], activation="silu").equal(y)


@pytest.mark.parametrize("split", [1, 2, 64])
def test_two_calls_carrying_the_state_are_one(split):
    inputs = make_inputs(2, 9, 70, 4)
    y, states = forward(inputs)
    first = {name: x[:, :, :split] if name == "x" else x for name, x in inputs.items()}
    y_first, state = forward(first)
    rest = {name: x[:, :, split:] if name == "x" else x for name, x in inputs.items()} | {"initial_states": state}
    y_rest, state = forward(rest)
    assert y.equal(torch.cat([y_first, y_rest], dim=2)) and state.equal(states)


def test_any_strides():
    inputs = make_inputs(2, 9, 70, 4)
    strided = {name: x.mT.contiguous().mT if x.dim() > 1 else x for name, x in inputs.items()}
    strided["x"] = inputs["x"].contiguous()  # time-last
    given = [torch.randn(2, 9, 70), torch.randn(2, 9, 3)]
    for a, b in zip(forward(inputs), forward(strided), strict=True):
        assert a.equal(b)
    other = gradients(forward, strided, [x.mT.contiguous().mT for x in given])
    for name, x in gradients(forward, inputs, given).items():
        assert x.equal(other[name]), name


def test_bitwise_the_same_for_any_number_of_threads():
    inputs = make_inputs(2, 150, 300, 4)
    given = [torch.randn(2, 150, 300), torch.randn(2, 150, 3)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append((*forward(inputs), *gradients(forward, inputs, given).values()))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


def test_final_states_out():
    inputs = make_inputs(2, 9, 7, 4)
    out = torch.empty(2, 9, 3)
    y, states = forward(inputs, final_states_out=out)
    assert out.equal(states) and states.equal(forward(inputs)[1])
    assert causal_conv1d_fn(**inputs, final_states_out=out).equal(y)


def test_empty_problems():
    for B, T in ((0, 0), (2, 0)):
        inputs = make_inputs(B, 4, T, 4)
        y, states = forward(inputs)
        assert y.shape == (B, 4, T) and states.equal(inputs["initial_states"])
        found = gradients(forward, inputs, [torch.randn(B, 4, T), torch.randn(B, 4, 3)])
        assert all(found[name].shape == x.shape for name, x in inputs.items())


def op_arguments(packed):
    """Of the forward op, with sequences named by seq_idx or by cu_seqlens."""
    x, weight, bias = torch.randn(1 if packed else 2, 5, 6), torch.randn(6, 4), torch.randn(6)
    if packed:
        return [x, weight, bias, torch.randn(2, 3, 6), None, bounds(2, 3), True]
    return [x, weight, bias, None, torch.tensor([[0, 0, 0, 1, 1], [2, 3, 3, -1, 0]]), None, True]


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    arguments = op_arguments(packed)
    torch.library.opcheck(torch.ops.hypenet.causal_conv1d_fn_inference.default, arguments)
    dy = torch.randn_like(arguments[0])
    torch.library.opcheck(torch.ops.hypenet.causal_conv1d_fn_bwd.default, [dy, *arguments])
    for x in arguments[:4]:
        if x is not None:
            x.requires_grad_()
    torch.library.opcheck(torch.ops.hypenet.causal_conv1d_fn.default, arguments)


def test_opcheck_update():
    state = torch.randn(3, 6, 4)
    for lengths, slots in ((None, None), (torch.tensor([1, 5]), torch.tensor([2, -1]))):
        own = state if slots is not None else state[:2].clone()
        arguments = (torch.randn(2, 1, 6), own, torch.randn(6, 4), None, lengths, slots, True)
        torch.library.opcheck(torch.ops.hypenet.causal_conv1d_update.default, arguments)


def test_compiles_to_one_graph():
    inputs = make_inputs(1, 9, 70, 4, N=2)
    compiled = torch.compile(causal_conv1d_fn, fullgraph=True, backend="aot_eager")
    options = {"cu_seqlens": bounds(30, 40), "activation": "silu", "return_final_states": True}
    given = [torch.randn(1, 9, 70), torch.randn(2, 9, 3)]
    expected = gradients(forward, inputs, given, cu_seqlens=bounds(30, 40), activation="silu")
    for name, x in gradients(lambda x: compiled(**x, **options), inputs, given).items():
        assert x.equal(expected[name]), name


def test_meta_tensors_give_shapes():
    inputs = {name: x.to("meta") for name, x in make_inputs(2, 9, 7, 4, torch.bfloat16).items()}
    y, states = forward(inputs)
    assert (y.shape, y.dtype, states.shape) == ((2, 9, 7), torch.bfloat16, (2, 9, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("L", [3, 4, 6])
@pytest.mark.parametrize("ring", [False, True])
def test_updates_are_the_convolution_token_by_token(dtype, L, ring):
    inputs = make_inputs(2, 70, 12, 4, dtype)
    state = torch.zeros(2, 70, L, dtype=dtype)
    if ring:  # entry i % L is input i; the initial states are the inputs before 5 and 9
        lengths = torch.tensor([5, 9])
        for b, length in enumerate(lengths.tolist()):
            for i in range(3):
                state[b, :, (length - 3 + i) % L] = inputs["initial_states"][b, :, i]
    else:
        lengths = None
        state[:, :, L - 3 :] = inputs["initial_states"]
    expected = causal_conv1d_fn(**inputs, activation="silu")
    for start, stop in ((0, 1), (1, 2), (2, 7), (7, 12)):
        x = inputs["x"][:, :, start:stop]
        x = x[:, :, 0] if start == 0 else x
        y = causal_conv1d_update(x, state, inputs["weight"], inputs["bias"], "silu", lengths)
        y = y[:, :, None] if start == 0 else y
        exact = expected[:, :, start:stop]
        assert_matches_reference("y", y, exact.double(), eager=rounded(exact.double(), dtype))
        lengths = lengths + stop - start if ring else None
    newest = inputs["x"][:, :, -3:]
    for b in range(2):
        at = [(int(lengths[b]) - 3 + i) % L for i in range(3)] if ring else slice(L - 3, L)
        assert state[b][:, at].equal(newest[b])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_update_gives_the_bits_of_the_convolution(activation, W, dtype):
    """Of any part of the channels, bounded by vectors of every width."""
    inputs = make_inputs(3, 64 + 19, 5, W, dtype)
    expected = causal_conv1d_fn(**inputs, activation=activation)
    state = inputs["initial_states"].clone()
    for t, x in enumerate(inputs["x"].unbind(2)):
        y = causal_conv1d_update(x, state, inputs["weight"], inputs["bias"], activation)
        assert y.equal(expected[:, :, t]), t
    state = inputs["initial_states"].clone()
    assert causal_conv1d_update(inputs["x"], state, inputs["weight"], inputs["bias"], activation).equal(expected)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_weights_of_any_dtype_and_strides(dtype, weight_dtype):
    inputs = make_inputs(2, 70, 9, 4, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = inputs["weight"].to(weight_dtype), inputs["bias"].to(weight_dtype)
    strided = inputs | {"weight": weight.mT.contiguous().mT, "bias": torch.stack([bias, bias], dim=1)[:, 0]}
    widened = inputs | {"weight": weight.to(wide), "bias": bias.to(wide)}
    assert not strided["weight"].is_contiguous() and not strided["bias"].is_contiguous()
    given = [torch.randn(2, 70, 9), torch.randn(2, 70, 3)]
    assert forward(strided, activation="silu")[0].equal(forward(widened, activation="silu")[0])
    found, expected = (gradients(forward, x, given, activation="silu") for x in (strided, widened))
    for name, x in found.items():
        assert x.dtype == strided[name].dtype and x.equal(expected[name].to(x.dtype)), name
    results = [
        causal_conv1d_update(x["x"], x["initial_states"].clone(), x["weight"], x["bias"]) for x in (strided, widened)
    ]
    assert results[0].equal(results[1])


def allocations(run):
    """Return the names of the operators in which run() allocates memory."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    return [event.name for event in profile.events() if event.name.startswith("aten::") and event.self_cpu_memory_usage]


@pytest.mark.parametrize("x_shape", [(2, 70), (2, 70, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_update_allocates_its_output_alone(dtype, x_shape):
    """Also for time-last x, weights of another dtype and any strides of the state."""
    x, state = torch.randn(x_shape).to(dtype), torch.randn(2, 4, 70).to(dtype).mT
    weight, bias, lengths = torch.randn(70, 4).double(), torch.randn(70), torch.tensor([1, 2])
    assert len(allocations(lambda: causal_conv1d_update(x, state, weight, bias, "silu"))) == 1
    assert len(allocations(lambda: causal_conv1d_update(x, state, weight, bias, "silu", lengths, lengths - 1))) == 2


@pytest.mark.parametrize("how", ["seq_idx", "cu_seqlens"])
def test_packing_costs_no_allocation(how):
    inputs = make_inputs(1, 16, 70, 4)
    packed = torch.zeros(1, 70, dtype=torch.int32) if how == "seq_idx" else bounds(30, 40, dtype=torch.int32)
    arguments = inputs["x"], inputs["weight"].half(), inputs["bias"]
    assert len(allocations(lambda: causal_conv1d_fn(*arguments, **{how: packed}))) == 1


def test_update_in_a_ring_of_negative_length():
    """Entry i % L is input i, also of inputs counted from a later one."""
    x, weight, state = torch.randn(2, 9), torch.randn(9, 4), torch.randn(2, 9, 5)
    states = [state.clone() for _ in range(2)]
    results = [
        causal_conv1d_update(x, own, weight, cache_seqlens=torch.tensor(lengths))
        for own, lengths in zip(states, ([-3, -11], [2, 4]), strict=True)
    ]
    assert results[0].equal(results[1]) and states[0].equal(states[1]) and not states[0].equal(state)


def test_update_in_a_pool():
    inputs = make_inputs(3, 9, 1, 4)
    pool = torch.full((5, 2, 9, 4), torch.nan)[:, 0]  # gaps between slots
    slots = torch.tensor([4, -1, 1], dtype=torch.int32)
    states = torch.randn(3, 9, 4)
    pool[4], pool[1] = states[0], states[2]
    y = causal_conv1d_update(inputs["x"], pool, inputs["weight"], None, None, None, slots)
    expected = causal_conv1d_update(inputs["x"], states, inputs["weight"])
    assert y[[0, 2]].equal(expected[[0, 2]]) and (y[1] == 0).all()
    assert pool[4].equal(states[0]) and pool[1].equal(states[2]) and pool[[0, 2, 3]].isnan().all()


def bad(error, message, op=causal_conv1d_fn, **changes):
    inputs = make_inputs(2, 9, 7, 4)
    if op is causal_conv1d_update:
        inputs = {"x": torch.zeros(2, 9), "conv_state": torch.zeros(2, 9, 4), "weight": inputs["weight"]}
    with pytest.raises(error, match=f"^{op.__name__}: {message}"):
        op(**(inputs | changes))


def test_wrong_arguments():
    bad(TypeError, "x must be a tensor, got list", x=[1.0])
    bad(ValueError, r"x must have 3 dimensions \[B, C, T\]", x=torch.zeros(2, 9))
    bad(ValueError, r"x must have 3 dimensions \[B, C, T\]", x=torch.zeros(9, 7))
    bad(TypeError, "x must be float64 or .*, got int64", x=torch.zeros(2, 9, 7, dtype=torch.int64))
    bad(ValueError, r"weight must have shape \[C = 9, W\] with W = 2, 3 or 4, got \[9, 5\]", weight=torch.zeros(9, 5))
    bad(ValueError, r"weight must have shape \[C = 9, W\]", weight=torch.zeros(8, 4))
    bad(ValueError, r"bias must have shape \[9\]", bias=torch.zeros(8))
    bad(ValueError, "activation must be None, 'silu' or 'swish', got 'relu'", activation="relu")
    bad(ValueError, "activation must be None, 'silu' or 'swish', got True", activation=True)
    bad(ValueError, "activation must be None, 'silu' or 'swish', got \\['silu'\\]", activation=["silu"])
    bad(
        ValueError,
        r"initial_states must have shape \[2, 9, 3\], got \[2, 9, 4\]",
        initial_states=torch.zeros(2, 9, 4),
    )
    bad(ValueError, "initial_states must be None with seq_idx", seq_idx=torch.zeros(2, 7, dtype=torch.int32))
    one = {"initial_states": None, "seq_idx": torch.zeros(2, 7, dtype=torch.int32)}
    bad(ValueError, "cu_seqlens must be None with seq_idx", **one, cu_seqlens=torch.tensor([0, 7]))
    bad(ValueError, "return_final_states must be False with seq_idx .*, got True", **one, return_final_states=True)
    bad(ValueError, "final_states_out must be None with seq_idx", **one, final_states_out=torch.zeros(2, 9, 3))
    one = {"initial_states": None, "seq_idx": torch.zeros(2, 6, dtype=torch.int32)}
    bad(ValueError, r"seq_idx must have shape \[2, 7\]", **one)
    bad(
        ValueError,
        "x must have batch size 1",
        cu_seqlens=torch.tensor([0, 7]),
        initial_states=None,
    )
    bad(ValueError, "weight must be on x's device", weight=torch.zeros(9, 4, device="meta"))


def test_wrong_states():
    bad(TypeError, "initial_states must be float32, got float64", initial_states=torch.zeros(2, 9, 3).double())
    bad(TypeError, "final_states_out must be float32, got float64", final_states_out=torch.zeros(2, 9, 3).double())
    bad(ValueError, r"final_states_out must have shape \[2, 9, 3\]", final_states_out=torch.zeros(2, 9, 4))


def test_wrong_update():
    op = causal_conv1d_update
    bad(ValueError, "x must have 2 or 3 dimensions", op, x=torch.zeros(2, 9, 1, 1))
    bad(ValueError, "x must have 2 or 3 dimensions", op, x=torch.zeros(9))
    bad(ValueError, r"conv_state must have shape \[2, 9, 4\]", op, conv_state=torch.zeros(3, 9, 4))
    bad(ValueError, "conv_state must hold at least W - 1 = 3 inputs, got 2", op, conv_state=torch.zeros(2, 9, 2))
    bad(TypeError, "conv_state must have x's dtype", op, conv_state=torch.zeros(2, 9, 4).double())
    bad(ValueError, "conv_state must not be expanded", op, conv_state=torch.zeros(1, 9, 4).expand(2, 9, 4))
    bad(
        ValueError,
        "conv_state_indices must be below the number of slots, 2",
        op,
        conv_state_indices=torch.tensor([0, 2]),
    )
    bad(ValueError, "conv_state_indices must name no slot twice", op, conv_state_indices=torch.tensor([1, 1]))
    bad(ValueError, "weight must not require grad", op, weight=torch.zeros(9, 4).requires_grad_())
