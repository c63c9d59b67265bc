"""The cases that flash-linear-attention tests its ops on, against our reference in float64.

Its shapes, decays, masks, packings, gates and state layouts; forward and every gradient, in float32, bfloat16 and
float16. Sequences of more than 512 tokens are marked slow: the reference is a loop over t.
"""

from itertools import pairwise, product

import pytest
import torch
from compare import assert_matches_reference
from torch.nn import functional as F

import hypenet_kernels as kernels
from hypenet_kernels import reference

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
slow = pytest.mark.slow


def case(*values, dtype=FLOAT16):
    """Marked slow where T, the second value, is too long for the loop over t."""
    return pytest.param(
        *values, dtype, marks=[slow] if values[1] > 512 else [], id="-".join(map(str, (*values, dtype)))
    )


# B, T, H, HV, D, scale, gate_logit_normalizer, share of masked decays, l2norm in the op, dtype
DELTA = [
    case(1, 63, 1, 1, 64, 1.0, 1.0, 0.0, False),
    case(2, 500, 3, 3, 60, 1.0, 1.0, 0.0, False),
    case(2, 1000, 3, 3, 64, 0.1, 1.0, 0.5, False),
    case(3, 1024, 4, 4, 100, 1.0, 0.1, 0.0, False),
    case(4, 1024, 4, 4, 128, 0.1, 1.0, 0.0, False),
    case(4, 1024, 4, 4, 128, 0.1, 1.0, 0.0, True),
    case(2, 1500, 4, 4, 128, 0.1, 10.0, 0.0, False),
    case(4, 2048, 8, 8, 64, 0.1, 1.0, 0.0, False),
    case(2, 256, 2, 8, 64, 1.0, 1.0, 0.25, True),
    case(2, 256, 2, 4, 100, 0.5, 1.0, 0.0, True, dtype=BFLOAT16),
    case(2, 500, 3, 6, 60, 1.0, 1.0, 0.0, True, dtype=FLOAT32),
]
# cu_seqlens, H, HV, D, share of masked decays, dtype
PACKED = [
    pytest.param([0, 15], 2, 2, 60, 0.0, FLOAT16, id="one-short"),
    pytest.param([0, 128, 250, 500], 2, 4, 64, 0.5, FLOAT16, id="three-masked"),
    pytest.param([0, 15, 100, 300, 400], 2, 2, 64, 0.0, BFLOAT16, id="four"),
    pytest.param([0, 256, 500, 1000], 2, 2, 64, 0.0, FLOAT16, id="three", marks=slow),
    pytest.param([0, 1, 100, 300, 800, 1500, 2000], 2, 8, 100, 0.0, FLOAT16, id="six", marks=slow),
]
# B, T, H, D, gate_logit_normalizer or None for a constant decay, dtype
GLA = [
    case(1, 63, 1, 64, 1.0),
    case(2, 500, 4, 60, 1.0),
    case(2, 1000, 5, 128, 0.1),
    case(3, 1024, 6, 128, 10.0),
    case(2, 512, 4, 100, None),
    case(2, 512, 4, 64, None, dtype=BFLOAT16),
    case(2, 512, 4, 64, None, dtype=FLOAT32),
    case(4, 2048, 8, 64, 1.0),
]


def delta_inputs(B, T, H, HV, D, dtype, normalizer=1.0, masked=0.0, N=None):
    """As fla makes them: unit keys, sigmoid beta, logsigmoid decays of which a share is set to 0, random states."""
    inputs = {
        "q": torch.rand(B, T, H, D).to(dtype),
        "k": F.normalize(torch.rand(B, T, H, D), dim=-1).to(dtype),
        "v": torch.rand(B, T, HV, D).to(dtype),
        "g": F.logsigmoid(torch.rand(B, T, HV)) / normalizer,
        "beta": torch.rand(B, T, HV).sigmoid(),
        "initial_state": torch.rand(B if N is None else N, HV, D, D),
    }
    inputs["g"] = inputs["g"] * (torch.rand_like(inputs["g"]) >= masked)
    return inputs


def results(op, inputs, given, **options):
    """Outputs and gradients of every tensor, by name."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    o, state = op(**leaves, output_final_state=True, **options)
    do, dstate = (x.to(y) for x, y in zip(given, (o, state), strict=True))
    grads = torch.autograd.grad((o, state), list(leaves.values()), (do, dstate))
    return {"o": o, "final_state": state} | {f"d{name}": x for name, x in zip(leaves, grads, strict=True)}


def sizes_of_terms(inputs, gradients):
    """Return the sums of the absolute terms of dA_log and ddt_bias: the terms cancel, and their errors do not."""
    x = inputs["g"] + inputs["dt_bias"]
    terms = gradients["dg"].abs()
    return {"ddt_bias": terms.sum((0, 1)), "dA_log": (terms * F.softplus(x) / x.sigmoid()).sum((0, 1))}


def check(op, exact_op, inputs, dtype, exact_inputs=None, **options):
    """Against exact_op in float64. The bound of low precision is twice one rounding of the exact result."""
    exact_inputs = inputs if exact_inputs is None else exact_inputs
    exact_options = {name: x for name, x in options.items() if name not in ("state_v_first", "chunk_size")}
    v, state = inputs["v"], exact_inputs["initial_state"]
    do, dstate = torch.randn_like(v), torch.randn_like(state)
    doubles = {name: x.double() for name, x in exact_inputs.items()}
    expected = results(exact_op, doubles, (do.double(), dstate.double()), **exact_options)
    v_first = options.get("state_v_first", False)
    found = results(op, inputs, (do, dstate.mT if v_first else dstate), **options)
    terms = sizes_of_terms(doubles, expected) if "A_log" in inputs else {}
    for name, x in found.items():
        if v_first and "state" in name:
            x = x.mT
        exact = expected[name]
        eager = exact.to(x.dtype).double() if x.dtype in (BFLOAT16, FLOAT16) else None
        x, exact = x + terms.get(name, 0), exact + terms.get(name, 0)
        low_precision = dtype in (BFLOAT16, FLOAT16) and eager is None
        assert_matches_reference(
            name, x, exact, eager=exact.to(dtype).double() if low_precision else eager, dtype=dtype
        )


@pytest.mark.parametrize("op", [kernels.chunk_gdn, kernels.fused_recurrent_gdn], ids=lambda op: op.__name__)
@pytest.mark.parametrize("B, T, H, HV, D, scale, normalizer, masked, norm, dtype", DELTA)
def test_gated_delta_rule(op, B, T, H, HV, D, scale, normalizer, masked, norm, dtype):
    if op is kernels.fused_recurrent_gdn and T > 512:
        pytest.skip("the recurrent form is for short sequences")
    inputs = delta_inputs(B, T, H, HV, D, dtype, normalizer, masked)
    check(op, reference.chunk_gated_delta_rule, inputs, dtype, scale=scale, use_qk_l2norm_in_kernel=norm)


@pytest.mark.parametrize("cu_seqlens, H, HV, D, masked, dtype", PACKED)
def test_packed_gated_delta_rule(cu_seqlens, H, HV, D, masked, dtype):
    N, T = len(cu_seqlens) - 1, cu_seqlens[-1]
    inputs = delta_inputs(1, T, H, HV, D, dtype, masked=masked, N=N)
    options = {"cu_seqlens": torch.tensor(cu_seqlens, dtype=torch.int32)}
    check(kernels.chunk_gdn, reference.chunk_gated_delta_rule, inputs, dtype, **options)


@pytest.mark.parametrize("v_first, dtype", list(product([False, True], [FLOAT32, BFLOAT16])), ids=str)
@pytest.mark.parametrize("neg_eigval", [False, True])
def test_gates_in_the_op_and_state_layouts(v_first, dtype, neg_eigval):
    inputs = delta_inputs(2, 150, 2, 4, 64, dtype) | {"A_log": torch.rand(4).log(), "dt_bias": torch.randn(4)}
    inputs |= {"g": torch.randn(2, 150, 4).to(dtype), "beta": torch.randn(2, 150, 4).to(dtype)}
    flags = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": neg_eigval}
    ours = dict(inputs)
    if v_first:
        ours["initial_state"] = inputs["initial_state"].mT.contiguous()
        flags["state_v_first"] = True
    for op in (kernels.chunk_gdn, kernels.fused_recurrent_gdn):
        check(op, reference.chunk_gated_delta_rule, ours, dtype, inputs, use_qk_l2norm_in_kernel=True, **flags)


@pytest.mark.parametrize("chunk_size", [16, 32, 64])
def test_chunk_sizes_change_nothing(chunk_size):
    inputs = delta_inputs(1, 100, 2, 2, 64, FLOAT32)
    assert kernels.chunk_gdn(**inputs, chunk_size=chunk_size)[0].equal(kernels.chunk_gdn(**inputs)[0])


@pytest.mark.parametrize("B, T, H, D, normalizer, dtype", GLA)
def test_simple_gla(B, T, H, D, normalizer, dtype):
    inputs = delta_inputs(B, T, H, H, D, dtype, normalizer or 1.0)
    del inputs["beta"]
    if normalizer is None:
        inputs["g_gamma"] = -torch.rand(H)
        del inputs["g"]
    check(kernels.chunk_simple_gla, reference.chunk_simple_gla, inputs, dtype)
    if T <= 512:
        check(kernels.fused_recurrent_simple_gla, reference.chunk_simple_gla, inputs, dtype)


@pytest.mark.parametrize("packed", [None, [0, 63, 64, 190], [0, 63, 180]], ids=["batch", "packed", "packed-short"])
def test_reverse(packed):
    """From the last token of every sequence to its first."""
    N = 2 if packed is None else len(packed) - 1
    inputs = delta_inputs(2 if packed is None else 1, 190, 2, 4, 32, FLOAT32, N=N)
    del inputs["beta"]
    spans = [(0, 190)] if packed is None else list(pairwise(packed))

    def backwards(output_final_state, **tensors):
        outputs, states = [], []
        for n, (start, stop) in enumerate(spans):
            own = {name: x[:, start:stop].flip(1) for name, x in tensors.items() if name != "initial_state"}
            own["initial_state"] = tensors["initial_state"] if packed is None else tensors["initial_state"][n : n + 1]
            o, state = reference.chunk_simple_gla(**own, output_final_state=True)
            outputs.append(o.flip(1))
            states.append(state)
        outputs.append(torch.zeros_like(tensors["v"][:, spans[-1][1] :]))
        return torch.cat(outputs, dim=1), torch.cat(states)

    options = {} if packed is None else {"cu_seqlens": torch.tensor(packed)}

    def ours(**tensors):
        return kernels.fused_recurrent_simple_gla(**tensors, reverse=True, **options)

    check(ours, backwards, inputs, FLOAT32)


def test_constant_decays_of_retention_and_lightning():
    q, k, v = torch.randn(3, 2, 100, 4, 32)
    heads = torch.arange(4.0)
    for op, arguments, g_gamma in (
        (kernels.chunk_retention, (), (1 - 2.0 ** (-5 - heads)).log()),
        (kernels.chunk_lightning_attn, (1, 4), -(8 / 4) * (1 - 1 / 4) * heads),
    ):
        expected, state = reference.chunk_simple_gla(
            q.double(), k.double(), v.double(), g_gamma=g_gamma.double(), output_final_state=True
        )
        o, final_state = op(q, k, v, *arguments, output_final_state=True)
        assert_matches_reference("o", o, expected)
        assert_matches_reference("final_state", final_state, state)


@pytest.mark.parametrize("op", [kernels.chunk_gdn, kernels.fused_recurrent_gdn], ids=lambda op: op.__name__)
def test_mixed_types_are_promoted(op):
    inputs = delta_inputs(1, 100, 2, 2, 32, FLOAT32)
    inputs |= {"v": inputs["v"].half(), "beta": inputs["beta"].half(), "k": inputs["k"].bfloat16()}
    o, _ = op(**inputs)
    wide, _ = op(**inputs | {name: inputs[name].float() for name in ("v", "beta", "k")})
    assert o.dtype == (torch.float32 if op is kernels.chunk_gdn else torch.float16) and o.equal(wide.to(o.dtype))
