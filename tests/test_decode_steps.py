"""The decode steps of the gated delta rule and simple GLA: against the reference, in place, in a state pool."""

import pytest
import torch
from compare import assert_matches_reference
from recurrence_suite import DECAYS, DTYPES, Shape, forward, in_double, make_inputs, rounded

import hypenet_kernels
from hypenet_kernels import _native, reference

SHAPES = (
    Shape(1, 1, 1, 1, 16, 16),  # one head
    Shape(3, 1, 2, 6, 128, 128),  # a model's shape; value heads in groups
    Shape(2, 1, 1, 2, 33, 45),  # odd sizes
    Shape(1, 1, 1, 1, 7, 300),  # more columns than a panel
    Shape(2, 5, 2, 2, 24, 40),  # several tokens
)
ORDINARY = Shape(3, 2, 2, 4, 24, 40)


class StepOp:
    """Subclasses define op, reference, name and delta."""

    def inputs(self, shape, dtype=torch.float32, **options):
        inputs = make_inputs(shape, self.delta, dtype, **options)
        return inputs, inputs.pop("initial_state")

    def assert_step(self, inputs, state, **options):
        """Compare one step with the reference."""
        expected = dict(
            zip(
                ("o", "state"),
                forward(self.reference, in_double({**inputs, "initial_state": state}), **options),
                strict=True,
            )
        )
        o = self.op(**inputs, state=state, **options)
        for name, result in {"o": o, "state": state}.items():
            assert_matches_reference(name, result, expected[name], eager=rounded(expected[name], result.dtype))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_step(self, shape, dtype):
        self.assert_step(*self.inputs(shape, dtype))

    @pytest.mark.parametrize("kind", DECAYS)
    def test_decay(self, kind):
        self.assert_step(*self.inputs(ORDINARY, decay_kind=kind))

    def test_scale(self):
        inputs, state = self.inputs(ORDINARY)
        o = self.op(**inputs, state=state.clone())
        assert_matches_reference("o", self.op(**inputs, state=state, scale=3.0), 3 * 24**0.5 * o.double())

    def test_many_steps_are_the_chunk_form(self):
        inputs, state = self.inputs(Shape(2, 70, 2, 4, 24, 40), torch.float64)
        o, final_state = forward(self.chunk, {**inputs, "initial_state": state})
        for t in range(70):
            o_t = self.op(**{name: x[:, t : t + 1] for name, x in inputs.items()}, state=state)
            assert_matches_reference("o", o_t, o[:, t : t + 1])
        assert_matches_reference("state", state, final_state)

    def test_several_tokens_equal_single_steps(self):
        inputs, state = self.inputs(SHAPES[-1])
        other = state.clone()
        o = self.op(**inputs, state=state)
        steps = [self.op(**{name: x[:, t : t + 1] for name, x in inputs.items()}, state=other) for t in range(5)]
        assert o.equal(torch.cat(steps, dim=1)) and state.equal(other)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
    def test_pool_of_states(self, dtype):
        inputs, state = self.inputs(ORDINARY)
        pool = torch.full((5, *state.shape[1:]), torch.nan)
        slots = torch.tensor([4, -1, 1], dtype=dtype)
        pool[4], pool[1] = state[0], state[2]
        o = self.op(**inputs, state=pool, state_indices=slots)
        expected = self.op(**inputs, state=state)
        assert o[0].equal(expected[0]) and o[2].equal(expected[2]) and (o[1] == 0).all()
        assert pool[4].equal(state[0]) and pool[1].equal(state[2])
        assert pool[[0, 2, 3]].isnan().all()

    def gate_inputs(self, dtype):
        """Return inputs with raw gate projections, the inputs in double with computed gates, the state, and options."""
        inputs, state = self.inputs(ORDINARY, dtype)
        A_log, dt_bias = torch.randn(4), torch.randn(4)
        projected = {name: 3 * torch.randn(3, 2, 4).to(dtype) for name in ("g", "beta") if name in inputs}
        g = reference.log_decay(projected["g"].double(), A_log.double(), dt_bias.double())
        exact = {**inputs, "g": g}
        options = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias}
        if self.delta:
            exact["beta"] = 2 * projected["beta"].double().sigmoid()
            options |= {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}
        return {**inputs, **projected}, exact, state, options

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_raw_gate_projections(self, dtype):
        inputs, exact, state, options = self.gate_inputs(dtype)
        exact = {name: x.double() for name, x in {**exact, "initial_state": state}.items()}
        o_expected, state_expected = forward(self.reference, exact)
        o = self.op(**inputs, state=state, **options)
        assert_matches_reference("o", o, o_expected, eager=rounded(o_expected, dtype))
        assert_matches_reference("state", state, state_expected, eager=rounded(state_expected, state.dtype))

    def test_raw_gates_of_any_dtype_and_extreme_values(self):
        inputs, _, state, options = self.gate_inputs(torch.bfloat16)
        gates = [name for name in ("g", "beta") if name in inputs]
        other = state.clone()
        wide = {**inputs, **{name: inputs[name].float() for name in gates}}
        mixed = {**options, "A_log": options["A_log"].double(), "dt_bias": None}
        options["dt_bias"] = torch.zeros(4)
        assert self.op(**inputs, state=state, **options).equal(self.op(**wide, state=other, **mixed))
        assert state.equal(other)
        for value in (-1e4, -60.0, 60.0, 1e4):
            extreme = {name: torch.full_like(inputs[name], value) for name in gates}
            assert self.op(**{**inputs, **extreme}, state=state, **options).isfinite().all()
            assert state.isfinite().all()

    def test_wrong_gates(self):
        gate = {"use_gate_in_kernel": True, "A_log": torch.zeros(4)}
        self.bad(TypeError, "A_log must be a tensor, got NoneType", use_gate_in_kernel=True)
        self.bad(ValueError, "A_log must be left out without use_gate_in_kernel", A_log=torch.zeros(4))
        self.bad(ValueError, r"A_log must have shape \[4\], got \[2\]", **{**gate, "A_log": torch.zeros(2)})
        self.bad(ValueError, r"dt_bias must have shape \[4\], got \[1\]", **gate, dt_bias=torch.zeros(1))
        self.bad(TypeError, "dt_bias must be float64 or .*, got int64", **gate, dt_bias=torch.zeros(4).long())

    def test_any_strides(self):
        inputs, state = self.inputs(ORDINARY)
        other = state.clone()
        strided = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in inputs.items()}
        assert not any(x.is_contiguous() for x in strided.values())
        assert self.op(**strided, state=other).equal(self.op(**inputs, state=state)) and other.equal(state)

    def test_bitwise_the_same_for_any_number_of_threads(self):
        threads = torch.get_num_threads()
        for shape in (Shape(1, 1, 1, 1, 128, 300), Shape(3, 1, 2, 2, 64, 64)):
            inputs, state = self.inputs(shape)
            results = []
            try:
                for count in (1, 2, 3, 7):
                    torch.set_num_threads(count)
                    own = state.clone()
                    results.append((self.op(**inputs, state=own), own))
            finally:
                torch.set_num_threads(threads)
            for o, own in results[1:]:
                assert o.equal(results[0][0]) and own.equal(results[0][1])

    def test_no_tokens(self):
        for shape in (Shape(2, 0, 1, 2, 8, 8), Shape(0, 1, 1, 2, 8, 8)):
            inputs, state = self.inputs(shape)
            before = state.clone()
            assert self.op(**inputs, state=state).shape == inputs["v"].shape and state.equal(before)

    def test_opcheck(self):
        inputs, state = self.inputs(ORDINARY)
        for slots in (None, torch.tensor([2, 0, -1])):
            tensors = (inputs.get(name) for name in ("q", "k", "v", "g", "beta"))
            args = (*tensors, state, slots, None, None, 0.5, *self.last_arguments)
            torch.library.opcheck(getattr(torch.ops.hypenet, self.name).default, args)

    def test_compiles_to_one_graph(self):
        inputs, state = self.inputs(ORDINARY)
        other = state.clone()
        compiled = torch.compile(self.op, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert compiled(**inputs, state=other).equal(self.op(**inputs, state=state)) and other.equal(state)

    def test_gradients_are_refused_unless_switched_off(self):
        inputs, state = self.inputs(ORDINARY)
        for name, x in {**inputs, "state": state}.items():
            wants = {**inputs, "state": state, name: x.clone().requires_grad_()}
            with pytest.raises(ValueError, match=f"^{self.name}: {name} must not require grad"):
                self.op(**wants)
            with torch.no_grad():
                self.op(**wants)

    def bad(self, error, message, **changes):
        inputs, state = self.inputs(ORDINARY)
        with pytest.raises(error, match=f"^{self.name}: {message}"):
            self.op(**{**inputs, "state": state, **changes})

    def test_wrong_inputs(self):
        self.bad(TypeError, "state must be a tensor, got NoneType", state=None)
        self.bad(TypeError, "g must be a tensor, got NoneType", g=None)
        self.bad(TypeError, "q must be a tensor, got int", q=1)
        self.bad(TypeError, "scale must be a number, got str", scale="0.5")
        self.bad(ValueError, "scale must be one real number", scale=torch.ones(2))
        self.bad(ValueError, r"q must have 4 dimensions \[B, T, H, K\]", q=torch.zeros(3, 2, 24))
        self.bad(ValueError, r"k must have q's shape \[3, 2, 2, 24\]", k=torch.zeros(3, 2, 2, 20))
        self.bad(ValueError, r"v must have shape \[3, 2, 4, 40\]", v=torch.zeros(3, 1, 4, 40))
        self.bad(ValueError, r"g must have shape \[3, 2, 4\]", g=torch.zeros(3, 2, 2))
        self.bad(TypeError, "k must have q's dtype", k=torch.zeros(3, 2, 2, 24).double())
        self.bad(ValueError, "v must be on q's device cpu, got meta", v=torch.zeros(3, 2, 4, 40, device="meta"))
        odd = {"v": torch.zeros(3, 2, 3, 40), "g": torch.zeros(3, 2, 3), "state": torch.zeros(3, 3, 24, 40)}
        odd |= {"beta": torch.zeros(3, 2, 3)} if self.delta else {}
        self.bad(ValueError, "v's number of heads must be a multiple of q's number of heads = 2, got 3", **odd)

    def test_wrong_state(self):
        self.bad(
            ValueError, r"state must have shape \[3, 4, 24, 40\], got \[2, 4, 24, 40\]", state=torch.zeros(2, 4, 24, 40)
        )
        self.bad(ValueError, r"state must have 4 dimensions", state=torch.zeros(4, 24, 40))
        self.bad(TypeError, "state must be float32, got bfloat16", state=torch.zeros(3, 4, 24, 40).bfloat16())
        self.bad(ValueError, "state must have contiguous slots that do not overlap", state=torch.zeros(3, 4, 40, 24).mT)
        pool = torch.zeros(5, 4, 24, 40)
        wrong = [
            (ValueError, r"be below the number of slots, 5, got \[0, 5, 1\]", torch.tensor([0, 5, 1])),
            (ValueError, r"name no slot twice, got \[1, -1, 1\]", torch.tensor([1, -1, 1])),
            (ValueError, r"have shape \[3\], got \[2\]", torch.tensor([0, 1])),
            (TypeError, "be int32 or int64, got float32", torch.tensor([0.0, 1.0, 2.0])),
            (TypeError, "be a tensor, got list", [0, 1, 2]),
        ]
        for error, message, slots in wrong:
            self.bad(error, f"state_indices must {message}", state=pool, state_indices=slots)
        assert (pool == 0).all()


class TestGatedDeltaStep(StepOp):
    op = staticmethod(hypenet_kernels.gated_delta_step)
    chunk = staticmethod(hypenet_kernels.chunk_gated_delta_rule)
    reference = staticmethod(reference.chunk_gated_delta_rule)
    name, delta, last_arguments = "gated_delta_step", True, (True, 2.0)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_l2norm(self, dtype):
        inputs, state = self.inputs(ORDINARY, dtype)
        inputs["k"] = 3 * inputs["k"]
        self.assert_step(inputs, state, use_qk_l2norm_in_kernel=True)

    def test_l2norm_of_zero_is_zero(self):
        inputs, state = self.inputs(ORDINARY, decay_kind="none")
        inputs["k"], before = torch.zeros_like(inputs["k"]), state.clone()
        assert self.op(**inputs, state=state, use_qk_l2norm_in_kernel=True).isfinite().all() and state.equal(before)

    def test_l2norm_of_what_overflows_is_zero(self):
        inputs, state = self.inputs(ORDINARY, decay_kind="none")
        inputs["k"], before = torch.full_like(inputs["k"], 1e20), state.clone()
        assert self.op(**inputs, state=state, use_qk_l2norm_in_kernel=True).isfinite().all() and state.equal(before)

    def test_too_little_memory_is_an_error(self):
        absent = dict.fromkeys(["q", "k", "v", "g", "beta"], _native.ABSENT)
        absent |= {"A_log": 0, "dt_bias": 0, "state_indices": (0, False), "state": 0, "o": 0}
        sizes = {"B": 0, "T": 0, "H": 1, "HV": 1, "K": 2**44, "V": 1, "num_slots": 0, "num_threads": 1}
        options = {"dtype": 1, "delta": True, "use_qk_l2norm": False, "scale": 1.0}
        options |= {"gates_in_dtype": False, "beta_limit": 0.0}
        with pytest.raises(MemoryError):
            _native.cpu().gated_delta_step(absent | sizes | options)

    def test_wrong_beta(self):
        self.bad(ValueError, "allow_neg_eigval must be False without use_beta_sigmoid_in_kernel", allow_neg_eigval=True)
        self.bad(TypeError, "beta must be a tensor, got NoneType", beta=None)
        self.bad(ValueError, r"beta must have shape \[3, 2, 4\]", beta=torch.zeros(3, 2, 4, 40))


class TestSimpleGLAStep(StepOp):
    op = staticmethod(hypenet_kernels.simple_gla_step)
    chunk = staticmethod(hypenet_kernels.chunk_simple_gla)
    reference = staticmethod(reference.chunk_simple_gla)
    name, delta, last_arguments = "simple_gla_step", False, (False, 0.0)
