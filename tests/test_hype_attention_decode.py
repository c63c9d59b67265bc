"""hype_attention_decode, a few query tokens against a KV cache: against the reference and hype_attention."""

import functools
from typing import NamedTuple

import pytest
import torch
from compare import assert_matches_reference

from hypenet_kernels import hype_attention, hype_attention_decode, reference

SPLIT = 64  # keys per partial result of the CPU kernel for short sequences (csrc/cpu/hype_attention_decode.cpp)
LONGEST_SPLIT = 512  # the same for long sequences, of more than 64 splits
ROWS = 64  # query rows per key head and round, likewise
LOW_PRECISION = (torch.bfloat16, torch.float16)
DTYPES = [torch.float64, torch.float32, *LOW_PRECISION]


class Shape(NamedTuple):
    T: int
    H: int
    HK: int
    D: int
    lengths: list  # keys of each sequence before the call


SHAPES = {
    "the first token": Shape(1, 4, 2, 32, [0]),
    "unequal lengths, groups of four": Shape(1, 8, 2, 64, [5, 0, 131, 64]),
    "around a split": Shape(1, 2, 2, 20, [SPLIT - 2, SPLIT - 1, SPLIT, SPLIT + 1]),
    "three tokens over the end of a split": Shape(3, 8, 1, 100, [SPLIT - 2, 2 * SPLIT - 1, 7]),
    "one row per key head": Shape(1, 3, 3, 128, [3 * SPLIT - 4, SPLIT + 2]),
    "tiles of four, two and one rows": Shape(1, 7, 1, 48, [SPLIT + 26]),
    "head dimension shorter than a vector": Shape(2, 3, 3, 5, [17, 40]),
    "long head": Shape(1, 2, 1, 256, [77]),
    "more rows than one round takes": Shape(ROWS // 8 + 3, 16, 2, 16, [70, SPLIT - 4]),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make_caches(lengths, capacity, HK, D, dtype):
    """Return two caches whose rows beyond the lengths are NaN."""
    caches = [torch.full((len(lengths), capacity, HK, D), float("nan"), dtype=dtype) for _ in range(2)]
    for cache in caches:
        for b, length in enumerate(lengths):
            cache[b, :length] = torch.randn(length, HK, D)
    return caches


def make_inputs(shape, dtype, appends=True):
    """Return the arguments by name; the caches have a capacity of 3 tokens more than are written."""
    T, H, HK, D, lengths = shape
    B = len(lengths)
    held = lengths if appends else [length + T for length in lengths]
    k_cache, v_cache = make_caches(held, max(lengths) + T + 3, HK, D, dtype)
    inputs = {"q": torch.randn(B, T, H, D, dtype=dtype), "k_cache": k_cache, "v_cache": v_cache}
    inputs["cache_seqlens"] = torch.tensor(held, dtype=torch.int32)
    if appends:
        inputs |= {name: torch.randn(B, T, HK, D, dtype=dtype) for name in ("k", "v")}
    return inputs


def copies(inputs, dtype=None):
    """Return copies of the arguments, with float tensors in another dtype."""
    return {name: x.to(dtype if x.is_floating_point() else None, copy=True) for name, x in inputs.items()}


def assert_op_matches_reference(inputs, **options):
    dtype = inputs["q"].dtype
    expected_inputs = copies(inputs, torch.float64)
    expected = reference.hype_attention_decode(**expected_inputs, **options)
    eager = None
    if dtype in LOW_PRECISION:
        eager = reference.hype_attention_decode(**copies(inputs), **options)
    o = hype_attention_decode(**inputs, **options)
    assert o.dtype == dtype
    assert_matches_reference("o", o, expected, eager)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(inputs[name].double(), expected_inputs[name], rtol=0, atol=0, equal_nan=True)


# ---- against the reference


@dtypes
@pytest.mark.parametrize("appends", [True, False], ids=["append", "keys in place"])
@shapes
def test_output_and_caches(shape, appends, dtype):
    assert_op_matches_reference(make_inputs(shape, dtype, appends), logit_scale_base=30.0)


@dtypes
def test_gate_scale_and_no_base(dtype):
    inputs = make_inputs(Shape(2, 4, 2, 40, [100, 33]), dtype)
    inputs["gate"] = torch.randn_like(inputs["q"])
    assert_op_matches_reference(inputs, scale=0.2)


@dtypes
def test_splits_grow_with_the_sequence(dtype):
    inputs = make_inputs(Shape(1, 2, 1, 8, [64 * SPLIT + 5, 64 * LONGEST_SPLIT + 3]), dtype)
    assert_op_matches_reference(inputs, logit_scale_base=500.0)


@pytest.mark.slow
@dtypes
def test_thirty_thousand_keys(dtype):
    assert_op_matches_reference(make_inputs(Shape(1, 8, 2, 128, [30_000, 9_999]), dtype), logit_scale_base=500.0)


# ---- one call or several


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("pieces", [[1] * 9, [3, 1, 5], [9]], ids=str)
def test_equals_attention_over_the_whole_sequence(pieces, index_dtype):
    prefix, T = 70, 9
    q, gate = (torch.randn(2, prefix + T, 4, 24, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, prefix + T, 2, 24, dtype=torch.float64) for _ in range(2))
    expected = hype_attention(q, k, v, gate=gate, logit_scale_base=15.0)[:, prefix:]
    k_cache, v_cache = make_caches([0, 0], prefix + T, 2, 24, torch.float64)
    k_cache[:, :prefix], v_cache[:, :prefix] = k[:, :prefix], v[:, :prefix]
    o, begin = [], prefix
    for size in pieces:
        new = slice(begin, begin + size)
        lengths = torch.full((2,), begin, dtype=index_dtype)
        options = {"k": k[:, new], "v": v[:, new], "gate": gate[:, new], "logit_scale_base": 15.0}
        o.append(hype_attention_decode(q[:, new], k_cache, v_cache, lengths, **options))
        assert (lengths == begin).all()
        begin += size
    assert_matches_reference("o", torch.cat(o, dim=1), expected)
    assert torch.equal(k_cache, k)
    assert torch.equal(v_cache, v)


def test_sequences_do_not_see_their_batch():
    shape = Shape(2, 4, 1, 32, [3, SPLIT + 9, 100])
    inputs = make_inputs(shape, torch.float32)
    together = hype_attention_decode(**copies(inputs), logit_scale_base=7.0)
    for b in range(3):
        alone = hype_attention_decode(
            **copies({name: x[b : b + 1] for name, x in inputs.items()}), logit_scale_base=7.0
        )
        assert torch.equal(alone[0], together[b])


# ---- closed forms and extreme values


@dtypes
def test_one_key_returns_its_value(dtype):
    inputs = make_inputs(Shape(1, 6, 2, 20, [0, 0]), dtype)
    assert torch.equal(hype_attention_decode(**inputs), inputs["v"].repeat_interleave(3, dim=2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1.0, 1e3], ids=["small logits", "large logits"])
def test_identical_keys_average_the_values(size, dtype):
    inputs = make_inputs(Shape(1, 4, 2, 48, [2 * SPLIT + 3]), dtype, appends=False)
    inputs["k_cache"][:] = inputs["k_cache"][:, :1] * size
    mean = inputs["v_cache"][:, : 2 * SPLIT + 4].double().mean(1, keepdim=True)
    inputs["q"] *= size
    assert_matches_reference("o", hype_attention_decode(**inputs), mean.repeat_interleave(2, dim=2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_in_the_thousands(dtype):
    inputs = make_inputs(Shape(2, 4, 2, 64, [2 * SPLIT, 40]), dtype)
    inputs["q"] *= 4000
    assert (torch.einsum("bthd,bthd->bth", inputs["q"][:, :, ::2], inputs["k"]) / 8).abs().max() > 3e3
    expected = reference.hype_attention_decode(**copies(inputs, torch.float64))
    eager = None if dtype == torch.float64 else reference.hype_attention_decode(**copies(inputs))
    assert_matches_reference("o", hype_attention_decode(**inputs), expected, eager)


# ---- layouts


def head_major(cache):
    return cache.transpose(1, 2).contiguous().transpose(1, 2)


def pool(cache):
    """Return x as a slice of a larger allocation: every second sequence, padded rows, half of fused heads."""
    B, capacity, HK, D = cache.shape
    larger = cache.new_full((2 * B, capacity + 5, 2 * HK, D), float("nan"))
    view = larger[::2, 2 : capacity + 2, HK:]
    view.copy_(cache)
    return view


@dtypes
@pytest.mark.parametrize("layout", [head_major, pool])
def test_caches_are_updated_in_place_in_any_layout(layout, dtype):
    inputs = make_inputs(Shape(2, 4, 2, 24, [30, 0]), dtype)
    strided = inputs | {name: layout(inputs[name]) for name in ("k_cache", "v_cache")}
    assert not strided["k_cache"].is_contiguous()
    assert torch.equal(hype_attention_decode(**strided), hype_attention_decode(**inputs))
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(strided[name], inputs[name], rtol=0, atol=0, equal_nan=True)


def test_any_strides_of_queries_keys_and_gate():
    inputs = make_inputs(Shape(3, 4, 2, 24, [30, 0]), torch.float32)
    inputs["gate"] = torch.randn_like(inputs["q"])
    small = ("q", "k", "v", "gate")
    strided = copies(inputs) | {name: inputs[name].transpose(1, 3).contiguous().transpose(1, 3) for name in small}
    fused = torch.cat([inputs[name].flatten(2) for name in small], dim=-1)
    sizes = [inputs[name].flatten(2).shape[-1] for name in small]
    slices = [x.unflatten(-1, (-1, 24)) for x in fused.split(sizes, dim=-1)]
    sliced = copies(inputs) | dict(zip(small, slices, strict=True))
    expected = hype_attention_decode(**inputs)
    assert torch.equal(hype_attention_decode(**strided), expected)
    assert torch.equal(hype_attention_decode(**sliced), expected)


@pytest.mark.parametrize("B, T", [(0, 1), (2, 0)])
def test_empty_problems(B, T):
    k_cache, v_cache = make_caches([4] * B, 6, 2, 8, torch.float32)
    q, k = torch.randn(B, T, 4, 8), torch.randn(B, T, 2, 8)
    lengths = torch.full((B,), 4)
    assert hype_attention_decode(q, k_cache, v_cache, lengths, k=k, v=k).shape == q.shape


# ---- determinism


@dtypes
def test_any_number_of_threads_gives_the_same_bits(dtype):
    inputs = make_inputs(Shape(2, 8, 2, 64, [3 * SPLIT + 7, 100]), dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(hype_attention_decode(**copies(inputs)))
    finally:
        torch.set_num_threads(before)
    for o in results[1:]:
        assert torch.equal(o, results[0])


# ---- as a PyTorch op


@pytest.mark.parametrize("appends", [True, False])
def test_opcheck(appends):
    inputs = make_inputs(Shape(2, 4, 2, 8, [3, 9]), torch.float32, appends)
    arguments = [inputs.get(name) for name in ("q", "k_cache", "v_cache", "cache_seqlens", "k", "v", "gate")]
    arguments[1:3] = (x.nan_to_num() for x in arguments[1:3])
    torch.library.opcheck(torch.ops.hypenet.hype_attention_decode.default, (*arguments, 9.0, 8**-0.5))


def test_compiles_without_a_graph_break():
    inputs = make_inputs(Shape(1, 4, 2, 8, [3, 9]), torch.float32)
    compiled = torch.compile(
        functools.partial(hype_attention_decode, logit_scale_base=5.0), fullgraph=True, backend="aot_eager"
    )
    expected_inputs = copies(inputs)
    expected = hype_attention_decode(**expected_inputs, logit_scale_base=5.0)
    assert torch.equal(compiled(**inputs), expected)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(inputs[name], expected_inputs[name], rtol=0, atol=0, equal_nan=True)


# ---- errors


def ones(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


CACHE = (2, 10, 2, 8)
ERRORS = {
    "q no tensor": ({"q": None}, TypeError, "q must be a tensor, got NoneType"),
    "cache no tensor": ({"k_cache": [1.0]}, TypeError, "k_cache must be a tensor, got list"),
    "q rank": ({"q": ones(2, 4, 8)}, ValueError, r"q must have 4 dimensions \[B, T, H, D\], got \[2, 4, 8\]"),
    "cache rank": ({"k_cache": ones(2, 10, 16)}, ValueError, "k_cache must have 4 dimensions"),
    "q integer": ({"q": ones(2, 2, 4, 8, dtype=torch.int64)}, TypeError, "q must be float64 or .*, got int64"),
    "cache dtype": ({"k_cache": ones(*CACHE).bfloat16()}, TypeError, "k_cache must have q's dtype torch.float32"),
    "v_cache dtype": ({"v_cache": ones(*CACHE).double()}, TypeError, "v_cache must have k_cache's dtype"),
    "k dtype": ({"k": ones(2, 2, 2, 8).double()}, TypeError, "k must have q's dtype torch.float32, got torch.float64"),
    "gate dtype": ({"gate": ones(2, 2, 4, 8).double()}, TypeError, "gate must have q's dtype"),
    "lengths dtype": ({"cache_seqlens": ones(2)}, TypeError, "cache_seqlens must be int32 or int64, got float32"),
    "cache device": (
        {"v_cache": ones(*CACHE, device="meta")},
        ValueError,
        "v_cache must be on q's device cpu, got meta",
    ),
    "lengths device": (
        {"cache_seqlens": torch.zeros(2, device="meta")},
        ValueError,
        "cache_seqlens must be on q's device",
    ),
    "heads": ({"q": ones(2, 2, 3, 8)}, ValueError, "number of heads must be a multiple of k_cache's = 2, got 3"),
    "cache batch": ({"k_cache": ones(3, 10, 2, 8)}, ValueError, r"k_cache must have shape \[2, 10, 2, 8\], got \[3,"),
    "cache head dimension": ({"k_cache": ones(2, 10, 2, 4)}, ValueError, r"k_cache must have shape \[2, 10, 2, 8\]"),
    "v_cache shape": ({"v_cache": ones(2, 9, 2, 8)}, ValueError, r"v_cache must have k_cache's shape \[2, 10, 2, 8\]"),
    "cache layout": (
        {"k_cache": ones(2, 10, 8, 2).transpose(2, 3)},
        ValueError,
        "k_cache must have a contiguous last dimension, got strides",
    ),
    "expanded cache": ({"v_cache": ones(1, 10, 2, 8).expand(*CACHE)}, ValueError, "v_cache must not be expanded"),
    "k shape": ({"k": ones(2, 1, 2, 8)}, ValueError, r"k must have shape \[2, 2, 2, 8\], got \[2, 1, 2, 8\]"),
    "v shape": ({"v": ones(2, 2, 1, 8)}, ValueError, r"v must have shape \[2, 2, 2, 8\], got \[2, 2, 1, 8\]"),
    "k alone": ({"v": None}, ValueError, "v must be given with k, got None"),
    "v alone": ({"k": None}, ValueError, "k must be given with v, got None"),
    "gate shape": ({"gate": ones(2, 2, 2, 8)}, ValueError, r"gate must have q's shape \[2, 2, 4, 8\]"),
    "lengths shape": (
        {"cache_seqlens": torch.tensor([3])},
        ValueError,
        r"cache_seqlens must have shape \[2\], got \[1\]",
    ),
    "lengths negative": (
        {"cache_seqlens": torch.tensor([3, -1])},
        ValueError,
        r"cache_seqlens must be at least 0, got",
    ),
    "lengths below T": (
        {"cache_seqlens": torch.tensor([3, 1]), "k": None, "v": None},
        ValueError,
        r"cache_seqlens must be at least 2, got \[3, 1\]",
    ),
    "no room": (
        {"cache_seqlens": torch.tensor([3, 9])},
        ValueError,
        r"cache_seqlens must leave space for T = 2 more keys in a capacity of 10, got \[3, 9\]",
    ),
    "beyond the capacity": (
        {"cache_seqlens": torch.tensor([3, 11]), "k": None, "v": None},
        ValueError,
        r"cache_seqlens must not exceed the capacity of 10, got \[3, 11\]",
    ),
    "base of one": ({"logit_scale_base": 1}, ValueError, "logit_scale_base must be greater than 1 .*, got 1"),
    "base of letters": ({"logit_scale_base": "e"}, TypeError, "logit_scale_base must be a number, got str"),
    "scale of letters": ({"scale": "1"}, TypeError, "scale must be a number, got str"),
    "q wants a gradient": ({"q": ones(2, 2, 4, 8).requires_grad_()}, ValueError, "q must not require grad"),
    "gate wants a gradient": ({"gate": ones(2, 2, 4, 8).requires_grad_()}, ValueError, "gate must not require grad"),
    "cache wants a gradient": ({"k_cache": ones(*CACHE).requires_grad_()}, ValueError, "k_cache must not require grad"),
}


@pytest.mark.parametrize("changes, error, message", ERRORS.values(), ids=ERRORS.keys())
def test_refuses(changes, error, message):
    arguments = {"q": ones(2, 2, 4, 8), "k_cache": ones(*CACHE), "v_cache": ones(*CACHE)}
    arguments |= {"cache_seqlens": torch.tensor([3, 0]), "k": ones(2, 2, 2, 8), "v": ones(2, 2, 2, 8)} | changes
    caches = [arguments[name] for name in ("k_cache", "v_cache")]
    with pytest.raises(error, match=f"^hype_attention_decode: .*{message}"):
        hype_attention_decode(**arguments)
    for cache in caches:
        if isinstance(cache, torch.Tensor) and cache.device.type == "cpu":
            assert (cache == 1).all()


def test_parameters_are_welcome_without_a_gradient():
    inputs = make_inputs(Shape(1, 4, 2, 8, [3, 9]), torch.float32)
    inputs["q"].requires_grad_()
    with torch.no_grad():
        assert not hype_attention_decode(**inputs).requires_grad
