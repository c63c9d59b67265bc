"""RMSNorm with rotary embedding, output gate or residual, and swiglu: against their definition in float64."""

import pytest
import torch
from compare import assert_matches_reference

import hypenet_kernels
from hypenet_kernels import _native, add_rms_norm, reference, rms_norm_gated, rms_norm_rope, swiglu

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-3
SHAPES = [  # B, T, H, D
    (1, 1, 1, 2),  # one row, the smallest that rotates
    (2, 3, 1, 6),  # less than a vector
    (2, 37, 3, 32),  # several blocks of 64 rows, which begin within a token
    (1, 65, 1, 130),  # vectors and a rest, also in each half
    (1, 5, 2, 48),  # halves of a vector and a half
]


def with_angles(B, T, H, D, dtype, **options):
    angles = torch.randn(B if options.get("own") else 1, T, D)
    cos, sin = (angle.to(options.get("angle_dtype", torch.float32)) for angle in (angles.cos(), angles.sin()))
    inputs = {"x": torch.randn(B, T, H, D).to(dtype)}
    if options.get("norm", True):
        inputs["weight"] = torch.randn(D)
    return (
        lambda x, weight=None: rms_norm_rope(x, weight, cos, sin, EPS),
        lambda x, weight=None: reference.rms_norm_rope(x, weight, cos, sin, EPS),
        inputs,
    )


def without_angles(B, T, H, D, dtype):
    inputs = {"x": torch.randn(B, T, H, D).to(dtype), "weight": torch.randn(D)}
    return (
        lambda x, weight: rms_norm_rope(x, weight, eps=EPS),
        lambda x, weight: reference.rms_norm_rope(x, weight, eps=EPS),
        inputs,
    )


def gated(activation):
    def case(B, T, H, D, dtype):
        inputs = {name: torch.randn(B, T, H, D).to(dtype) for name in ("x", "g")} | {"weight": torch.randn(D)}
        inputs["g"] = 3 * inputs["g"]
        options = {"eps": EPS, "activation": activation}
        return (
            lambda **x: rms_norm_gated(**x, **options),
            lambda **x: reference.rms_norm_gated(**x, **options),
            inputs,
        )

    return case


def added(narrow):
    def case(B, T, H, D, dtype):
        inputs = {name: torch.randn(B, T, H * D).to(dtype) for name in ("x", "residual")}
        inputs["x"] = inputs["x"].bfloat16() if narrow else inputs["x"]
        inputs["weight"] = torch.randn(H * D)
        return lambda **x: add_rms_norm(**x, eps=EPS), lambda **x: reference.add_rms_norm(**x, eps=EPS), inputs

    return case


def activated(B, T, H, D, dtype):
    inputs = {name: torch.randn(B, T, H * D).to(dtype) for name in ("x", "y")}
    return swiglu, reference.swiglu, inputs


CASES = {
    "rotated": with_angles,
    "rotated by angles of its own": lambda *given: with_angles(*given, own=True, angle_dtype=torch.bfloat16),
    "rotated without norm": lambda *given: with_angles(*given, norm=False),
    "normalised alone": without_angles,
    "silu gate": gated("silu"),
    "sigmoid gate": gated("sigmoid"),
    "added": added(False),
    "added, narrower": added(True),  # bfloat16 to float32 or float64
    "swiglu": activated,
}


def make_case(name, dtype, shape=SHAPES[2]):
    """Return (op, reference, inputs) with inputs of the dtype, but weights in float32."""
    dtype = torch.float32 if name == "added, narrower" and dtype in (torch.bfloat16, torch.float16) else dtype
    return CASES[name](*shape, dtype)


def in_double(inputs):
    return {name: x.double() for name, x in inputs.items()}


def gradients(op, inputs):
    """Return (results, gradients by name) of a weighted sum of the results."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    results = op(**leaves)
    results = results if isinstance(results, tuple) else (results,)
    weights = [torch.linspace(0, 20, y.numel(), dtype=torch.float64).cos().view(y.shape).to(y.dtype) for y in results]
    found = torch.autograd.grad(results, list(leaves.values()), weights)
    return results, dict(zip(leaves, found, strict=True))


def rounded(x, dtype):
    return x.to(dtype).double() if dtype in (torch.bfloat16, torch.float16) else None


def assert_correct(op, definition, inputs):
    results, found = gradients(op, inputs)
    expected, exact = gradients(definition, in_double(inputs))
    for i, (result, other) in enumerate(zip(results, expected, strict=True)):
        assert result.dtype == inputs.get("residual", inputs["x"]).dtype
        assert_matches_reference(f"result {i}", result, other, eager=rounded(other, result.dtype))
    for name, x in found.items():
        assert x.dtype == inputs[name].dtype
        # The gradient of a weight is a sum over rows of 16-bit results of which each was rounded.
        precision = inputs["x"].dtype if name == "weight" and inputs["x"].dtype != torch.float64 else x.dtype
        assert_matches_reference(f"d{name}", x, exact[name], rounded(exact[name], precision), precision)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_every_gradient(name, dtype, shape):
    assert_correct(*make_case(name, dtype, shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_in_torch_where_there_is_no_kernel(name, dtype, monkeypatch):
    monkeypatch.setattr(_native, "runs_in_torch", lambda op, x: True)
    monkeypatch.setattr(_native, "launch", None)
    assert_correct(*make_case(name, dtype, (2, 9, 3, 12)))


def test_the_definition_is_that_of_torch_and_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x, weight, angles = torch.randn(2, 5, 3, 8).double(), torch.randn(8).double(), torch.randn(1, 5, 8).double()
    n = torch.nn.functional.rms_norm(x, (8,), weight, EPS)
    assert_matches_reference("n", rms_norm_rope(x, weight, eps=EPS), n)
    cos, sin = angles.cos(), angles.sin()
    rotated, _ = apply_rotary_pos_emb(n.transpose(1, 2), n.transpose(1, 2), cos, sin)
    assert_matches_reference("rotated", rms_norm_rope(x, weight, cos, sin, EPS), rotated.transpose(1, 2))
    gate = torch.randn_like(x)
    silu = rms_norm_gated(x, gate, weight, eps=EPS)
    assert silu.equal(rms_norm_gated(x, gate, weight, eps=EPS, activation="swish"))
    assert_matches_reference("silu", silu, n * torch.nn.functional.silu(gate))
    assert_matches_reference(
        "sigmoid", rms_norm_gated(x, gate, weight, eps=EPS, activation="sigmoid"), n * gate.sigmoid()
    )
    total, y = add_rms_norm(x, gate, weight, EPS)
    assert total.equal(x + gate)
    assert_matches_reference("y", y, torch.nn.functional.rms_norm(x + gate, (8,), weight, EPS))
    assert_matches_reference("swiglu", swiglu(x, gate), torch.nn.functional.silu(x) * gate)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    op, _, inputs = make_case(name, torch.float64, (1, 3, 2, 6))
    inputs = in_double(inputs)
    names, leaves = inputs.keys(), [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: op(**dict(zip(names, x, strict=True))), leaves)


@pytest.mark.parametrize("name", CASES)
def test_results_do_not_depend_on_strides_nor_threads(name):
    op, _, inputs = make_case(name, torch.float32, (4, 300, 4, 32))
    results, found = gradients(op, inputs)
    strided = {key: torch.stack([x, x], dim=-1)[..., 0] for key, x in inputs.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        others, gradients_of_others = gradients(lambda **x: op(**x), strided)
    finally:
        torch.set_num_threads(threads)
    assert all(x.equal(y) for x, y in zip(results, others, strict=True))
    assert all(x.equal(gradients_of_others[key]) for key, x in found.items())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", CASES)
def test_a_poisoned_row_stays_alone(name, poison):
    op, _, inputs = make_case(name, torch.float32)
    results, found = gradients(op, inputs)
    inputs["x"][0, 7] = poison
    poisoned, found_poisoned = gradients(op, inputs)
    others = torch.ones(inputs["x"].shape[:2], dtype=torch.bool)
    others[0, 7] = False
    for x, y in zip((*results, found["x"]), (*poisoned, found_poisoned["x"]), strict=True):
        assert x[others].equal(y[others])
    assert not poisoned[0][0, 7].isfinite().all()


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("x", [1.0, 0.0])
def test_gates_of_every_size(x, activation):
    """Whose exp would overflow or vanish; and rows of zeros."""
    g = torch.tensor([[-1e4, -100.0, -89.0, -1.0, 0.0, 1.0, 89.0, 1e4]])
    inputs = {"x": torch.full_like(g, x), "g": g, "weight": torch.ones(8)}
    results, found = gradients(lambda **y: rms_norm_gated(**y, activation=activation), inputs)
    exact, expected = gradients(lambda **y: reference.rms_norm_gated(**y, activation=activation), in_double(inputs))
    torch.testing.assert_close(results[0], exact[0].float())
    for name, y in found.items():
        torch.testing.assert_close(y, expected[name].float())


def test_swiglu_of_every_size():
    inputs = {"x": torch.tensor([-1e4, -100.0, -89.0, -1.0, 0.0, 1.0, 89.0, 1e4]), "y": torch.full((8,), 2.0)}
    results, found = gradients(swiglu, inputs)
    exact, expected = gradients(reference.swiglu, in_double(inputs))
    torch.testing.assert_close(results[0], exact[0].float())
    for name, y in found.items():
        torch.testing.assert_close(y, expected[name].float())


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (2, 3, 2, 0)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_nothing(name, shape):
    op, _, inputs = make_case(name, torch.float32, shape)
    results, found = gradients(op, inputs)
    assert all(y.shape == inputs.get("residual", inputs["x"]).shape for y in results)
    assert all(found[key].shape == x.shape and (found[key] == 0).all() for key, x in inputs.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_weights_of_any_dtype(weight_dtype, dtype):
    x, weight = torch.randn(2, 5, 3, 8).to(dtype), torch.randn(8).to(weight_dtype)
    wide = weight.to(torch.float64 if dtype == torch.float64 else torch.float32)
    for op in (
        lambda x, weight: rms_norm_rope(x, weight),
        lambda x, weight: rms_norm_gated(x, x, weight),
        lambda x, weight: add_rms_norm(x, x, weight)[1],
    ):
        results, found = gradients(op, {"x": x, "weight": weight})
        expected, exact = gradients(op, {"x": x, "weight": wide})
        assert results[0].equal(expected[0]) and found["x"].equal(exact["x"])
        assert found["weight"].dtype == weight_dtype and found["weight"].equal(exact["weight"].to(weight_dtype))


@pytest.mark.parametrize("name", CASES)
def test_compiles_to_one_graph(name):
    op, _, inputs = make_case(name, torch.float32)
    results, found = gradients(op, inputs)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    others, gradients_of_others = gradients(compiled, inputs)
    assert all(x.equal(y) for x, y in zip(results, others, strict=True))
    assert all(x.equal(gradients_of_others[key]) for key, x in found.items())


@pytest.mark.parametrize("name", CASES)
def test_transforms_of_torch_func(name):
    op, _, inputs = make_case(name, torch.float32)

    def loss(leaves):
        results = op(**leaves)
        return sum(y.square().sum() for y in (results if isinstance(results, tuple) else (results,)))

    leaves = {key: x.clone().requires_grad_() for key, x in inputs.items()}
    expected = torch.autograd.grad(loss(leaves), list(leaves.values()))
    for key, x in zip(inputs, expected, strict=True):
        assert torch.func.grad(loss)(inputs)[key].equal(x)


def test_opcheck():
    x, weight, angles = torch.randn(2, 5, 3, 8), torch.randn(8), torch.randn(1, 5, 8)
    leaves = [y.requires_grad_() for y in (x, weight)]
    ops = torch.ops.hypenet
    check = torch.library.opcheck
    for suffix in ("", "_inference", "_saving"):
        given = leaves if suffix == "" else [y.detach() for y in leaves]
        for rotation in ((angles.cos(), angles.sin()), (None, None)):
            check(getattr(ops, f"rms_norm_rope{suffix}").default, (*given, *rotation, EPS))
        check(getattr(ops, f"rms_norm_rope{suffix}").default, (given[0], None, angles, angles, EPS))
        check(getattr(ops, f"rms_norm_gated{suffix}").default, (given[0], torch.randn(2, 5, 3, 8), given[1], EPS, True))
        check(getattr(ops, f"add_rms_norm{suffix}").default, (given[0], torch.randn(2, 5, 3, 8), given[1], EPS))
        check(getattr(ops, f"swiglu{suffix}").default, (given[0], torch.randn(2, 5, 3, 8)))
    x, weight, dy = x.detach(), weight.detach(), torch.randn(2, 5, 3, 8)
    check(ops.rms_norm_rope_bwd.default, (dy, x, weight, angles, angles, EPS))
    check(ops.rms_norm_rope_bwd.default, (dy, x, None, angles, angles, EPS))
    check(ops.rms_norm_gated_bwd.default, (dy, x, x, weight, EPS, False))
    check(ops.swiglu_bwd.default, (dy, x, x))
    for dtype in (torch.float32, torch.bfloat16):
        check(ops.add_rms_norm_bwd.default, (dy, dy, x, weight, EPS, dtype))


def test_meta_tensors_give_shapes():
    x, weight = torch.empty(2, 5, 3, 8, device="meta", dtype=torch.bfloat16), torch.empty(8, device="meta")
    total, y = add_rms_norm(x, x.float(), weight)
    for result in (rms_norm_rope(x, weight), rms_norm_gated(x, x, weight), swiglu(x, x)):
        assert (result.shape, result.dtype) == (x.shape, torch.bfloat16)
    assert total.shape == y.shape == x.shape and total.dtype == y.dtype == torch.float32


@pytest.mark.parametrize("name", CASES)
def test_no_second_derivative(name):
    op, _, inputs = make_case(name, torch.float64, (1, 2, 1, 4))
    leaves = [x.requires_grad_() for x in in_double(inputs).values()]
    results = op(**dict(zip(inputs, leaves, strict=True)))
    y = results if isinstance(results, torch.Tensor) else results[1]
    gradient = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(
        NotImplementedError, match=r"^(rms_norm_rope|rms_norm_gated|add_rms_norm|swiglu): there is no second"
    ):
        gradient.sum().backward()


def bad(error, message, op=rms_norm_rope, **changes):
    x, angles = torch.randn(2, 5, 3, 8), torch.randn(1, 5, 8)
    inputs = {
        rms_norm_rope: {"x": x, "weight": torch.ones(8), "cos": angles, "sin": angles},
        rms_norm_gated: {"x": x, "g": x, "weight": torch.ones(8)},
        add_rms_norm: {"x": x, "residual": x, "weight": torch.ones(8)},
        swiglu: {"x": x, "y": x},
    }[op]
    with pytest.raises(error, match=f"^{op.__name__}: {message}"):
        op(**(inputs | changes))


def test_wrong_arguments():
    bad(TypeError, "x must be a tensor, got list", x=[1.0])
    bad(TypeError, "x must be float64 or .*, got int64", x=torch.zeros(2, 5, 3, 8, dtype=torch.int64))
    bad(ValueError, r"x must have 4 dimensions \[B, T, H, D\], got \[2, 5, 8\]", x=torch.zeros(2, 5, 8))
    bad(ValueError, "x must have at least one dimension", x=torch.zeros(()), cos=None, sin=None)
    odd = {"x": torch.zeros(2, 5, 3, 7), "cos": torch.zeros(1, 5, 7), "sin": torch.zeros(1, 5, 7)}
    bad(ValueError, "x must have an even last dimension with cos and sin, got 7", **odd, weight=torch.ones(7))
    bad(ValueError, r"weight must have shape \[8\], got \[4\]", weight=torch.ones(4))
    bad(TypeError, "weight must be float64 or", weight=torch.ones(8, dtype=torch.int32))
    bad(ValueError, "weight must be given without cos and sin", weight=None, cos=None, sin=None)
    bad(ValueError, "weight must be on x's device cpu, got meta", weight=torch.ones(8, device="meta"))
    bad(ValueError, "sin must be given with cos, got None", sin=None)
    bad(ValueError, "cos must be given with sin, got None", cos=None)
    bad(ValueError, r"cos must have shape \[2, 5, 8\], got \[3, 5, 8\]", cos=torch.zeros(3, 5, 8))
    bad(ValueError, r"cos must have shape \[1, 5, 8\], got \[1, 5, 4\]", cos=torch.zeros(1, 5, 4))
    bad(ValueError, r"sin must have cos's shape \[1, 5, 8\], got \[2, 5, 8\]", sin=torch.zeros(2, 5, 8))
    bad(TypeError, "sin must have cos's dtype torch.float32, got torch.float64", sin=torch.zeros(1, 5, 8).double())
    bad(TypeError, "cos must be float64 or .*, got int64", cos=torch.zeros(1, 5, 8, dtype=torch.int64))
    bad(ValueError, "cos must not require grad", cos=torch.zeros(1, 5, 8).requires_grad_())


def test_wrong_second_argument():
    bad(ValueError, r"g must have x's shape \[2, 5, 3, 8\], got \[2, 5, 24\]", rms_norm_gated, g=torch.zeros(2, 5, 24))
    bad(TypeError, "g must have x's dtype torch.float32", rms_norm_gated, g=torch.zeros(2, 5, 3, 8).half())
    bad(ValueError, "activation must be one of .*, got 'relu'", rms_norm_gated, activation="relu")
    bad(TypeError, "weight must be a tensor, got NoneType", rms_norm_gated, weight=None)
    bad(ValueError, r"x must have shape \[2, 5, 3, 8\], got \[8\]", add_rms_norm, x=torch.zeros(8))
    wide = torch.zeros(2, 5, 3, 8).double()
    bad(TypeError, "x must have residual's dtype torch.float32 or a narrower one", add_rms_norm, x=wide)
    halves = {"x": torch.zeros(2, 5, 3, 8).half(), "residual": torch.zeros(2, 5, 3, 8).bfloat16()}
    bad(TypeError, "x must have residual's dtype torch.bfloat16 or a narrower one", add_rms_norm, **halves)
    bad(ValueError, r"weight must have shape \[8\]", add_rms_norm, weight=torch.zeros(8, 1))
    bad(ValueError, r"y must have x's shape \[2, 5, 3, 8\], got \[8\]", swiglu, y=torch.zeros(8))
    bad(TypeError, "y must have x's dtype torch.float32, got torch.float16", swiglu, y=torch.zeros(2, 5, 3, 8).half())
    bad(TypeError, "x must be float64 or .*, got bool", swiglu, x=torch.zeros(2, dtype=torch.bool))


def test_quantised_and_nested_tensors_are_refused():
    x = torch.randn(1, 8, 2, 16)
    with pytest.warns(UserWarning):  # torch's, that both are prototypes
        quantised = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
        nested = torch.nested.nested_tensor([x[0]])
    for op, given in ((hypenet_kernels.hype_attention, (quantised, x, x)), (hypenet_kernels.swiglu, (nested, nested))):
        with pytest.raises(NotImplementedError, match=f"^{op.__name__}: every tensor must be dense and not quantised"):
            op(*given)
