"""The gated delta rule over whole sequences: chunk and recurrent form against the reference, values and gradients."""

import pytest
import torch
from compare import assert_matches_reference
from recurrence_suite import (
    ORDINARY,
    SequenceOp,
    Shape,
    arguments,
    assert_forward,
    assert_gradients,
    bounds,
    cotangents,
    forward,
    gradients,
    in_double,
    make_inputs,
)

import hypenet_kernels
from hypenet_kernels import reference


class DeltaRule(SequenceOp):
    reference = staticmethod(reference.chunk_gated_delta_rule)

    @pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
    @pytest.mark.parametrize("keys", ["random", "identical", "periodic"])
    def test_hard_systems(self, keys, beta):
        """Repeated keys make the triangular system of a chunk as ill-conditioned as possible."""
        shape = Shape(1, 103, 1, 2, 64, 64)
        inputs = make_inputs(shape, True, torch.float64, decay_kind="none")
        inputs["beta"].fill_(beta)
        if keys != "random":
            inputs["k"] = inputs["k"][:, : 1 if keys == "identical" else 4].repeat(1, 103, 1, 1)[:, :103]
        if beta == 0:  # nothing is written to the state: the gradient of v is 0
            assert_forward(self.op, self.reference, inputs)
            assert (gradients(self.op, inputs, *cotangents(inputs))["v"] == 0).all()
            return
        assert_forward(self.op, self.reference, inputs)
        assert_gradients(self.op, self.reference, inputs)
        single = {name: x.float() for name, x in inputs.items()}
        expected = forward(self.reference, in_double(single))
        # With beta = 2 errors do not decay, and with equal keys all products k . k have the same rounding error: a
        # float32 Gram matrix is then no better than exact arithmetic on keys that are too long by half an ulp.
        longer = in_double(single) | {"k": single["k"].double() * (1 + torch.finfo(torch.float32).eps / 2)}
        eager = forward(self.reference, longer) if beta == 2 else (None, None)
        for name, x, y, z in zip(("o", "final_state"), forward(self.op, single), expected, eager, strict=True):
            assert_matches_reference(name, x, y, eager=z)

    def test_large_predictable_values(self):
        """v = S^T k for a fixed S: the residual is a small difference of large numbers."""
        inputs = make_inputs(ORDINARY, True, decay_kind="none")
        S = 1e3 * inputs["initial_state"]
        keys = inputs["k"].repeat_interleave(2, dim=2)
        inputs["initial_state"], inputs["v"] = S, torch.einsum("bthk,bhkv->bthv", keys, S)
        assert_forward(self.op, self.reference, inputs)

    def test_l2norm(self):
        inputs = make_inputs(ORDINARY, True)
        inputs["k"] = 3 * inputs["k"]
        assert_forward(self.op, self.reference, inputs, use_qk_l2norm_in_kernel=True)
        assert_gradients(self.op, self.reference, inputs, use_qk_l2norm_in_kernel=True)

    def test_l2norm_of_zero_is_zero(self):
        inputs = make_inputs(ORDINARY, True)
        inputs["q"][:, 3], inputs["k"][:, 5] = 0, 0
        grads = gradients(self.op, inputs, *cotangents(inputs), use_qk_l2norm_in_kernel=True)
        assert all(x.isfinite().all() for x in grads.values())

    def test_l2norm_of_what_overflows_is_zero(self):
        inputs = make_inputs(ORDINARY, True)
        inputs["q"][:, 3], inputs["k"][:, 5] = 1e20, 1e20
        o, _ = forward(self.op, inputs, use_qk_l2norm_in_kernel=True)
        zero = inputs | {name: inputs[name].where(inputs[name] < 1e20, 0) for name in "qk"}
        assert o.equal(forward(self.op, zero, use_qk_l2norm_in_kernel=True)[0])
        grads = gradients(self.op, inputs, *cotangents(inputs), use_qk_l2norm_in_kernel=True)
        assert all(x.isfinite().all() for x in grads.values())

    def test_gates_of_another_float_type(self):
        inputs = make_inputs(ORDINARY, True, torch.bfloat16)
        for name in ("g", "beta", "initial_state"):
            inputs[name] = inputs[name].bfloat16()
        grads = gradients(self.op, inputs, *cotangents(inputs))
        assert all(grads[name].dtype == torch.bfloat16 for name in inputs)
        assert forward(self.op, inputs)[1].dtype == torch.float32
        assert_forward(self.op, self.reference, inputs)

    def test_wrong_beta(self):
        self.bad(ValueError, r"beta must have shape \[2, 71, 4\], got \[2, 71, 4, 40\]", beta=torch.zeros(2, 71, 4, 40))
        self.bad(TypeError, "beta must be float64 or .*, got bool", beta=torch.zeros(2, 71, 4, dtype=torch.bool))

    def test_arguments_of_fla(self):
        inputs = make_inputs(ORDINARY, True)
        expected, _ = self.op(**inputs)
        harmless = {"chunk_size": 64, "head_first": False, "state_v_first": False, "A_log": torch.zeros(4)}
        assert self.op(**inputs, **harmless)[0].equal(expected)
        self.bad(NotImplementedError, "head_first must be False", head_first=True)
        self.bad(ValueError, r"chunk_size must be one of \(16, 32, 64\)", chunk_size=48)
        self.bad(TypeError, "unexpected argument 'use_cache'", use_cache=True)
        self.bad(TypeError, "A_log must be a tensor, got NoneType", use_gate_in_kernel=True)
        self.bad(ValueError, "allow_neg_eigval must be False without use_beta_sigmoid_in_kernel", allow_neg_eigval=True)

    def test_gates_as_a_layer_projects_them(self):
        """Forward and every gradient, those of A_log and dt_bias included, are those of the gates spelt out."""
        inputs = make_inputs(ORDINARY, True, torch.float64)
        inputs |= {"g": torch.randn_like(inputs["g"]), "beta": torch.randn_like(inputs["beta"])}
        inputs |= {"A_log": torch.randn(4).double(), "dt_bias": torch.randn(4).double()}
        flags = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}

        def spelt_out(g, beta, A_log, dt_bias, **others):
            return self.op(g=reference.log_decay(g, A_log, dt_bias), beta=2 * beta.sigmoid(), **others)

        for a, b in zip(forward(self.op, inputs, **flags), forward(spelt_out, inputs), strict=True):
            assert_matches_reference("o", a, b)
        given = cotangents(inputs)
        expected = gradients(spelt_out, inputs, *given)
        for name, x in gradients(self.op, inputs, *given, **flags).items():
            assert_matches_reference(f"d{name}", x, expected[name])

    def test_states_with_v_first(self):
        inputs = make_inputs(ORDINARY, True)
        o, final_state = forward(self.op, inputs)
        inputs["initial_state"] = inputs["initial_state"].mT.contiguous()
        o_v, state_v = forward(self.op, inputs, state_v_first=True)
        assert o_v.equal(o) and state_v.mT.equal(final_state)
        with pytest.deprecated_call():
            assert forward(self.op, inputs, transpose_state_layout=True)[1].equal(state_v)


class TestChunk(DeltaRule):
    op = staticmethod(hypenet_kernels.chunk_gated_delta_rule)
    name = "chunk_gated_delta_rule"

    def test_positional_order_is_that_of_fla(self):
        x = make_inputs(ORDINARY, True)
        order = (x["q"], x["k"], x["v"], x["g"], x["beta"], 0.3, x["initial_state"], True, True, True, True, True)
        x["initial_state"] = x["initial_state"].mT.contiguous()
        names = ("scale", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel")
        flags = dict.fromkeys(("use_beta_sigmoid_in_kernel", "allow_neg_eigval", "state_v_first"), True)
        order = (*order[:6], x["initial_state"], *order[7:])
        named = dict(zip(names, (0.3, x.pop("initial_state"), True, True), strict=True))
        for a, b in zip(self.op(*order), self.op(**x, **named, **flags), strict=True):
            assert a.equal(b)

    def test_cu_seqlens_is_the_thirteenth_argument(self):
        x, cu_seqlens = make_inputs(Shape(1, 100, 2, 4, 24, 40), True), bounds(60, 40)
        del x["initial_state"]
        options = (None, None, False, False, False, False, False)
        given = self.op(*(x[name] for name in ("q", "k", "v", "g", "beta")), *options, cu_seqlens)
        assert given[0].equal(self.op(**x, cu_seqlens=cu_seqlens)[0])

    def test_gates_are_required(self):
        self.bad(TypeError, "g must be a tensor, got NoneType", g=None)
        self.bad(TypeError, "beta must be a tensor, got NoneType", beta=None)

    @pytest.mark.parametrize("T", [1, 64, 200])
    def test_agrees_with_transformers(self, T):
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

        inputs = make_inputs(Shape(2, T, 2, 4, 32, 48), True)
        options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
        expected = torch_chunk_gated_delta_rule(*(inputs.pop(n) for n in "qkv"), **inputs, **options)
        torch.manual_seed(0)
        results = self.op(**make_inputs(Shape(2, T, 2, 4, 32, 48), True), **options)
        for name, result, theirs in zip(("o", "final_state"), results, expected, strict=True):
            assert_matches_reference(name, result, theirs)

    def test_bwd_opcheck(self):
        inputs = make_inputs(ORDINARY, True)
        do, dfinal_state = cotangents(inputs)
        for last in (None, dfinal_state):
            args = (do, last, [], *arguments(inputs), None, 0.5, 0)
            torch.library.opcheck(torch.ops.hypenet.chunk_gated_delta_rule_bwd.default, args)

    @pytest.mark.slow
    def test_many_segments(self):
        shape = Shape(1, 5000, 1, 2, 64, 64)
        assert_gradients(self.op, self.reference, make_inputs(shape, True))


class TestFusedRecurrent(DeltaRule):
    op = staticmethod(hypenet_kernels.fused_recurrent_gated_delta_rule)
    name = "fused_recurrent_gated_delta_rule"

    def test_positional_order_is_that_of_fla(self):
        x = make_inputs(ORDINARY, True)
        o, state = self.op(x["q"], x["k"], x["v"], x["g"], None, None, x["beta"], 0.3, x["initial_state"], True, True)
        options = {"scale": 0.3, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        expected = self.op(**x, **options)
        assert o.equal(expected[0]) and state.equal(expected[1])
        self.bad(NotImplementedError, r"gk must be None .*, got a tensor of shape \[3\]", gk=torch.zeros(3))

    def test_gates_default_to_no_decay_and_one(self):
        inputs = make_inputs(ORDINARY, True, decay_kind="none")
        inputs["beta"].fill_(1)
        expected = forward(self.op, inputs)
        for a, b in zip(forward(self.op, inputs | {"g": None, "beta": None}), expected, strict=True):
            assert a.equal(b)
