"""Tests that every recurrence over whole sequences must pass; a test file subclasses SequenceOp for each op."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from compare import assert_matches_reference
from torch.autograd import forward_ad

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DECAYS = ("none", "mild", "strong", "lowest", "reset", "mixture")


@dataclass(frozen=True)
class Shape:
    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int

    def __str__(self):
        return "-".join(f"{name}{size}" for name, size in vars(self).items())


# Chunks are 16 tokens long where K + V < 128, else 32.
SHAPES = (
    Shape(2, 1, 2, 2, 16, 16),  # one token
    Shape(1, 15, 1, 1, 16, 16),  # one short of a chunk
    Shape(1, 16, 1, 1, 16, 16),  # a chunk
    Shape(2, 17, 1, 3, 16, 16),  # one more; value heads in groups
    Shape(1, 31, 1, 1, 64, 64),  # the same around a long chunk
    Shape(1, 32, 1, 1, 64, 64),
    Shape(1, 33, 1, 1, 64, 64),
    Shape(2, 71, 2, 4, 64, 96),  # two long chunks and 7; K < V
    Shape(1, 39, 2, 2, 33, 5),  # two chunks and 7; odd sizes, K > V
    Shape(1, 70, 1, 1, 100, 260),  # more columns than a panel
    Shape(1, 1000, 1, 2, 16, 16),  # more chunks than a segment of the backward has
)
ORDINARY = Shape(2, 71, 2, 4, 24, 40)
TINY = Shape(1, 19, 1, 2, 4, 3)  # gradcheck: T just past a chunk


def decay(kind, *size):
    if kind == "none":
        return torch.zeros(size)
    if kind == "mild":
        return -0.3 * torch.rand(size)
    if kind == "strong":
        return -8 - torch.rand(size)
    if kind == "lowest":
        return torch.full(size, -50.0)
    if kind == "reset":
        return torch.full(size, -torch.inf)
    values = torch.tensor([0.0, -1e-4, -0.5, -8.0, -50.0, -torch.inf])
    return values[torch.multinomial(torch.tensor([6.0, 6.0, 6.0, 1.0, 1.0, 1.0]), torch.Size(size).numel(), True)].view(
        size
    )


def make_inputs(shape, delta, dtype=torch.float32, decay_kind="mild", N=None):
    """Return the arguments of an op by name: q, k, v in dtype; g, beta, initial_state in the accumulation type."""
    s, wide = shape, torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        "q": torch.randn(s.B, s.T, s.H, s.K).to(dtype),
        "k": torch.nn.functional.normalize(torch.randn(s.B, s.T, s.H, s.K), dim=-1).to(dtype),
        "v": torch.randn(s.B, s.T, s.HV, s.V).to(dtype),
        "g": decay(decay_kind, s.B, s.T, s.HV).to(wide),
    }
    if delta:
        inputs["beta"] = torch.rand(s.B, s.T, s.HV).to(wide)
    inputs["initial_state"] = torch.randn(s.B if N is None else N, s.HV, s.K, s.V).to(wide)
    return inputs


def raise_some_betas(beta, chunk=64):
    """Add 1 to every fifth beta of two heads: in chunk 0 of the first, 1 of the second, 2 of both, 3 of none, ..."""
    for first in range(0, beta.shape[1], chunk):
        which = first // chunk % 4
        heads = [head for head in (0, 1) if which in (head, 2)]
        beta[:, first + 2 : first + chunk : 5, heads] += 1


def in_double(inputs):
    return {name: x.double() if torch.is_floating_point(x) else x for name, x in inputs.items()}


def cotangents(inputs, size=1.0):
    v, state = inputs["v"], inputs["initial_state"]
    return size * torch.randn_like(v), size * torch.randn_like(state)


def forward(op, inputs, **options):
    return op(**inputs, output_final_state=True, **options)


def gradients(op, inputs, do, dfinal_state, **options):
    """Return the gradients of <o, do> + <final_state, dfinal_state> by name."""
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.items() if torch.is_floating_point(x)}
    o, final_state = forward(op, {**inputs, **leaves}, **options)
    values = torch.autograd.grad((o, final_state), list(leaves.values()), (do.to(o), dfinal_state.to(final_state)))
    return dict(zip(leaves, values, strict=True))


def rounded(reference, dtype):
    """Return the result of an eager implementation that computes exactly and rounds once; None in high precision."""
    return reference.to(dtype).double() if dtype in (torch.bfloat16, torch.float16) else None


def assert_forward(op, reference, inputs, **options):
    results = dict(zip(("o", "final_state"), forward(op, inputs, **options), strict=True))
    expected = dict(zip(results, forward(reference, in_double(inputs), **options), strict=True))
    for name, result in results.items():
        assert_matches_reference(name, result, expected[name], eager=rounded(expected[name], result.dtype))


def assert_gradients(op, reference, inputs, negligible=(), size=1.0, **options):
    """Compare all gradients. negligible: those below e^-50 in the reference too. size: scale of do, dfinal_state."""
    do, dfinal_state = cotangents(inputs, size)
    results = gradients(op, inputs, do, dfinal_state, **options)
    expected = gradients(reference, in_double(inputs), do.double(), dfinal_state.double(), **options)
    for name, result in results.items():
        assert result.dtype == inputs[name].dtype
        if name in negligible:
            assert result.abs().max() < 1e-15 and expected[name].abs().max() < 1e-15
        else:
            eager = rounded(expected[name], result.dtype)
            assert_matches_reference(f"d{name}", result, expected[name], eager=eager)


def bounds(*lengths, dtype=torch.int64):
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0).to(dtype)


def arguments(inputs):
    """The tensors of an op's schema up to initial_state, in its order; simple GLA has no beta."""
    return [inputs.get(name) for name in ("q", "k", "v", "g", "beta", "initial_state")]


class SequenceOp:
    """Subclasses define op, reference and name."""

    delta = True

    @pytest.fixture
    def restore_threads(self):
        threads = torch.get_num_threads()
        yield
        torch.set_num_threads(threads)

    def inputs(self, shape, *args, **kwargs):
        return make_inputs(shape, self.delta, *args, **kwargs)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_forward(self, shape, dtype):
        assert_forward(self.op, self.reference, self.inputs(shape, dtype))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [s for s in SHAPES if s.T < 100], ids=str)
    def test_every_gradient(self, shape, dtype):
        assert_gradients(self.op, self.reference, self.inputs(shape, dtype))

    @pytest.mark.parametrize("kind", DECAYS)
    def test_decay(self, kind):
        inputs = self.inputs(ORDINARY, decay_kind=kind)
        assert_forward(self.op, self.reference, inputs)
        negligible = ("g", "initial_state") if kind in ("lowest", "reset") else ()
        assert_gradients(self.op, self.reference, inputs, negligible, size=1e3)

    def test_decay_below_the_lowest_has_no_gradient_and_no_nan(self):
        inputs = self.inputs(ORDINARY, decay_kind="mixture")
        lowest = inputs["g"] < -50
        assert 0 < lowest.sum() < lowest.numel()
        grads = gradients(self.op, inputs, *cotangents(inputs))
        assert all(x.isfinite().all() for x in grads.values())
        assert (grads["g"][lowest] == 0).all()

    def test_without_initial_state_it_starts_from_zero(self):
        inputs = self.inputs(ORDINARY)
        zero = {**inputs, "initial_state": torch.zeros_like(inputs["initial_state"])}
        none = {**inputs, "initial_state": None}
        for a, b in zip(forward(self.op, zero), forward(self.op, none), strict=True):
            assert a.equal(b)

    def test_final_state_is_returned_only_on_request(self):
        inputs = self.inputs(ORDINARY)
        o, final_state = self.op(**inputs)
        assert final_state is None and o.equal(forward(self.op, inputs)[0])

    def test_unused_outputs_have_zero_gradient(self):
        inputs = self.inputs(ORDINARY)
        do, dfinal_state = cotangents(inputs)
        leaves = [x.requires_grad_() for x in inputs.values()]
        o, final_state = forward(self.op, inputs)
        both = torch.autograd.grad((o, final_state), leaves, (do, dfinal_state), retain_graph=True)
        only_o = torch.autograd.grad(o, leaves, do, retain_graph=True)
        only_state = torch.autograd.grad(final_state, leaves, dfinal_state, allow_unused=True)
        for total, x, y in zip(both, only_o, only_state, strict=True):
            assert_matches_reference("sum of the parts", x + y, total.double(), dtype=torch.float32)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
    def test_packed_sequences_are_each_alone(self, dtype):
        lengths = (5, 0, 33, 1, 32, 0)
        inputs = self.inputs(Shape(1, sum(lengths), 2, 4, 24, 40), N=len(lengths))
        do, dfinal_state = cotangents(inputs)
        cu_seqlens = bounds(*lengths, dtype=dtype)
        o, final_state = forward(self.op, inputs, cu_seqlens=cu_seqlens)
        grads = gradients(self.op, inputs, do, dfinal_state, cu_seqlens=cu_seqlens)
        for n, (start, stop) in enumerate(pairwise(cu_seqlens)):
            alone = {name: x[:, start:stop] for name, x in inputs.items()}
            alone["initial_state"] = inputs["initial_state"][n : n + 1]
            o_alone, state_alone = forward(self.op, alone)
            assert o[:, start:stop].equal(o_alone) and final_state[n].equal(state_alone[0])
            grads_alone = gradients(self.op, alone, do[:, start:stop], dfinal_state[n : n + 1])
            for name, x in grads_alone.items():
                part = grads[name][n : n + 1] if name == "initial_state" else grads[name][:, start:stop]
                assert part.equal(x), name

    @pytest.mark.parametrize("split", [1, 16, 37])
    def test_two_calls_carrying_the_state_are_one(self, split):
        inputs = self.inputs(ORDINARY, torch.float64)
        o, final_state = forward(self.op, inputs)
        first = {name: x[:, :split] for name, x in inputs.items()} | {"initial_state": inputs["initial_state"]}
        o_first, state = forward(self.op, first)
        second = {name: x[:, split:] for name, x in inputs.items()} | {"initial_state": state}
        o_second, state = forward(self.op, second)
        assert_matches_reference("o", torch.cat([o_first, o_second], dim=1), o)
        assert_matches_reference("final_state", state, final_state)

    def test_any_strides(self):
        s = ORDINARY
        fused = torch.randn(s.B, s.T, 2 * s.H * s.K + s.HV * s.V + 3)
        q, k, v, _ = fused.split([s.H * s.K, s.H * s.K, s.HV * s.V, 3], dim=-1)
        k = torch.nn.functional.normalize(k.unflatten(-1, (s.H, s.K)), dim=-1)
        inputs = self.inputs(s)
        strided = {
            **inputs,
            "q": q.unflatten(-1, (s.H, s.K)),
            "k": k.transpose(1, 2).contiguous().transpose(1, 2),
            "v": v.unflatten(-1, (s.HV, s.V)),
            "g": inputs["g"].transpose(0, 2).contiguous().transpose(0, 2),
            "initial_state": inputs["initial_state"].mT.contiguous().mT,
        }
        if self.delta:
            strided["beta"] = inputs["beta"][:1, :1, :1].expand(s.B, s.T, s.HV)
        assert not any(x.is_contiguous() for x in strided.values())
        contiguous = {name: x.contiguous() for name, x in strided.items()}
        do, dfinal_state = cotangents(inputs)
        for a, b in zip(forward(self.op, strided), forward(self.op, contiguous), strict=True):
            assert a.equal(b)
        strided_do = do.transpose(1, 3).contiguous().transpose(1, 3)
        strided_grads = gradients(self.op, strided, strided_do, dfinal_state.mT.contiguous().mT)
        for name, x in gradients(self.op, contiguous, do, dfinal_state).items():
            assert strided_grads[name].equal(x), name

    def test_bitwise_the_same_twice_and_for_any_number_of_threads(self, restore_threads):
        results = []
        few_heads = (Shape(1, 300, 1, 1, 64, 80), Shape(1, 100, 1, 2, 64, 96), Shape(1, 70, 1, 1, 33, 45))
        for shape in (*few_heads, Shape(3, 40, 2, 2, 16, 24)):
            inputs = self.inputs(shape)
            do, dfinal_state = cotangents(inputs)
            for threads in (1, 1, 2, 3, 7):
                torch.set_num_threads(threads)
                grads = gradients(self.op, inputs, do, dfinal_state)
                results.append((*forward(self.op, inputs), *grads.values()))
            for other in results[1:]:
                assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))
            results.clear()

    @pytest.mark.parametrize("packed", [False, True])
    def test_gradcheck(self, packed):
        inputs = self.inputs(TINY, torch.float64, N=3 if packed else None)
        names, leaves = inputs.keys(), [x.requires_grad_() for x in inputs.values()]
        options = {"cu_seqlens": bounds(17, 0, 2)} if packed else {}

        def run(*values):
            return forward(self.op, dict(zip(names, values, strict=True)), **options)

        assert torch.autograd.gradcheck(run, leaves)

    def test_second_derivative_raises(self):
        inputs = self.inputs(TINY, torch.float64)
        leaves = [x.requires_grad_() for x in inputs.values()]
        first = torch.autograd.grad(self.op(**inputs)[0].sum(), leaves[0], create_graph=True)[0]
        with pytest.raises(NotImplementedError, match="no second derivative"):
            first.sum().backward()

    def test_forward_mode_and_vmap_are_refused(self):
        x = self.inputs(TINY)
        refused = pytest.raises(NotImplementedError, match=f"^{self.name}: forward-mode derivatives .* not built")
        with refused:
            torch.func.jvp(lambda v: self.op(**{**x, "v": v})[0], (x["v"],), (torch.ones_like(x["v"]),))
        with refused, forward_ad.dual_level():
            self.op(**{**x, "v": forward_ad.make_dual(x["v"], torch.ones_like(x["v"]))})
        with refused:
            torch.func.vmap(lambda v: self.op(**{**x, "v": v})[0])(x["v"][None])

    def test_torch_func_grad_is_autograd(self):
        x = self.inputs(TINY)
        for name in x:
            found = torch.func.grad(lambda y, name=name: self.op(**{**x, name: y})[0].square().sum())(x[name])
            leaf = x[name].clone().requires_grad_()
            loss = self.op(**{**x, name: leaf})[0].square().sum()
            assert found.equal(torch.autograd.grad(loss, leaf)[0]), name

    def test_bounds_that_end_before_T_leave_zeros(self):
        inputs = self.inputs(Shape(1, 60, 2, 4, 24, 40), N=2)
        cu_seqlens, do = bounds(13, 30), torch.randn(1, 60, 4, 40)
        whole = {name: x if name == "initial_state" else x[:, :43] for name, x in inputs.items()}
        o, final_state = forward(self.op, inputs, cu_seqlens=cu_seqlens)
        o_whole, state_whole = forward(self.op, whole, cu_seqlens=cu_seqlens)
        assert o[:, :43].equal(o_whole) and (o[:, 43:] == 0).all() and final_state.equal(state_whole)
        found = gradients(self.op, inputs, do, torch.randn(2, 4, 24, 40), cu_seqlens=cu_seqlens)
        assert all((x[:, 43:] == 0).all() for name, x in found.items() if name != "initial_state")

    @pytest.mark.parametrize("B, T", [(0, 5), (2, 0), (0, 0)])
    def test_empty_problems(self, B, T):
        inputs = self.inputs(Shape(B, T, 1, 2, 8, 8))
        o, final_state = forward(self.op, inputs)
        assert o.shape == (B, T, 2, 8) and final_state.equal(inputs["initial_state"])
        grads = gradients(self.op, inputs, *cotangents(inputs))
        assert all(grads[name].shape == x.shape for name, x in inputs.items())

    def test_no_sequences(self):
        inputs = self.inputs(Shape(1, 0, 1, 2, 8, 8), N=0)
        o, final_state = forward(self.op, inputs, cu_seqlens=bounds())
        assert o.shape == (1, 0, 2, 8) and final_state.shape == (0, 2, 8, 8)

    def test_opcheck(self):
        inputs = self.inputs(TINY)
        for x in inputs.values():
            x.requires_grad_()
        for *tensors, state in (arguments(inputs), arguments(inputs | {"initial_state": None})):
            initial_state = None if state is None else state.detach()
            for cu_seqlens in (None, bounds(TINY.T)):
                args = (*tensors, initial_state, cu_seqlens, 0.5, 0)
                torch.library.opcheck(getattr(torch.ops.hypenet, self.name).default, args)
                args = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args)
                torch.library.opcheck(getattr(torch.ops.hypenet, f"{self.name}_inference").default, args)

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_compiles_to_one_graph(self, backend):
        inputs = self.inputs(ORDINARY)
        do, dfinal_state = cotangents(inputs)
        compiled = torch.compile(self.op, fullgraph=True, backend=backend)
        cu_seqlens = bounds(ORDINARY.T)
        packed = {name: x[:1] for name, x in inputs.items()}
        for a, b in zip(forward(compiled, packed, cu_seqlens=cu_seqlens), forward(self.op, packed), strict=True):
            assert a.equal(b)
        eager = gradients(self.op, inputs, do, dfinal_state)
        for name, x in gradients(compiled, inputs, do, dfinal_state).items():
            assert x.equal(eager[name])

    def test_meta_tensors_give_shapes(self):
        inputs = self.inputs(ORDINARY, torch.bfloat16)
        o, final_state = forward(self.op, {name: x.to("meta") for name, x in inputs.items()})
        assert (o.shape, o.dtype) == (inputs["v"].shape, torch.bfloat16)
        assert (final_state.shape, final_state.dtype) == (inputs["initial_state"].shape, torch.float32)

    def bad(self, error, message, **changes):
        inputs = self.inputs(ORDINARY) | changes
        with pytest.raises(error, match=f"^{self.name}: {message}"):
            self.op(**inputs)

    def test_wrong_kind(self):
        self.bad(TypeError, "q must be a tensor, got list", q=[1.0])
        self.bad(TypeError, "k must be a tensor, got NoneType", k=None)
        self.bad(TypeError, "v must be a tensor, got NoneType", v=None)
        self.bad(TypeError, "initial_state must be a tensor, got float", initial_state=0.0)
        self.bad(TypeError, "q must be float64 or .*, got int64", q=torch.zeros(2, 71, 2, 24, dtype=torch.int64))
        self.bad(TypeError, "k must be float64 or .*, got int64", k=torch.zeros(2, 71, 2, 24, dtype=torch.int64))
        self.bad(TypeError, "v must be float64 or .*, got bool", v=torch.zeros(2, 71, 4, 40, dtype=torch.bool))
        self.bad(TypeError, "k must be a dense tensor", k=torch.zeros(2, 71, 2, 24).to_sparse())
        self.bad(TypeError, "g must be float64 or .*, got int64", g=torch.zeros(2, 71, 4, dtype=torch.int64))
        self.bad(TypeError, "unexpected argument 'ouput_final_state'", ouput_final_state=True)

    def test_wrong_shape(self):
        self.bad(ValueError, r"q must have 4 dimensions \[B, T, H, K\], got \[2, 71, 24\]", q=torch.zeros(2, 71, 24))
        self.bad(ValueError, "q must have 4 dimensions", q=torch.tensor(1.0))
        self.bad(ValueError, r"k must have q's shape \[2, 71, 2, 24\]", k=torch.zeros(2, 71, 2, 23))
        self.bad(ValueError, r"v must have 4 dimensions", v=torch.zeros(2, 71, 4))
        self.bad(ValueError, r"v must have shape \[2, 71, 4, 40\], got \[2, 70, 4, 40\]", v=torch.zeros(2, 70, 4, 40))
        self.bad(ValueError, r"g must have shape \[2, 71, 4\], got \[2, 71, 2\]", g=torch.zeros(2, 71, 2))
        self.bad(ValueError, r"initial_state must have shape \[2, 4, 24, 40\]", initial_state=torch.zeros(2, 4, 40, 24))
        three = {"v": torch.zeros(2, 71, 3, 40), "g": torch.zeros(2, 71, 3)}
        self.bad(ValueError, "v's number of heads must be a multiple of q's number of heads = 2, got 3", **three)
        empty = torch.zeros(2, 71, 2, 0)
        self.bad(ValueError, "head dimensions must be at least 1, got K = 0", q=empty, k=empty)

    def test_wrong_numbers(self):
        self.bad(TypeError, "scale must be a number, got str", scale="0.5")
        self.bad(TypeError, "scale must be a number, got list", scale=[0.5])
        self.bad(ValueError, r"scale must be one real number .*, got a tensor of shape \[2\]", scale=torch.ones(2))
        self.bad(ValueError, "scale must be .* requires no grad", scale=torch.tensor(0.5, requires_grad=True))
        self.bad(TypeError, "checkpoint_every must be an integer, got float", checkpoint_every=64.0)
        self.bad(TypeError, "checkpoint_every must be an integer, got str", checkpoint_every="64")
        self.bad(ValueError, "checkpoint_every must be a positive multiple of 64, got 0", checkpoint_every=0)

    def test_numbers_of_any_type(self):
        inputs = self.inputs(ORDINARY)
        expected = self.op(**inputs, scale=2.0)[0]
        for scale in (2, torch.tensor(2.0), torch.tensor([2]), np.float32(2)):
            assert self.op(**inputs, scale=scale)[0].equal(expected), scale

    def test_a_contiguous_pool_in_the_other_layout(self):
        pool, slots = torch.zeros(3, 4, 40, 24), torch.tensor([2, 0])
        options = {"state_v_first": True, "state_indices": slots}
        rule = "initial_state must be a transposed view .* with state_v_first, got a contiguous one"
        self.bad(NotImplementedError, rule, initial_state=pool, **options)
        inputs = self.inputs(ORDINARY) | {"initial_state": pool.mT.contiguous().mT}
        assert self.op(**inputs, **options, output_final_state=True)[1].shape == pool.shape

    def test_wrong_bounds(self):
        for values in ([0, 5, 4, 71], [1, 71], [0, 72], [0, -3, 71], [5]):
            cu_seqlens = torch.tensor(values)
            packed = {name: x[:1] for name, x in self.inputs(ORDINARY).items()}
            packed["initial_state"] = None
            self.bad(ValueError, "cu_seqlens must rise from 0 to at most T = 71", **packed, cu_seqlens=cu_seqlens)
        self.bad(ValueError, "q must have batch size 1 with cu_seqlens", cu_seqlens=torch.tensor([0, 71]))
        self.bad(TypeError, "cu_seqlens must be int32 or int64, got float32", cu_seqlens=torch.tensor([0.0, 71.0]))
        self.bad(ValueError, "cu_seqlens must have 1 dimensions", cu_seqlens=torch.tensor([[0, 71]]))

    def test_wrong_device(self):
        self.bad(ValueError, "k must be on q's device cpu, got meta", k=torch.zeros(2, 71, 2, 24, device="meta"))
        self.bad(ValueError, "g must be on q's device cpu, got meta", g=torch.zeros(2, 71, 4, device="meta"))
