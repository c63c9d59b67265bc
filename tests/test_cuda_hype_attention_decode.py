"""The CUDA kernels of hype_attention_decode against the reference, on the emulator or a GPU (-m cuda)."""

from typing import NamedTuple

import emulation
import pytest
import torch
from compare import assert_matches_reference

from hypenet_kernels import hype_attention_decode, reference

SEGMENT = 256  # keys of a partial result (csrc/cuda/kernels.h)
MOST_SEGMENTS = 256
EMULATED_SMS = 4  # csrc/emu/state.h
NAN = float("nan")


class Shape(NamedTuple):
    T: int
    H: int
    HK: int
    D: int
    lengths: list  # keys of each sequence before the call
    room: int = 3  # rows of the cache beyond the longest sequence


SHAPES = {
    "the first token": Shape(1, 4, 2, 64, [0], room=0),
    "ragged, groups of four, full cache": Shape(1, 8, 2, 128, [5, 0, 300, 15, 16, 63], room=0),
    "around a segment": Shape(1, 2, 2, 64, [SEGMENT - 2, SEGMENT - 1, SEGMENT, SEGMENT + 1]),
    "four tokens over the end of a segment, groups of eight": Shape(4, 8, 1, 128, [SEGMENT - 2, 2 * SEGMENT - 1, 7]),
    "three tokens, groups of three, rows of five pieces": Shape(3, 3, 1, 40, [0, 70]),
    "rows that are not aligned": Shape(2, 4, 2, 100, [33, 17]),
    "odd head dimension": Shape(1, 2, 1, 5, [40]),
    "long head": Shape(2, 10, 2, 256, [90, 1]),
    "more sequences than a warp looks at": Shape(1, 1, 1, 8, [i % 7 for i in range(70)]),
}
MANY = 70_000  # more sequences than a grid's y
DTYPES = (torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SMALL = ("q", "k", "v", "gate")


def make_inputs(shape, dtype=torch.bfloat16, appends=True):
    """Return the arguments by name; cache rows beyond the lengths are NaN."""
    T, H, HK, D, lengths, room = shape
    B = len(lengths)
    held = lengths if appends else [length + T for length in lengths]
    inputs = {"q": torch.randn(B, T, H, D, dtype=dtype)}
    for name in ("k_cache", "v_cache"):
        inputs[name] = torch.full((B, max(lengths) + T + room, HK, D), NAN, dtype=dtype)
        for b, length in enumerate(held):
            inputs[name][b, :length] = torch.randn(length, HK, D)
    inputs["cache_seqlens"] = torch.tensor(held, dtype=torch.int32)
    if appends:
        inputs |= {name: torch.randn(B, T, HK, D, dtype=dtype) for name in ("k", "v")}
    return inputs


def moved(inputs, to):
    return {name: x.to(to, copy=True) for name, x in inputs.items()}


def as_type(inputs, dtype):
    return {name: x.to(dtype if x.is_floating_point() else None, copy=True) for name, x in inputs.items()}


def assert_equal(x, y):
    torch.testing.assert_close(x.cpu(), y.cpu(), rtol=0, atol=0, equal_nan=True)


def check(device, inputs, **options):
    """Compare output and caches with the reference; return the inputs and the output."""
    exact, eager = as_type(inputs, torch.float64), moved(inputs, "cpu")
    expected = reference.hype_attention_decode(**exact, **options)
    eager_o = reference.hype_attention_decode(**eager, **options)
    given = moved(inputs, device)
    o = hype_attention_decode(**given, **options)
    assert_matches_reference("o", o.cpu(), expected, eager_o)
    for name in ("k_cache", "v_cache"):
        assert_equal(given[name].double(), exact[name])
    return given, o


@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_caches(device, shape, dtype):
    check(device, make_inputs(SHAPES[shape], dtype), logit_scale_base=30.0)


def test_keys_in_place_gate_scale_and_no_base(device):
    inputs = make_inputs(Shape(2, 8, 2, 64, [100, 300, 0]), appends=False)
    inputs["gate"] = 3 * torch.randn_like(inputs["q"])
    check(device, inputs, scale=0.2)
    check(device, inputs | {"cache_seqlens": inputs["cache_seqlens"].long()}, scale=-0.1, logit_scale_base=1.5)


def test_more_rows_than_a_tile(device):
    check(device, make_inputs(Shape(5, 16, 2, 64, [40, 250])), logit_scale_base=9.0)


def test_segments_grow_with_very_long_sequences(device):
    long = SEGMENT * MOST_SEGMENTS
    check(device, make_inputs(Shape(2, 1, 1, 16, [long - 2, long - 1, 3])), logit_scale_base=362.0)


def test_large_logits_and_one_key(device):
    inputs = make_inputs(Shape(1, 4, 1, 64, [300]))
    inputs["q"] *= 300
    check(device, inputs)
    inputs = make_inputs(Shape(1, 6, 2, 64, [0, 0]))
    o = hype_attention_decode(**moved(inputs, device))
    assert_equal(o, inputs["v"].repeat_interleave(3, dim=2))


def test_lengths_out_of_range_give_nan_and_touch_nothing(device):
    inputs = make_inputs(Shape(2, 4, 2, 64, [9, 9, 9, 9, 9, 9], room=0))
    capacity = inputs["k_cache"].shape[1]
    lengths = torch.tensor([-1, 4, capacity - 1, 2**62, -(2**62), capacity - 2])
    for name in ("k_cache", "v_cache"):
        inputs[name] = inputs[name].nan_to_num(0.5)
    given = moved(inputs | {"cache_seqlens": lengths}, device)
    o = hype_attention_decode(**given)
    wrong, right = [0, 2, 3, 4], [1, 5]
    alone = {name: x[right] for name, x in (inputs | {"cache_seqlens": lengths}).items()}
    assert o[wrong].isnan().all()
    assert_equal(o[right], check(device, alone)[1])
    for name in ("k_cache", "v_cache"):
        assert_equal(given[name][wrong], inputs[name][wrong])
    given = moved(make_inputs(Shape(2, 4, 2, 64, [9, 9]), appends=False), device)
    given["cache_seqlens"][0] = 1  # fewer keys than tokens
    assert hype_attention_decode(**given)[0].isnan().all()


# ---- layouts


def head_major(cache):
    return cache.transpose(1, 2).contiguous().transpose(1, 2)


def pool(cache):
    """Return x as a slice of a larger allocation: every second sequence, padded rows, half of fused heads."""
    B, capacity, HK, D = cache.shape
    view = cache.new_full((2 * B, capacity + 5, 2 * HK, D), NAN)[::2, 2 : capacity + 2, HK:]
    return view.copy_(cache)


def padded(cache):
    """Return x with rows that are not aligned to 16 bytes."""
    view = cache.new_full((*cache.shape[:-1], cache.shape[-1] + 3), NAN)[..., 1:-2]
    return view.copy_(cache)


@pytest.mark.parametrize("layout", [head_major, pool, padded])
def test_caches_in_any_layout(device, layout):
    inputs = make_inputs(Shape(2, 4, 2, 64, [30, 0, 260]))
    plain, strided = moved(inputs, device), moved(inputs, device)
    strided |= {name: layout(strided[name]) for name in ("k_cache", "v_cache")}
    assert_equal(hype_attention_decode(**strided), hype_attention_decode(**plain))
    for name in ("k_cache", "v_cache"):
        assert_equal(strided[name], plain[name])


def test_slices_of_a_fused_projection(device):
    inputs = make_inputs(Shape(3, 4, 2, 64, [30, 0]))
    inputs["gate"] = torch.randn_like(inputs["q"])
    given = moved(inputs, device)
    fused = torch.cat([given[name].flatten(2) for name in SMALL], dim=-1)
    padding = torch.zeros_like(fused[..., :3])  # no slice is aligned
    fused = torch.cat([padding, fused], dim=-1)[..., 3:]
    parts = fused.split([given[name].flatten(2).shape[-1] for name in SMALL], dim=-1)
    sliced = {name: x.unflatten(-1, (-1, 64)) for name, x in zip(SMALL, parts, strict=True)}
    sliced = moved(inputs, device) | sliced
    assert_equal(hype_attention_decode(**sliced), hype_attention_decode(**given))


@pytest.mark.parametrize("B, T", [(0, 1), (2, 0)])
def test_empty_problems(device, B, T):
    cache = torch.zeros(B, 6, 2, 8, dtype=torch.bfloat16, device=device)
    q, k = (torch.zeros(B, T, heads, 8, dtype=torch.bfloat16, device=device) for heads in (4, 2))
    lengths = torch.full((B,), 4, device=device)
    assert hype_attention_decode(q, cache, cache.clone(), lengths, k=k, v=k).shape == q.shape


# ---- determinism


def test_bits_depend_on_the_sequence_alone(device):
    """They do not depend on the batch, the capacity or the number of tokens per call."""
    lengths, T = [3, 2 * SEGMENT + 9, 100], 3
    inputs = make_inputs(Shape(T, 4, 1, 64, lengths))
    inputs["gate"] = torch.randn_like(inputs["q"])
    together = hype_attention_decode(**moved(inputs, device), logit_scale_base=7.0)
    for b in range(len(lengths)):
        alone = moved({name: x[b : b + 1] for name, x in inputs.items()}, device)
        for name in ("k_cache", "v_cache"):
            alone[name] = alone[name][:, : lengths[b] + T].clone()
        one_by_one = []
        for t in range(T):
            token = {name: alone[name][:, t : t + 1] for name in SMALL}
            one_by_one.append(hype_attention_decode(**alone | token, logit_scale_base=7.0))
            alone["cache_seqlens"] += 1
        assert_equal(torch.cat(one_by_one, dim=1)[0], together[b])


@pytest.mark.parametrize("seed", emulation.SEEDS)
def test_any_order_of_threads_and_any_number_of_sms_give_the_same_bits(seed):
    inputs = make_inputs(Shape(2, 8, 2, 64, [SEGMENT + 30, 100, 0]))
    with emulation.emulated():
        expected = hype_attention_decode(**moved(inputs, "cpu"))
    with emulation.emulated(seed):
        try:
            emulation.module().set_num_processors(seed + 1)
            assert_equal(hype_attention_decode(**moved(inputs, "cpu")), expected)
        finally:
            emulation.module().set_num_processors(EMULATED_SMS)


# ---- on a GPU


@pytest.mark.cuda
def test_more_sequences_than_a_grid_has_rows():
    """A few sequences, repeated."""
    few = make_inputs(Shape(1, 1, 1, 64, [i % 5 for i in range(70)]))
    many = {name: x.repeat(MANY // 70, *[1] * (x.dim() - 1)) for name, x in moved(few, "cuda").items()}
    _, o = check("cuda", few)
    assert_equal(hype_attention_decode(**many), o.repeat(MANY // 70, 1, 1, 1))


@pytest.mark.cuda
def test_graph_follows_the_lengths_on_the_device():
    inputs = moved(make_inputs(Shape(1, 8, 2, 128, [0, 500, 255], room=8)), "cuda")
    lengths, steps = inputs["cache_seqlens"].clone(), 4
    eager = moved(inputs, "cuda")
    hype_attention_decode(**inputs)  # loads the kernels before the capture; appends what the graph will again
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = hype_attention_decode(**inputs)
    for _ in range(steps):
        graph.replay()
        assert_equal(o, hype_attention_decode(**eager))
        for x in (inputs, eager):
            x["cache_seqlens"] += 1
    assert_equal(inputs["cache_seqlens"], lengths + steps)
    assert_equal(inputs["k_cache"], eager["k_cache"])


# ---- errors


@pytest.mark.parametrize(
    "D, dtype, message",
    [
        (64, torch.float32, "q must be bfloat16 or float16 on CUDA, got float32"),
        (264, torch.bfloat16, "q must have a head dimension of at most 256 on CUDA, got 264"),
    ],
)
def test_refuses(device, D, dtype, message):
    with pytest.raises(NotImplementedError, match=f"^hype_attention_decode: {message}"):
        hype_attention_decode(**moved(make_inputs(Shape(1, 2, 1, D, [3]), dtype), device))
