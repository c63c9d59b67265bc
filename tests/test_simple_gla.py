"""Simple GLA over whole sequences: chunk and recurrent form against the reference, values and gradients."""

import torch
from recurrence_suite import (
    DTYPES,
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
)

import hypenet_kernels
from hypenet_kernels import reference


class SimpleGLA(SequenceOp):
    delta = False
    reference = staticmethod(reference.chunk_simple_gla)

    def constant(self, dtype=torch.float32):
        """Return inputs with g_gamma, the decays of Lightning attention, from weak to strong."""
        inputs = self.inputs(ORDINARY, dtype)
        del inputs["g"]
        return inputs | {"g_gamma": -torch.tensor([1e-3, 0.1, 1.0, 8.0]).to(inputs["initial_state"].dtype)}

    def test_constant_decay(self):
        for dtype in DTYPES:
            assert_forward(self.op, self.reference, self.constant(dtype))
            assert_gradients(self.op, self.reference, self.constant(dtype))

    def test_constant_decay_is_that_decay_everywhere(self):
        inputs = self.constant()
        g = inputs["g_gamma"].expand(ORDINARY.B, ORDINARY.T, ORDINARY.HV).contiguous()
        spelt_out = {name: x for name, x in inputs.items() if name != "g_gamma"} | {"g": g}
        for a, b in zip(forward(self.op, inputs), forward(self.op, spelt_out), strict=True):
            assert a.equal(b)

    def test_no_decay_by_default(self):
        inputs = self.inputs(ORDINARY, decay_kind="none")
        expected = forward(self.op, inputs)
        for a, b in zip(forward(self.op, inputs | {"g": None}), expected, strict=True):
            assert a.equal(b)

    def test_constant_decay_of_another_float_type(self):
        inputs = self.constant()
        inputs["g_gamma"] = inputs["g_gamma"].bfloat16()
        assert gradients(self.op, inputs, *cotangents(inputs))["g_gamma"].dtype == torch.bfloat16

    def test_arguments_of_fla(self):
        inputs = self.inputs(ORDINARY)
        expected, _ = self.op(**inputs)
        for harmless in ({"head_first": False}, {"chunk_size": 64}):
            assert self.op(**inputs, **harmless)[0].equal(expected)
        self.bad(NotImplementedError, "head_first must be False", head_first=True)
        self.bad(TypeError, "unexpected argument 'use_cache'", use_cache=True)

    def in_order(self, between):
        """Call by position, as users of fla do; `between`: the arguments before cu_seqlens."""
        inputs = self.inputs(Shape(1, 100, 2, 4, 24, 40), N=2)
        state, cu_seqlens = inputs.pop("initial_state"), bounds(60, 40)
        inputs |= {"scale": 0.3, "initial_state": state.mT.contiguous(), "output_final_state": True}
        given = (*(inputs[name] for name in "qkvg"), None, 0.3, inputs["initial_state"], True, *between, cu_seqlens)
        expected = self.op(**inputs, state_v_first=True, cu_seqlens=cu_seqlens)
        for a, b in zip(self.op(*given), expected, strict=True):
            assert a.equal(b)

    def test_wrong_constant_decay(self):
        self.bad(ValueError, "g_gamma must be left out where g is given", g_gamma=torch.zeros(4))
        self.bad(ValueError, r"g_gamma must have shape \[4\], got \[2\]", g=None, g_gamma=torch.zeros(2))
        self.bad(TypeError, "g_gamma must be float64 or", g=None, g_gamma=torch.zeros(4, dtype=torch.int64))
        self.bad(TypeError, "g_gamma must be a tensor, got float", g=None, g_gamma=-0.5)


class TestChunk(SimpleGLA):
    op = staticmethod(hypenet_kernels.chunk_simple_gla)
    name = "chunk_simple_gla"

    def test_positional_order_is_that_of_fla(self):
        self.in_order((True,))

    def test_bwd_opcheck(self):
        inputs = self.inputs(ORDINARY)
        do, dfinal_state = cotangents(inputs)
        for last in (None, dfinal_state):
            args = (do, last, [], *arguments(inputs), None, 0.5, 0)
            torch.library.opcheck(torch.ops.hypenet.chunk_simple_gla_bwd.default, args)


class TestFusedRecurrent(SimpleGLA):
    op = staticmethod(hypenet_kernels.fused_recurrent_simple_gla)
    name = "fused_recurrent_simple_gla"

    def test_positional_order_is_that_of_fla(self):
        self.in_order((False, True))

    def test_reverse_may_be_said_to_be_off(self):
        """As the retention and lightning layers of fla do."""
        inputs = self.inputs(ORDINARY)
        assert self.op(**inputs, reverse=False)[0].equal(self.op(**inputs)[0])
