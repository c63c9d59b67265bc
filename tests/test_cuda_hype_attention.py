"""The CUDA kernels of HyPE attention, forward and backward, against the reference, on the emulator or a GPU."""

import itertools

import pytest
import torch
from compare import assert_matches_reference
from emulation import emulated
from test_hype_attention import Shape, check_tail, fused, make_inputs, run_with_gradients

from hypenet_kernels import hype_attention, reference

DTYPES = (torch.bfloat16, torch.float16)
SHAPES = {  # block sizes: 128 queries and 64 keys in the forward; 128 and 64 of either in the backward
    "one token": Shape(2, 1, 2, 1, 64),
    "a tile less one": Shape(1, 63, 2, 2, 128),
    "a tile": Shape(2, 64, 2, 1, 64),
    "a tile and one, groups of four": Shape(1, 65, 4, 1, 128),
    "a block and one": Shape(1, 129, 2, 1, 128),
    "two blocks and seven": Shape(1, 263, 1, 1, 64),
    "one query after many keys": Shape(2, 1, 4, 2, 128, query_offset=150),
    "queries and keys out of step": Shape(1, 73, 2, 2, 64, query_offset=95),
    "padded head dimensions": Shape(1, 70, 2, 1, 40),
    "the longest head": Shape(1, 70, 2, 1, 256, query_offset=65),
    "padded to 128": Shape(1, 40, 2, 1, 100, query_offset=3),
}
OPTIONS = {
    "plain": {},
    "scaled": {"logit_scale_base": 500.0},
    "strongly scaled, negative": {"logit_scale_base": 2.0, "scale": -0.05},
}


def assert_matches(device, inputs, do=None, **options):
    """Compare the output and every gradient."""
    dtype = inputs[0].dtype
    do = torch.randn(inputs[0].shape, dtype=dtype) if do is None else do
    on_device = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    results = run_with_gradients(hype_attention, [x.to(device) for x in inputs], do.to(device), **on_device)
    expected = run_with_gradients(reference.hype_attention, inputs, do.double(), **options)
    eager = run_with_gradients(reference.hype_attention, inputs, do, **options)
    for name, x in results.items():
        assert x.dtype == dtype
        only_key = inputs[1].shape[1] == 1 and name in ("dq", "dk")  # gradient is 0: compare it plus 1
        assert_matches_reference(name, x.cpu() + only_key, expected[name] + only_key, eager[name] + only_key)
    return results


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_shape(device, shape):
    assert_matches(device, make_inputs(shape, torch.bfloat16, gate=True), query_offset=shape.query_offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [False, True], ids=["no gate", "gate"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option(device, options, gate, dtype):
    shape = Shape(1, 75, 4, 2, 64, query_offset=10)
    assert_matches(device, make_inputs(shape, dtype, gate), query_offset=10, **options)


def test_a_scale_of_zero_averages(device):
    q, k, v = (x.detach().to(device) for x in make_inputs(Shape(1, 70, 1, 1, 64), torch.bfloat16))
    counts = torch.arange(1, 71)[:, None, None]
    expected = v.double().cpu().cumsum(1) / counts
    assert_matches_reference("o", hype_attention(q, k, v, scale=0.0).cpu(), expected)


@pytest.mark.parametrize("size", [300.0, -300.0])
def test_logits_in_the_thousands(device, size):
    inputs = make_inputs(Shape(1, 150, 2, 1, 64), torch.bfloat16)
    inputs[0] = inputs[0].detach() * size
    assert_matches(device, inputs)


def test_maxima_that_rise_with_every_tile(device):
    inputs = make_inputs(Shape(1, 200, 1, 1, 64), torch.bfloat16, gate=True)
    inputs[0] = torch.full_like(inputs[0], 1.0)
    inputs[1] = torch.linspace(-3, 3, 200).to(torch.bfloat16)[None, :, None, None].expand_as(inputs[1])
    assert_matches(device, inputs, logit_scale_base=10.0)


@pytest.mark.parametrize("gate_value", [-200.0, 200.0])
def test_the_gate_saturates(device, gate_value):
    q, k, v = (x.detach().to(device) for x in make_inputs(Shape(1, 10, 2, 1, 64), torch.bfloat16))
    gate = torch.full_like(q, gate_value).requires_grad_()
    o, open_gate = hype_attention(q, k, v, gate=gate), hype_attention(q, k, v)
    assert torch.equal(o, open_gate if gate_value > 0 else torch.zeros_like(o))
    assert (torch.autograd.grad(o.sum(), gate)[0] == 0).all()


# ---- packed sequences

BOUNDS = [0, 0, 5, 5, 134, 198, 199, 262, 262]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_packed_sequences_are_each_alone(device, index_dtype):
    """Bit for bit the same as alone, whatever the neighbouring sequences contain."""
    inputs = [x.detach().to(device) for x in make_inputs(Shape(1, BOUNDS[-1], 2, 1, 64), torch.bfloat16, gate=True)]
    do = torch.randn_like(inputs[0])
    bounds = torch.tensor(BOUNDS, dtype=index_dtype, device=device)
    for x in inputs:
        x[:, 134:198] = float("nan")
    packed = run_with_gradients(hype_attention, inputs, do, cu_seqlens=bounds, logit_scale_base=9.0)
    for i, j in itertools.pairwise(BOUNDS):
        alone = run_with_gradients(hype_attention, [x[:, i:j] for x in inputs], do[:, i:j], logit_scale_base=9.0)
        for name, x in alone.items():
            assert torch.equal(packed[name][:, i:j].nan_to_num(7.0), x.nan_to_num(7.0)), name
    assert packed["o"][:, :134].isfinite().all()
    assert packed["o"][:, 134:198].isnan().any()


def test_packed_matches_reference(device):
    inputs = make_inputs(Shape(1, 140, 4, 1, 128), torch.bfloat16, gate=True)
    assert_matches(device, inputs, cu_seqlens=torch.tensor([0, 1, 1, 70, 140]), logit_scale_base=9.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(30, 0, 64), (128,), (127, 1, 0, 0), (0, 0), ()], ids=str)
def test_sequences_that_end_before_T(device, lengths, dtype):
    """Tails that are shorter and longer than a tile, and end at, before and after its bounds."""
    for rows, D, gated in ((1, 64, True), (64, 64, False), (135, 64, True), (70, 40, True)):
        check_tail(lengths, sum(lengths) + rows, Shape(1, 0, 2, 1, D), dtype, device, gated)


@pytest.mark.parametrize("D", [128, 256])
def test_tails_of_longer_heads(device, D):
    check_tail((30, 20), 150, Shape(1, 0, 2, 2, D), torch.bfloat16, device)


def test_a_tail_matches_the_reference(device):
    inputs = make_inputs(Shape(1, 140, 4, 1, 64), torch.bfloat16, gate=True)
    assert_matches(device, inputs, cu_seqlens=torch.tensor([0, 1, 1, 70, 100]), logit_scale_base=9.0)


@pytest.mark.parametrize("B, T, S", [(0, 5, 5), (2, 0, 0), (2, 0, 7)])
def test_empty_problems(device, B, T, S):
    q = torch.randn(B, T, 4, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    k, v = (torch.randn(B, S, 2, 64, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(2))
    o = hype_attention(q, k, v, gate=q, query_offset=S - T)
    assert o.shape == q.shape
    assert all((dx == 0).all() for dx in torch.autograd.grad(o.sum(), (q, k, v)))


# ---- memory


def head_major(B, T, H, HK, D):
    return [torch.randn(B, heads, T, D, dtype=torch.bfloat16).transpose(1, 2) for heads in (H, HK, HK)]


def unaligned(B, T, H, HK, D):
    return [torch.randn(B, T, heads, D + 3).bfloat16()[..., 1 : D + 1] for heads in (H, HK, HK)]


def one_projection(*sizes):
    return [x.bfloat16() for x in fused(*sizes)]


@pytest.mark.parametrize("layout", [one_projection, head_major, unaligned])
def test_any_strides(device, layout):
    inputs = layout(2, 67, 4, 2, 64)
    inputs.append(inputs[0].flip(1).transpose(1, 2).contiguous().transpose(1, 2))
    do = torch.randn(2, 64, 4, 67).bfloat16().permute(0, 3, 2, 1).to(device)
    strided = [x.to(device) for x in inputs]
    results = run_with_gradients(hype_attention, strided, do)
    expected = run_with_gradients(hype_attention, [x.contiguous() for x in strided], do.contiguous())
    assert all(torch.equal(x, expected[name]) for name, x in results.items())


def test_rows_around_the_tensors_are_not_read(device):
    """q, k, v and gate are slices of larger tensors that are NaN elsewhere."""
    inputs = make_inputs(Shape(1, 70, 2, 1, 64), torch.bfloat16, gate=True)
    windows = []
    for x in inputs:
        larger = torch.full((3, 200, x.shape[2] + 2, 128), float("nan"), dtype=x.dtype, device=device)
        window = larger[1:2, 65:135, 1:-1, 32:96]
        windows.append(window.copy_(x.detach()))
    do = torch.randn(inputs[0].shape).bfloat16()
    expected = run_with_gradients(hype_attention, [x.to(device) for x in inputs], do.to(device))
    for name, x in run_with_gradients(hype_attention, windows, do.to(device)).items():
        assert torch.equal(x, expected[name]), name


def test_inference_has_the_same_bits(device):
    q = torch.randn(1, 20, 2, 64, dtype=torch.bfloat16, device=device)
    arguments = (q, q, q, q, None, None, 0.125, 0)
    o = torch.ops.hypenet.hype_attention_inference(*arguments)
    assert torch.equal(o, torch.ops.hypenet.hype_attention(*arguments)[0])


def test_the_same_bits_in_every_order_of_threads():
    inputs = make_inputs(Shape(2, 140, 4, 2, 128), torch.bfloat16, gate=True)
    do = torch.randn(inputs[0].shape).bfloat16()
    results = []
    for seed in range(3):
        with emulated(seed):
            results.append(run_with_gradients(hype_attention, inputs, do, logit_scale_base=20.0))
    for result in results[1:]:
        assert all(torch.equal(x, results[0][name]) for name, x in result.items())


@pytest.mark.cuda
def test_repeats_and_replays_in_a_graph():
    q, k, v, gate = (x.detach().cuda() for x in make_inputs(Shape(2, 1000, 8, 2, 128), torch.bfloat16, gate=True))
    do = torch.randn_like(q)
    first = run_with_gradients(hype_attention, [q, k, v, gate], do)
    for name, x in run_with_gradients(hype_attention, [q, k, v, gate], do).items():
        assert torch.equal(x, first[name]), name
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = hype_attention(q, k, v, gate=gate)
    graph.replay()
    assert torch.equal(o, first["o"])


# ---- errors


def test_what_is_not_built_is_refused(device):
    q = torch.ones(1, 4, 2, 64, device=device)
    with pytest.raises(
        NotImplementedError, match=r"^hype_attention: q must be bfloat16 or float16 on CUDA, got float32"
    ):
        hype_attention(q, q, q)
    wide = torch.ones(1, 4, 2, 264, device=device, dtype=torch.bfloat16)
    rule = "^hype_attention: q must have a head dimension of at most 256 on CUDA, got 264"
    with pytest.raises(NotImplementedError, match=rule):
        hype_attention(wide, wide, wide)


def test_packed_sequences_continue_caches(device):
    """Bit for bit as alone against the keys that each may see, whatever the other rows of the caches are."""
    bounds, offsets, capacity = [0, 5, 5, 134, 198, 199, 230], [0, 3, 70, 64, 190, 1], 200
    q, gate = torch.randn(2, 1, bounds[-1] + 5, 2, 64).bfloat16().to(device).unbind()
    k, v = torch.randn(2, len(offsets), capacity, 1, 64).bfloat16().to(device).unbind()
    for n, offset in enumerate(offsets):
        k[n, offset + bounds[n + 1] - bounds[n] :] = v[n, offset + bounds[n + 1] - bounds[n] :] = torch.nan
    indices = {"cu_seqlens": torch.tensor(bounds, device=device), "query_offset": torch.tensor(offsets, device=device)}
    o = hype_attention(q, k, v, gate=gate, logit_scale_base=9.0, **indices)
    for n, offset in enumerate(offsets):
        i, j = bounds[n], bounds[n + 1]
        own = (x[n : n + 1, : offset + j - i] for x in (k, v))
        alone = hype_attention(q[:, i:j], *own, gate=gate[:, i:j], logit_scale_base=9.0, query_offset=offset)
        assert torch.equal(o[:, i:j], alone), n
    assert (o[:, bounds[-1] :] == 0).all()
