"""The gated delta rule over whole sequences: chunk and recurrent form against the loop over t, values and gradients."""

import pytest
import torch
from compare import assert_matches_reference
from recurrence_suite import (
    ORDINARY,
    SequenceOp,
    Shape,
    assert_forward,
    assert_gradients,
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
        """Keys that repeat make the triangular system of a chunk as ill-conditioned as it gets; beta = 2 reflects."""
        shape = Shape(1, 103, 1, 2, 64, 64)
        inputs = make_inputs(shape, True, torch.float64, decay_kind="none")
        inputs["beta"].fill_(beta)
        if keys != "random":
            inputs["k"] = inputs["k"][:, : 1 if keys == "identical" else 4].repeat(1, 103, 1, 1)[:, :103]
        if beta == 0:  # nothing is written: v has no gradient
            assert_forward(self.op, self.reference, inputs)
            assert (gradients(self.op, inputs, *cotangents(inputs))["v"] == 0).all()
            return
        assert_forward(self.op, self.reference, inputs)
        assert_gradients(self.op, self.reference, inputs)
        single = {name: x.float() for name, x in inputs.items()}
        expected = forward(self.reference, in_double(single))
        # A reflection hands errors on undiminished, and with equal keys all errors of k . k are one and the same: no
        # float32 Gram matrix does better than exact arithmetic on keys that are half a unit in the last place too long.
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

    def test_arguments_of_neighbours(self):
        inputs = make_inputs(ORDINARY, True)
        expected, _ = self.op(**inputs)
        harmless = {"use_cache": True, "chunk_size": 64, "state_v_first": False, "A_log": None, "max_length_q": 7}
        assert self.op(**inputs, **harmless)[0].equal(expected)
        self.bad(NotImplementedError, "state_v_first must be False .*, got True", state_v_first=True)
        self.bad(NotImplementedError, "A_log must be None", A_log=torch.zeros(4))
        self.bad(TypeError, "unexpected argument 'head_first'", head_first=False)


class TestChunk(DeltaRule):
    op = staticmethod(hypenet_kernels.chunk_gated_delta_rule)
    name = "chunk_gated_delta_rule"

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
            args = (do, last, *inputs.values(), None, [], 0.5, 0)
            torch.library.opcheck(torch.ops.hypenet.chunk_gated_delta_rule_bwd.default, args)

    @pytest.mark.slow
    def test_many_segments(self):
        shape = Shape(1, 5000, 1, 2, 64, 64)
        assert_gradients(self.op, self.reference, make_inputs(shape, True))


class TestFusedRecurrent(DeltaRule):
    op = staticmethod(hypenet_kernels.fused_recurrent_gated_delta_rule)
    name = "fused_recurrent_gated_delta_rule"

    def test_gates_default_to_no_decay_and_one(self):
        inputs = make_inputs(ORDINARY, True, decay_kind="none")
        inputs["beta"].fill_(1)
        expected = forward(self.op, inputs)
        for a, b in zip(forward(self.op, inputs | {"g": None, "beta": None}), expected, strict=True):
            assert a.equal(b)
