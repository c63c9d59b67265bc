"""HyPE attention, forward and backward, against the float64 reference and closed forms."""

import itertools
from typing import NamedTuple

import pytest
import torch
from compare import assert_as_accurate, assert_matches_reference
from recurrence_suite import bounds

from hypenet_kernels import hype_attention, reference

BLOCK = 64  # queries and keys per block of the CPU kernel (csrc/cpu/hype_attention.h)
LOW_PRECISION = (torch.bfloat16, torch.float16)
DTYPES = [torch.float64, torch.float32, *LOW_PRECISION]


class Shape(NamedTuple):
    B: int
    T: int
    H: int
    HK: int
    D: int
    query_offset: int = 0


SHAPES = {
    "one token": Shape(2, 1, 2, 2, 64),
    "a block less one": Shape(1, BLOCK - 1, 4, 2, 32),
    "a block, head dimension of no vector": Shape(2, BLOCK, 2, 1, 4),
    "a block and one, groups of eight": Shape(1, BLOCK + 1, 8, 1, 128),
    "two blocks and seven, odd head dimension": Shape(1, 2 * BLOCK + 7, 2, 2, 100),
    "groups of four, long head": Shape(2, 70, 4, 1, 256),
    "groups of five: tiles of four heads and of one": Shape(1, BLOCK + 35, 5, 1, 24),
    "groups of three, tiles not full": Shape(2, 50, 6, 2, 16),
    "one query after many keys": Shape(2, 1, 4, 2, 64, query_offset=3 * BLOCK),
    "blocks of queries and keys out of step": Shape(1, BLOCK + 9, 4, 4, 32, query_offset=BLOCK + 31),
}
OPTIONS = {
    "plain": {},
    "scaled": {"logit_scale_base": 20.0, "scale": 0.09},
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def make_inputs(shape, dtype=torch.float64, gate=False):
    """Return q, k, v and optionally gate, all with requires_grad."""
    B, T, H, HK, D, offset = shape
    sizes = [(T, H), (offset + T, HK), (offset + T, HK)] + [(T, H)] * gate
    return [torch.randn(B, rows, heads, D, dtype=dtype).requires_grad_() for rows, heads in sizes]


def run(attention, inputs, **options):
    q, k, v, *gate = inputs
    return attention(q, k, v, gate=gate[0] if gate else None, **options)


def run_with_gradients(attention, inputs, do, **options):
    """Return o, dq, dk, dv and dgate by name."""
    inputs = [x.detach().to(do.dtype).requires_grad_() for x in inputs]
    o = run(attention, inputs, **options)
    gradients = torch.autograd.grad(o, inputs, do)
    return dict(zip(("o", "dq", "dk", "dv", "dgate"), (o.detach(), *gradients), strict=False))


def assert_op_matches_reference(inputs, **options):
    dtype = inputs[0].dtype
    do = torch.randn(inputs[0].shape, dtype=dtype)
    expected = run_with_gradients(reference.hype_attention, inputs, do.double(), **options)
    eager = run_with_gradients(reference.hype_attention, inputs, do, **options) if dtype in LOW_PRECISION else {}
    for name, x in run_with_gradients(hype_attention, inputs, do, **options).items():
        assert x.dtype == dtype
        only_key = inputs[1].shape[1] == 1 and name in ("dq", "dk")  # gradient is 0: compare it plus 1
        references = [y[name] + only_key if name in y else None for y in (expected, eager)]
        assert_matches_reference(name, x + only_key, *references)


# ---- against the reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [False, True], ids=["no gate", "gate"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@shapes
def test_forward_and_every_gradient(shape, options, gate, dtype):
    inputs = make_inputs(shape, dtype, gate)
    assert_op_matches_reference(inputs, query_offset=shape.query_offset, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_tokens(dtype):
    assert_op_matches_reference(make_inputs(Shape(1, 1000, 4, 2, 64), dtype, gate=True), logit_scale_base=500.0)


@pytest.mark.parametrize("offset", [0, 3], ids=["start", "offset"])
@pytest.mark.parametrize("base", [None, 7.0], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck(groups, base, offset):
    inputs = make_inputs(Shape(1, BLOCK + 2, groups, 1, 2, offset), gate=True)
    options = {"logit_scale_base": base, "query_offset": offset}
    assert torch.autograd.gradcheck(lambda *x: run(hype_attention, x, **options), inputs)


def test_gradcheck_packed():
    bounds = torch.tensor([0, 3, 3, BLOCK + 5])
    inputs = make_inputs(Shape(1, BLOCK + 5, 2, 1, 2), gate=True)
    assert torch.autograd.gradcheck(lambda *x: run(hype_attention, x, cu_seqlens=bounds, logit_scale_base=5.0), inputs)


# ---- closed forms


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_without_scale_and_gate_it_is_scaled_dot_product_attention(groups, dtype):
    inputs = make_inputs(Shape(2, BLOCK + 20, groups, 1, 32), dtype)
    q, k, v = (x.detach().double().transpose(1, 2) for x in inputs)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_matches_reference("o", run(hype_attention, inputs), expected.transpose(1, 2))


@pytest.mark.parametrize("shape", [Shape(1, 512, 9, 1, 64), Shape(2, 300, 4, 4, 64), Shape(1, 100, 32, 2, 32)], ids=str)
def test_float32_is_as_accurate_as_torchs(shape):
    """The gradients of a key of grouped queries are sums over thousands of terms."""

    def torchs(q, k, v, gate):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return o.transpose(1, 2)

    inputs = make_inputs(shape, torch.float32)
    do = torch.randn_like(inputs[0])
    expected = run_with_gradients(torchs, inputs, do.double())
    results, others = (run_with_gradients(attention, inputs, do) for attention in (hype_attention, torchs))
    for name, x in results.items():
        assert_as_accurate(name, x, others[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_token_returns_its_gated_value(dtype):
    q, k, v, gate = make_inputs(Shape(3, 1, 4, 2, 20), dtype, gate=True)
    expected = v.double().repeat_interleave(2, dim=2) * gate.double().sigmoid()
    assert_matches_reference("o", hype_attention(q, k, v, gate=gate, logit_scale_base=2.0), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_constant_values_return_themselves(dtype):
    q, k, v = make_inputs(Shape(1, 2 * BLOCK + 3, 2, 1, 40), dtype)
    v = v[:, :1].expand_as(v)
    expected = v.double().repeat_interleave(2, dim=2)
    assert_matches_reference("o", hype_attention(q, k, v, logit_scale_base=10.0), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1.0, 1e3], ids=["small logits", "large logits"])
def test_identical_keys_average_the_values(size, dtype):
    q, k, v = make_inputs(Shape(1, 2 * BLOCK + 3, 2, 2, 48), dtype)
    k = (k[:, :1] * size).expand_as(k)
    counts = torch.arange(1, v.shape[1] + 1, dtype=torch.float64)
    expected = v.double().cumsum(1) / counts[:, None, None]
    assert_matches_reference("o", hype_attention(q * size, k, v, logit_scale_base=10.0), expected)


@pytest.mark.parametrize("gate_value", [-200.0, 200.0])
def test_the_gate_saturates(gate_value):
    q, k, v = (x.detach().float() for x in make_inputs(Shape(1, 10, 2, 1, 20)))
    gate = torch.full_like(q, gate_value).requires_grad_()
    o = hype_attention(q, k, v, gate=gate)
    open_gate = hype_attention(q, k, v)
    assert torch.equal(o, open_gate if gate_value > 0 else torch.zeros_like(o))
    assert (torch.autograd.grad(o.sum(), gate)[0] == 0).all()


# ---- one call or several


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("offset", [1, BLOCK, BLOCK + 30])
def test_continuation_is_the_tail_of_the_whole(offset, dtype):
    q, k, v, gate = make_inputs(Shape(2, 2 * BLOCK + 7, 4, 2, 32), dtype, gate=True)
    whole = hype_attention(q.double(), k.double(), v.double(), gate=gate.double(), logit_scale_base=30.0)
    tail = hype_attention(q[:, offset:], k, v, gate=gate[:, offset:], logit_scale_base=30.0, query_offset=offset)
    assert_matches_reference("o", tail, whole[:, offset:].detach())


def make_continuations(dtype, H=4, HK=2, D=16):
    """Return q, k, v, gate, cu_seqlens and offsets of packed sequences that continue caches with unused rows of NaN."""
    bounds, offsets, capacity = [0, 0, 5, BLOCK + 5, BLOCK + 6, 2 * BLOCK + 20], [7, 0, BLOCK + 3, 150, 1], 200
    q, gate = torch.randn(2, 1, bounds[-1] + 3, H, D, dtype=dtype).unbind()
    k, v = torch.randn(2, len(offsets), capacity, HK, D, dtype=dtype).unbind()
    for n, offset in enumerate(offsets):
        k[n, offset + bounds[n + 1] - bounds[n] :] = v[n, offset + bounds[n + 1] - bounds[n] :] = torch.nan
    return q, k, v, gate, torch.tensor(bounds), torch.tensor(offsets, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences_continue_caches(dtype):
    """Each is bit for bit as alone, where q and the caches may have any strides; behind the last one o is 0."""
    q, k, v, gate, cu_seqlens, offsets = make_continuations(dtype)
    wide = torch.randn(1, q.shape[1], q.shape[2], 2 * q.shape[3], dtype=dtype)
    wide[..., : q.shape[3]] = q
    options = {"logit_scale_base": 9.0, "query_offset": offsets, "cu_seqlens": cu_seqlens}
    for inputs in ((q, k, v, gate), (wide[..., : q.shape[3]], k.mT.contiguous().mT, v.mT.contiguous().mT, gate)):
        o = run(hype_attention, inputs, **options)
        bounds = cu_seqlens.tolist()
        for n, offset in enumerate(offsets.tolist()):
            i, j = bounds[n], bounds[n + 1]
            own = [q[:, i:j], *(x[n : n + 1, : offset + j - i] for x in (k, v)), gate[:, i:j]]
            alone = run(hype_attention, own, logit_scale_base=9.0, query_offset=offset)
            assert torch.equal(o[:, i:j], alone), n
        assert (o[:, bounds[-1] :] == 0).all()
    if dtype in (torch.float64, torch.float32):
        inputs = [x.double() for x in (q, k, v, gate)]
        assert_matches_reference("o", o, run(reference.hype_attention, inputs, **options))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_sequences_are_each_alone(index_dtype):
    bounds = [0, 0, 5, BLOCK + 5, BLOCK + 5, 2 * BLOCK + 20, 2 * BLOCK + 20]
    inputs = make_inputs(Shape(1, bounds[-1], 4, 2, 16), gate=True)
    do = torch.randn_like(inputs[0])
    options = {"logit_scale_base": 9.0}
    packed = run_with_gradients(
        hype_attention, inputs, do, cu_seqlens=torch.tensor(bounds, dtype=index_dtype), **options
    )
    for i, j in itertools.pairwise(bounds):
        alone = run_with_gradients(hype_attention, [x[:, i:j] for x in inputs], do[:, i:j], **options)
        for name, x in alone.items():
            assert torch.equal(packed[name][:, i:j], x), name


def test_packed_matches_reference():
    inputs = make_inputs(Shape(1, BLOCK + 30, 4, 1, 20), torch.float32, gate=True)
    bounds = torch.tensor([0, 1, 1, 40, BLOCK + 30], dtype=torch.int32)
    assert_op_matches_reference(inputs, cu_seqlens=bounds, logit_scale_base=9.0)


TAILS = [(30, 0, BLOCK), (BLOCK, BLOCK), (0, 1), (0, 0), ()]  # lengths of sequences before the tail


def check_tail(lengths, total, shape, dtype, device="cpu", gated=True):
    """Rows after the last sequence are zero, whatever they hold, and change nothing before them."""
    end, options = sum(lengths), {"logit_scale_base": 9.0}
    inputs = [x.detach().to(device) for x in make_inputs(shape._replace(T=total), dtype, gated)]
    do = torch.randn(inputs[0].shape, dtype=dtype).to(device)
    options["cu_seqlens"] = bounds(*lengths).to(device)
    expected = run_with_gradients(hype_attention, [x[:, :end] for x in inputs], do[:, :end], **options)
    for x in (*inputs, do):
        x[:, end:] = torch.nan
    results = run_with_gradients(hype_attention, inputs, do, **options)
    assert len(results) == 5 if gated else 4
    for name, x in results.items():
        assert x[:, :end].equal(expected[name]) and (x[:, end:] == 0).all() and x.shape[1] == total > end, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", TAILS, ids=str)
def test_sequences_that_end_before_T(lengths, dtype):
    check_tail(lengths, sum(lengths) + BLOCK + 9, Shape(1, 0, 4, 2, 16), dtype)
    check_tail(lengths, sum(lengths) + 1, Shape(1, 0, 2, 2, 20), dtype, gated=False)


def test_a_tail_matches_the_reference():
    inputs = make_inputs(Shape(1, BLOCK + 30, 4, 1, 20), torch.float32, gate=True)
    assert_op_matches_reference(inputs, cu_seqlens=torch.tensor([0, 1, 1, 40, BLOCK]), logit_scale_base=9.0)


def test_every_saved_tensor_has_a_zero_tail():
    q, k, v, gate = (x.detach() for x in make_inputs(Shape(1, 80, 4, 2, 16), gate=True))
    results = torch.ops.hypenet.hype_attention_saving(q, k, v, gate, bounds(30, 20), None, 0.25, 0)
    o, o_ungated, lse = results
    assert all((x[:, 50:] == 0).all() for x in (o, o_ungated)) and (lse[:, :, 50:] == 0).all()
    assert all(x.ne(0).all() for x in (o[:, :50], o_ungated[:, :50]))


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_tail_with_any_number_of_threads(threads, restore_threads):
    """One pass over the gradients and two."""
    torch.set_num_threads(threads)
    check_tail((BLOCK + 9, 5), 3 * BLOCK, Shape(1, 0, 2, 1, 32), torch.float32)


@pytest.mark.parametrize("B, T, S", [(0, 5, 5), (2, 0, 0), (2, 0, 7)])
def test_empty_problems(B, T, S):
    q = torch.randn(B, T, 4, 8, requires_grad=True)
    k, v = (torch.randn(B, S, 2, 8, requires_grad=True) for _ in range(2))
    gate = torch.randn_like(q, requires_grad=True)
    o = hype_attention(q, k, v, gate=gate, query_offset=S - T)
    assert o.shape == q.shape
    for x, dx in zip((q, k, v, gate), torch.autograd.grad(o.sum(), (q, k, v, gate)), strict=True):
        assert dx.shape == x.shape
        assert (dx == 0).all()


def test_only_empty_sequences():
    q = torch.randn(1, 0, 4, 8)
    assert hype_attention(q, q, q, cu_seqlens=torch.tensor([0, 0, 0])).shape == q.shape


# ---- layouts


def fused(B, T, H, HK, D):
    """q, k, v as slices of one projection."""
    projection = torch.randn(B, T, (H + 2 * HK) * D)
    return [x.unflatten(-1, (-1, D)) for x in projection.split([H * D, HK * D, HK * D], dim=-1)]


def head_major(B, T, H, HK, D):
    return [torch.randn(B, heads, T, D).transpose(1, 2) for heads in (H, HK, HK)]


def dim_major(B, T, H, HK, D):
    return [torch.randn(B, T, D, heads).transpose(2, 3) for heads in (H, HK, HK)]


def one_batch_for_all(B, T, H, HK, D):
    return [torch.randn(1, T, heads, D).expand(B, -1, -1, -1) for heads in (H, HK, HK)]


@pytest.mark.parametrize("layout", [fused, head_major, dim_major, one_batch_for_all])
def test_any_strides(layout):
    inputs = layout(2, BLOCK + 3, 4, 2, 24)
    inputs.append(inputs[0].flip(1).transpose(1, 2).contiguous().transpose(1, 2))
    strided = [x.detach().requires_grad_() for x in inputs]
    packed = [x.detach().contiguous().requires_grad_() for x in inputs]
    o, expected = run(hype_attention, strided), run(hype_attention, packed)
    assert not strided[0].is_contiguous()
    assert torch.equal(o, expected)
    do = torch.randn(2, 24, 4, BLOCK + 3).permute(0, 3, 2, 1)
    gradients = torch.autograd.grad(o, strided, do)
    for dx, expected_dx in zip(gradients, torch.autograd.grad(expected, packed, do.contiguous()), strict=True):
        assert torch.equal(dx, expected_dx)


def test_expanded_output_gradient():
    inputs = make_inputs(Shape(1, 20, 4, 2, 8))
    gradients = torch.autograd.grad(run(hype_attention, inputs).sum(), inputs)
    o = run(hype_attention, inputs)
    for dx, expected in zip(gradients, torch.autograd.grad(o, inputs, torch.ones_like(o)), strict=True):
        assert torch.equal(dx, expected)


# ---- extreme values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_in_the_thousands(dtype):
    shape = Shape(1, 2 * BLOCK + 7, 2, 1, 64)
    inputs = make_inputs(shape, dtype)
    inputs[0] = inputs[0].detach() * 3000
    logits = torch.einsum("bthd,bsgd->bhts", inputs[0], inputs[1]) * shape.D**-0.5
    assert logits.max() > 1e4
    assert logits.min() < -1e4
    q, k, v = inputs
    expected = reference.hype_attention(q.double(), k.double(), v.double())
    eager = None if dtype == torch.float64 else reference.hype_attention(q, k, v)
    assert_matches_reference("o", hype_attention(q, k, v), expected, eager)
    gradients = run_with_gradients(hype_attention, inputs, torch.randn_like(q))
    assert all(x.isfinite().all() for x in gradients.values())


def test_rising_maxima_over_many_blocks():
    q, k, v = (x.detach() for x in make_inputs(Shape(1, 4 * BLOCK, 1, 1, 8)))
    q[:], k[:] = 1, torch.linspace(-300, 300, 4 * BLOCK, dtype=k.dtype)[:, None, None]
    for keys in (k, k.flip(1)):
        assert_matches_reference("o", hype_attention(q, keys, v), reference.hype_attention(q, keys, v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_logits_far_above_the_visible_ones(dtype):
    """Further than exp has values for: they are computed and thrown away."""
    inputs = make_inputs(Shape(1, BLOCK - 3, 2, 1, 16), dtype)
    q, k = (x.data for x in inputs[:2])
    q.abs_()
    q[:, -1], k[:, -1] = 0, 1000  # what only the last query sees, and weighs as the others
    assert (q[0, :-1] @ k[0, -1, 0] * 16**-0.5 > 1000).all()
    assert_op_matches_reference(inputs)


def test_attention_is_causal():
    q, k, v = (x.detach() for x in make_inputs(Shape(1, 2 * BLOCK, 2, 1, 16)))
    before = hype_attention(q, k, v)
    seen = BLOCK + 10
    k[:, seen:], v[:, seen:] = float("inf"), 1e300
    assert torch.equal(hype_attention(q, k, v)[:, :seen], before[:, :seen])


def test_nan_stays_in_its_sequence():
    bounds = torch.tensor([0, 10, 30, 45])
    inputs = make_inputs(Shape(1, 45, 2, 1, 16), gate=True)
    poisoned = [x.detach().clone().requires_grad_() for x in inputs]
    for x in poisoned:
        x.data[:, 10:30] = float("nan")
    do = torch.randn_like(inputs[0])
    clean = run_with_gradients(hype_attention, inputs, do, cu_seqlens=bounds)
    for name, x in run_with_gradients(hype_attention, poisoned, do, cu_seqlens=bounds).items():
        assert x[:, 10:30].isnan().all()
        assert torch.equal(x[:, :10], clean[name][:, :10])
        assert torch.equal(x[:, 30:], clean[name][:, 30:])


# ---- determinism


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [Shape(1, 3 * BLOCK + 5, 2, 1, 32), Shape(2, 2 * BLOCK, 6, 3, 16, 17)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape, dtype, restore_threads):
    """With one key head and several threads the backward computes dq separately from dk and dv."""
    inputs = make_inputs(shape, dtype, gate=True)
    do = torch.randn(inputs[0].shape, dtype=dtype)
    results = []
    for threads in (1, 1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run_with_gradients(hype_attention, inputs, do, query_offset=shape.query_offset))
    for result in results[1:]:
        for name, x in result.items():
            assert torch.equal(x, results[0][name]), name


# ---- as a PyTorch op


def op_arguments(gate, packed):
    q, k, v, *gates = make_inputs(Shape(1, 20, 4, 2, 8), torch.float32, gate)
    bounds = torch.tensor([0, 7, 20]) if packed else None
    return q, k, v, gates[0] if gates else None, bounds, 9.0, 0.4, 0


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(gate, packed):
    arguments = op_arguments(gate, packed)
    torch.library.opcheck(torch.ops.hypenet.hype_attention.default, arguments)
    with torch.no_grad():
        q, k, v, gate, bounds, *options = arguments
        inputs = [None if x is None else x.detach() for x in (q, k, v, gate)]
        torch.library.opcheck(torch.ops.hypenet.hype_attention_inference.default, (*inputs, bounds, *options))
        o, o_ungated, lse = torch.ops.hypenet.hype_attention.default(*arguments)
        saved = o if gate is None else o_ungated
        arguments = (inputs[0], saved, lse, *inputs, bounds, *options)
        torch.library.opcheck(torch.ops.hypenet.hype_attention_bwd.default, arguments)


def test_opcheck_of_packed_continuations():
    q, k, v, gate, cu_seqlens, offsets = make_continuations(torch.float64)
    for arguments in ((q, k, v, None, cu_seqlens, offsets, None, 0.3), (q, k, v, gate, cu_seqlens, offsets, 9.0, 0.3)):
        torch.library.opcheck(torch.ops.hypenet.hype_attention_cached.default, arguments)


@pytest.mark.parametrize("options", [{}, {"logit_scale_base": 9.0, "query_offset": 0}], ids=["plain", "scaled"])
def test_compiles_without_a_graph_break(options):
    inputs = make_inputs(Shape(2, BLOCK + 6, 4, 2, 8), torch.float32, gate=True)
    do = torch.randn_like(inputs[0])
    compiled = torch.compile(hype_attention, fullgraph=True, backend="aot_eager")
    expected = run_with_gradients(hype_attention, inputs, do, **options)
    for name, x in run_with_gradients(compiled, inputs, do, **options).items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("wanted", range(4), ids=["dq", "dk", "dv", "dgate"])
def test_a_second_derivative_raises(wanted):
    """Also if the second derivative is with respect to a single input, and the loss has other terms."""
    inputs = make_inputs(Shape(1, 5, 2, 1, 4), gate=True)
    o = run(hype_attention, inputs, logit_scale_base=3.0)
    gradient = torch.autograd.grad(o.sum(), inputs, create_graph=True)[wanted]
    with pytest.raises(NotImplementedError, match=r"^hype_attention: .* second derivative"):
        (o.sum() + gradient.square().sum()).backward()


def test_gradients_of_some_inputs_only():
    q, k, v, gate = make_inputs(Shape(1, 30, 4, 2, 8), gate=True)
    (expected,) = torch.autograd.grad(hype_attention(q, k, v, gate=gate).sum(), v)
    (dv,) = torch.autograd.grad(hype_attention(q.detach(), k.detach(), v, gate=gate.detach()).sum(), v)
    assert torch.equal(dv, expected)


# ---- errors

Q, KV, PACKED = (2, 6, 4, 8), (2, 6, 2, 8), (1, 6, 4, 8)


def ones(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


def packed_error(error, rule, cu_seqlens, **changes):
    arguments = {"q": ones(*PACKED), "k": ones(1, 6, 2, 8), "v": ones(1, 6, 2, 8), "cu_seqlens": cu_seqlens}
    return arguments | changes, error, f"cu_seqlens must {rule}"


ERRORS = {
    "q no tensor": ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
    "gate no tensor": ({"gate": 1.0}, TypeError, "gate must be a tensor, got float"),
    "q rank": ({"q": ones(2, 6, 4)}, ValueError, r"q must have 4 dimensions \[B, T, H, D\], got \[2, 6, 4\]"),
    "k rank": ({"k": ones(2, 6, 2)}, ValueError, "k must have 4 dimensions"),
    "q integer": ({"q": ones(*Q, dtype=torch.int32)}, TypeError, "q must be float64 or .*, got int32"),
    "k dtype": ({"k": ones(*KV).double()}, TypeError, "k must have q's dtype torch.float32, got torch.float64"),
    "v dtype": ({"v": ones(*KV).double()}, TypeError, "v must have k's dtype torch.float32, got torch.float64"),
    "gate dtype": ({"gate": ones(*Q).double()}, TypeError, "gate must have q's dtype"),
    "k device": ({"k": ones(*KV, device="meta")}, ValueError, "k must be on q's device cpu, got meta"),
    "gate device": ({"gate": ones(*Q, device="meta")}, ValueError, "gate must be on q's device cpu, got meta"),
    "no head dimension": (
        {"q": ones(2, 6, 4, 0), "k": ones(2, 6, 2, 0), "v": ones(2, 6, 2, 0)},
        ValueError,
        "q must have a head dimension of at least 1",
    ),
    "heads": ({"q": ones(2, 6, 3, 8)}, ValueError, "number of heads must be a multiple of k's = 2, got 3"),
    "no key heads": ({"k": ones(2, 6, 0, 8)}, ValueError, "number of heads must be a multiple of k's = 0, got 4"),
    "k batch": ({"k": ones(1, 6, 2, 8)}, ValueError, r"k must have shape \[2, 6, 2, 8\], got \[1, 6, 2, 8\]"),
    "k head dimension": ({"k": ones(2, 6, 2, 4)}, ValueError, r"k must have shape \[2, 6, 2, 8\]"),
    "k length": ({"k": ones(2, 9, 2, 8)}, ValueError, r"k must have shape \[2, 6, 2, 8\], got \[2, 9, 2, 8\]"),
    "v shape": ({"v": ones(2, 6, 1, 8)}, ValueError, r"v must have k's shape \[2, 6, 2, 8\], got \[2, 6, 1, 8\]"),
    "gate shape": ({"gate": ones(2, 6, 4, 1)}, ValueError, r"gate must have q's shape \[2, 6, 4, 8\]"),
    "offset": ({"query_offset": 3}, ValueError, r"k must have shape \[2, 9, 2, 8\], got \[2, 6, 2, 8\]"),
    "negative offset": ({"query_offset": -1}, ValueError, "query_offset must be at least 0, got -1"),
    "base of one": ({"logit_scale_base": 1.0}, ValueError, "logit_scale_base must be greater than 1 .*, got 1.0"),
    "base of nan": ({"logit_scale_base": float("nan")}, ValueError, "logit_scale_base must be greater than 1"),
    "infinite base": ({"logit_scale_base": float("inf")}, ValueError, "logit_scale_base must be .* finite, got inf"),
    "base of letters": ({"logit_scale_base": "e"}, TypeError, "logit_scale_base must be a number, got str"),
    "scale of letters": ({"scale": "1"}, TypeError, "scale must be a number, got str"),
    "two scales": ({"scale": ones(2)}, ValueError, "scale must be one real number"),
    "scale wants a gradient": ({"scale": ones().requires_grad_()}, ValueError, "scale must be .* requires no grad"),
    "offsets without bounds": (
        {"query_offset": torch.tensor([0])},
        ValueError,
        r"query_offset must be an integer without cu_seqlens, got \[1\]",
    ),
    "offset of a float": ({"query_offset": 0.0}, TypeError, "query_offset must be an integer, got float"),
    "packed batch": (
        {"cu_seqlens": torch.tensor([0, 6])},
        ValueError,
        "q must have batch size 1 with cu_seqlens .*, got 2",
    ),
    "packed offset": (
        {"q": ones(*PACKED), "cu_seqlens": torch.tensor([0, 6]), "query_offset": 2},
        ValueError,
        "query_offset must be 0 with cu_seqlens, got 2",
    ),
    "packed falling": packed_error(ValueError, "rise from 0 to at most T = 6", torch.tensor([0, 4, 2, 6])),
    "packed start": packed_error(ValueError, "rise from 0 to at most T = 6", torch.tensor([1, 6])),
    "packed end": packed_error(ValueError, "rise from 0 to at most T = 6", torch.tensor([0, 7])),
    "packed float": packed_error(TypeError, "be int32 or int64, got float32", torch.tensor([0.0, 6.0])),
    "packed rank": packed_error(ValueError, "have 1 dimensions", torch.tensor([[0, 6]])),
    "packed nothing": packed_error(ValueError, "have at least one entry", torch.tensor([], dtype=torch.int64)),
}


@pytest.mark.parametrize("changes, error, message", ERRORS.values(), ids=ERRORS.keys())
def test_refuses(changes, error, message):
    arguments = {"q": ones(*Q), "k": ones(*KV), "v": ones(*KV)} | changes
    with pytest.raises(error, match=f"^hype_attention: .*{message}"):
        hype_attention(**arguments)


CONTINUATION_ERRORS = {
    "too long": ({"query_offset": torch.tensor([7, 0, 195, 150, 1])}, ValueError, r"capacity of 200, got \[7, 0, 195"),
    "negative": ({"query_offset": torch.tensor([7, 0, -1, 150, 1])}, ValueError, r"query_offset must be at least 0"),
    "too few": ({"query_offset": torch.tensor([7, 0])}, ValueError, r"query_offset must have shape \[5\], got \[2\]"),
    "floats": ({"query_offset": torch.zeros(5)}, TypeError, "query_offset must be int32 or int64, got float32"),
    "another cache": ({"v": torch.zeros(5, 199, 2, 16)}, ValueError, "v must have k's shape"),
    "caches of others": ({"k": torch.zeros(4, 200, 2, 16)}, ValueError, r"k must have shape \[5, 200, 2, 16\]"),
    "gradient": (
        {"k": torch.zeros(5, 200, 2, 16, requires_grad=True)},
        ValueError,
        "k must not require grad with a tensor as query_offset",
    ),
}


@pytest.mark.parametrize("name", CONTINUATION_ERRORS)
def test_errors_of_packed_continuations(name):
    change, kind, message = CONTINUATION_ERRORS[name]
    q, k, v, gate, cu_seqlens, offsets = make_continuations(torch.float32)
    given = {"q": q, "k": k, "v": v, "gate": gate, "cu_seqlens": cu_seqlens, "query_offset": offsets} | change
    with pytest.raises(kind, match=message):
        hype_attention(**given)
