"""Random calls of every op: right inputs give what the reference gives, wrong ones an error in our words.

Sizes, strides, dtypes, bounds and indices are random. What is not finite stays in its own sequence.
"""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hypenet_kernels as kernels
from hypenet_kernels import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Relative to the reference's RMS, or to 1 where that is smaller.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
WRITTEN = ("state", "conv_state", "k_cache", "v_cache")  # arguments that ops update in place
ERRORS = (ValueError, TypeError, NotImplementedError)


class Draw(random.Random):
    """A source of random arguments, from one seed."""

    def __init__(self, seed):
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.choice(DTYPES)

    def tensor(self, *shape, dtype=None, scale=1.0, low=None):
        """Return normal values, or uniform ones from low to 0, in a random memory layout."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        x = x if low is None else low * torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return self.layout(x.to(dtype or self.dtype))

    def layout(self, x):
        kind = self.randrange(5)
        if kind == 0 and x.dim() >= 2:  # transposed in memory
            i, j = self.sample(range(x.dim()), 2)
            return x.transpose(i, j).contiguous().transpose(i, j)
        if kind == 1:  # every other element of a dimension
            dim = self.randrange(x.dim())
            wide = x.repeat_interleave(2, dim)
            return wide[(slice(None),) * dim + (slice(None, None, 2),)]
        if kind == 2 and x.numel():  # a part of a larger tensor
            wide = torch.full([n + 2 for n in x.shape], float("nan"), dtype=x.dtype)
            part = wide[tuple(slice(1, n + 1) for n in x.shape)]
            part.copy_(x)
            return part
        return x

    def bounds(self, T):
        """Return cu_seqlens of up to four sequences, some of them empty, that may end before T."""
        inner = sorted(self.randint(0, T) for _ in range(self.randint(1, 4)))
        return torch.tensor([0, *inner], dtype=self.choice((torch.int32, torch.int64)))

    def indices(self, values):
        return torch.tensor(values, dtype=self.choice((torch.int32, torch.int64)))

    def maybe(self, make):
        return make() if self.random() < 0.5 else None


# ---- one function per family, which returns (op, reference, arguments, sequences): the last maps a sequence to the
# function that takes its own part of an argument, or of a result


def recurrence(d):
    delta = d.random() < 0.5
    packed, H, group = d.random() < 0.5, d.randint(1, 2), d.randint(1, 3)
    B, T, K, V = 1 if packed else d.randint(1, 3), d.randint(0, 40), d.randint(1, 20), d.randint(1, 20)
    recurrent = d.random() < 0.3
    names = ("fused_recurrent" if recurrent else "chunk") + ("_gated_delta_rule" if delta else "_simple_gla")
    given = {"q": d.tensor(B, T, H, K), "k": d.tensor(B, T, H, K, scale=K**-0.5), "v": d.tensor(B, T, H * group, V)}
    wide = d.choice((d.dtype, torch.float32))
    given["g"] = d.tensor(B, T, H * group, dtype=wide, low=-2.0)
    if delta:
        given["beta"] = -d.tensor(B, T, H * group, dtype=wide, low=-1.0)
    bounds = d.bounds(T) if packed else None
    N = B if bounds is None else bounds.numel() - 1
    if d.random() < 0.5:
        given["initial_state"] = d.tensor(N, H * group, K, V, dtype=d.choice((torch.float32, torch.float64)), scale=0.3)
    given |= {"cu_seqlens": bounds, "output_final_state": True, "scale": d.maybe(lambda: d.uniform(-1, 1))}
    meaning = reference.chunk_gated_delta_rule if delta else reference.chunk_simple_gla
    return getattr(kernels, names), meaning, given, sequences_of(B, bounds)


def attention(d):
    packed, HK, group = d.random() < 0.6, d.randint(1, 2), d.randint(1, 4)
    B, T, D = 1 if packed else d.randint(1, 3), d.randint(0, 40), d.randint(1, 20)
    bounds, offset = (d.bounds(T) if packed else None), 0 if packed else d.choice((0, d.randint(0, 90)))
    shape = (B, offset + T)
    if packed and d.random() < 0.5:
        lengths, capacity = bounds.diff().tolist(), T + d.randint(0, 80)
        offset, shape = d.indices([d.randint(0, capacity - n) for n in lengths]), (len(lengths), capacity)
    given = {"q": d.tensor(B, T, HK * group, D), "k": d.tensor(*shape, HK, D), "v": d.tensor(*shape, HK, D)}
    given |= {"gate": d.maybe(lambda: d.tensor(B, T, HK * group, D)), "cu_seqlens": bounds, "query_offset": offset}
    given |= {"logit_scale_base": d.maybe(lambda: d.uniform(1.1, 1000)), "scale": d.maybe(lambda: d.uniform(-1, 1))}
    sequences = sequences_of(B, bounds)
    if isinstance(offset, torch.Tensor):
        own = sequences
        sequences = {n: lambda name, x, n=n: x[n : n + 1] if name in ("k", "v") else own[n](name, x) for n in own}
    return kernels.hype_attention, reference.hype_attention, given, sequences


def decode(d):
    B, T, HK, group, D = d.randint(1, 3), d.randint(1, 4), d.randint(1, 2), d.randint(1, 4), d.randint(1, 20)
    capacity = T + d.randint(0, 80)
    appended = d.random() < 0.5
    lowest, highest = (0, capacity - T) if appended else (T, capacity)
    given = {"q": d.tensor(B, T, HK * group, D)}
    given |= {
        name: torch.randn(B, capacity, HK, D, generator=d.generator).to(d.dtype) for name in ("k_cache", "v_cache")
    }
    given["cache_seqlens"] = d.indices([d.randint(lowest, highest) for _ in range(B)])
    if appended:
        given |= {"k": d.tensor(B, T, HK, D), "v": d.tensor(B, T, HK, D)}
    given["gate"] = d.maybe(lambda: d.tensor(B, T, HK * group, D))
    given["logit_scale_base"] = d.maybe(lambda: d.uniform(1.1, 1000))
    return kernels.hype_attention_decode, reference.hype_attention_decode, given, sequences_of(B, None)


def step(d):
    delta = d.random() < 0.5
    B, T, H, group = d.randint(1, 3), d.randint(1, 4), d.randint(1, 2), d.randint(1, 3)
    K, V = d.randint(1, 20), d.randint(1, 20)
    given = {"q": d.tensor(B, T, H, K), "k": d.tensor(B, T, H, K, scale=K**-0.5), "v": d.tensor(B, T, H * group, V)}
    given["g"] = d.tensor(B, T, H * group, low=-2.0)
    if delta:
        given["beta"] = -d.tensor(B, T, H * group, low=-1.0)
    wide = torch.float64 if d.dtype == torch.float64 else torch.float32
    slots = d.sample(range(5), B)
    given["state"] = torch.randn(5, H * group, K, V, generator=d.generator).to(wide) * 0.3
    given["state_indices"] = d.indices([-1 if d.random() < 0.2 else slot for slot in slots])

    def meaning(q, k, v, g, state, state_indices, beta=None):
        o = torch.zeros_like(v)
        for b, slot in enumerate(state_indices.tolist()):
            if slot >= 0:
                inputs = [x[b : b + 1] for x in (q, k, v, g)]
                if beta is None:
                    found = reference.chunk_simple_gla(
                        *inputs, initial_state=state[slot][None], output_final_state=True
                    )
                else:
                    found = reference.chunk_gated_delta_rule(
                        *inputs, beta[b : b + 1], initial_state=state[slot][None], output_final_state=True
                    )
                o[b], state[slot] = found[0][0], found[1][0]
        return o

    op = kernels.gated_delta_step if delta else kernels.simple_gla_step
    indices = given["state_indices"].tolist()

    def own(n):
        return lambda name, x: x[indices[n]][None] if name == "state" else x[n : n + 1]

    return op, meaning, given, {n: own(n) for n in range(B) if indices[n] >= 0}


def convolution(d):
    packed = d.random() < 0.5
    B, C, T, W = 1 if packed else d.randint(1, 3), d.randint(1, 20), d.randint(0, 40), d.randint(2, 4)
    bounds = d.bounds(T) if packed else None
    N = B if bounds is None else bounds.numel() - 1
    given = {"x": d.tensor(B, C, T), "weight": d.tensor(C, W), "bias": d.maybe(lambda: d.tensor(C))}
    given |= {"initial_states": d.maybe(lambda: d.tensor(N, C, W - 1)), "activation": d.choice((None, "silu", "swish"))}
    given["cu_seqlens"] = bounds

    def op(**arguments):
        return kernels.causal_conv1d_fn(**arguments, return_final_states=True)

    op.__name__ = "causal_conv1d_fn"
    tokens = sequences_of(B, bounds)

    def own(n):
        def part(name, x):
            states = name == "initial_states" or (name == "result" and x.shape[2] != T) or bounds is None
            return x[n : n + 1] if states else tokens[n](name, x.mT).mT

        return part

    return op, reference.causal_conv1d_fn, given, {n: own(n) for n in tokens} if W - 1 != T else {}


def update(d):
    """A ring or a window of inputs: the reference runs on the inputs before the call and the new ones."""
    B, C, T, W = d.randint(1, 3), d.randint(1, 20), d.randint(1, 4), d.randint(2, 4)
    given = {"x": d.tensor(B, C, T), "conv_state": d.tensor(B, C, W - 1), "weight": d.tensor(C, W)}
    given |= {"bias": d.maybe(lambda: d.tensor(C)), "activation": d.choice((None, "silu"))}

    def meaning(x, conv_state, weight, bias=None, activation=None):
        y, state = reference.causal_conv1d_fn(x, weight, bias, conv_state, activation)
        conv_state.copy_(state)
        return y

    return kernels.causal_conv1d_update, meaning, given, sequences_of(B, None)


def commit(d):
    B, T, HV, K, V = d.randint(0, 3), d.randint(1, 5), d.randint(1, 3), d.randint(1, 9), d.randint(1, 9)
    dtype = d.choice((torch.float32, torch.float64))
    slots = d.sample(range(5), B)
    given = {"state": torch.randn(5, HV, K, V, dtype=dtype), "states": d.tensor(B, T, HV, K, V, dtype=dtype)}
    given["num_accepted"] = d.indices([d.randint(0, T) for _ in range(B)])
    given["state_indices"] = d.indices([-1 if d.random() < 0.2 else slot for slot in slots])

    def op(**arguments):
        kernels.commit_states(**arguments)
        return ()

    op.__name__ = "commit_states"

    def meaning(**arguments):
        reference.commit_states(**arguments)
        return ()

    return op, meaning, given, {}


def norms(d):
    B, T, H, size = d.randint(0, 3), d.randint(0, 9), d.randint(1, 3), 2 * d.randint(1, 12)
    x, weight = d.tensor(B, T, H, size), d.tensor(size, dtype=d.choice((d.dtype, torch.float32)))
    rows = {n: lambda name, x, n=n: x if name in ("weight", "cos", "sin") else x[n : n + 1] for n in range(B)}
    kind = d.randrange(4)
    if kind == 0:
        angles = d.tensor(B, T, size, dtype=torch.float32)
        given = {"x": x, "weight": d.choice((weight, None)), "cos": angles.cos(), "sin": angles.sin()}
        return kernels.rms_norm_rope, reference.rms_norm_rope, given, {}
    if kind == 1:
        given = {"x": x, "g": d.tensor(B, T, H, size), "weight": weight, "activation": d.choice(("silu", "sigmoid"))}
        return kernels.rms_norm_gated, reference.rms_norm_gated, given, rows
    if kind == 2:
        wide = d.choice((d.dtype, torch.promote_types(d.dtype, torch.float32)))
        given = {"x": x, "residual": d.tensor(B, T, H, size, dtype=wide), "weight": weight}
        return kernels.add_rms_norm, reference.add_rms_norm, given, rows
    return kernels.swiglu, reference.swiglu, {"x": x, "y": d.tensor(B, T, H, size)}, rows


FAMILIES = (recurrence, attention, decode, step, convolution, update, commit, norms)


def sequences_of(B, bounds):
    """Return, for every sequence, what its part of a tensor [B, T, ...], or of one with an entry for each, is."""
    if bounds is None:
        return {n: lambda name, x, n=n: x[n : n + 1] for n in range(B)}
    ends = bounds.tolist()
    N = len(ends) - 1

    def own(n):
        def part(name, x):
            is_state = name == "initial_state" or (name == "result" and x.shape[0] == N and x.dim() == 4 and N > 1)
            return x[n : n + 1] if is_state else x[:, ends[n] : ends[n + 1]]

        return part

    return {n: own(n) for n in range(N) if ends[n + 1] > ends[n] and N > 1}


# ---- the checks


def call(function, given):
    """Return the results of a call, named "result", and the arguments that it wrote into, by their names."""
    copies = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    for name, x in given.items():  # a clone is dense; what is under test is the layout
        if isinstance(x, torch.Tensor) and name not in WRITTEN:
            copies[name] = x
    results = function(**copies)
    results = results if isinstance(results, tuple) else (results,)
    written = [(name, copies[name]) for name in WRITTEN if name in copies]
    return [("result", x) for x in results] + written


def widened(given):
    wide = {name: x for name, x in given.items() if x is not None}
    return {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in wide.items()}


def check_right_inputs(seed):
    d = Draw(seed)
    op, meaning, given, sequences = d.choice(FAMILIES)(d)
    results, expected = call(op, given), call(meaning, widened(given))
    for (_, result), (_, right) in zip(results, expected, strict=True):
        assert result.shape == right.shape, op.__name__
        if right.numel():
            size = max(right.square().mean().sqrt().item(), 1.0)
            worst = (result.double() - right).abs().max().item()
            assert worst <= 8 * TOLERANCE[d.dtype] * size, f"{op.__name__}: off by {worst} at a size of {size}"
    if sequences:
        check_isolation(d, op, given, sequences)


def check_isolation(d, op, given, sequences):
    """Spoil one sequence with what is not finite: the results of the others are bit for bit the same."""
    victim = d.choice(list(sequences))
    shared = ("weight", "bias", "A_log")
    names = [n for n, x in given.items() if torch.is_tensor(x) and x.is_floating_point() and n not in shared]
    name = d.choice(names)
    spoiled = given | {name: given[name].clone()}
    part = sequences[victim](name, spoiled[name])
    if part.numel() == 0:
        return
    where = tuple(d.randrange(n) for n in part.shape)
    part[where] = d.choice((float("nan"), float("inf"), -float("inf"), torch.finfo(part.dtype).max))
    found, expected = (call(op, x) for x in (spoiled, given | {name: given[name].clone()}))
    for (kind, result), (_, other) in zip(found, expected, strict=True):
        for n, own in sequences.items():
            if n != victim:
                message = f"{op.__name__}: {name} of sequence {victim} changed sequence {n}"
                assert own(kind, result).equal(own(kind, other)), message


def check_wrong_inputs(seed):
    """Change one argument in a way that may be wrong: the call works, or raises an error that begins with its name."""
    d = Draw(seed)
    op, _, given, _ = d.choice(FAMILIES)(d)
    name = d.choice([n for n, x in given.items() if x is not None])
    given |= {name: broken(d, given[name])}
    try:
        call(op, given)
    except ERRORS as error:
        assert str(error).startswith(f"{op.__name__}: "), f"{type(error).__name__}: {error}"
        assert len(str(error)) < 400 and "tensor(" not in str(error)


def broken(d, x):
    if not torch.is_tensor(x):
        return d.choice((None, "text", -1, 0, 2**70, float("nan"), float("inf"), True, [1], x))
    if not x.is_floating_point():
        values = x.tolist()
        if values:
            values[d.randrange(len(values))] = d.choice((-(2**40), -1, 0, 3, 10**6, 2**62))
        kinds = (
            *(lambda: torch.tensor(values), lambda: torch.tensor(values).double(), lambda: x[:-1], lambda: x[None]),
            *(lambda: x.flip(0), lambda: x.tolist(), lambda: torch.cat([x, x]), lambda: x.new_empty(0)),
        )
        return d.choice(kinds)()
    kinds = (
        *(lambda: x[..., :-1], lambda: x[:-1], lambda: x[None], lambda: x.flatten(), lambda: x.new_empty(0)),
        *(lambda: x.to(d.choice(DTYPES)), lambda: x.to(torch.int64), lambda: x.to(torch.complex64)),
        *(lambda: torch.cat([x, x], dim=d.randrange(x.dim())), lambda: x.to("meta"), lambda: x.tolist()),
        *(lambda: x * float("nan"), lambda: x * 1e30, lambda: x.clone().requires_grad_(), lambda: x.to_sparse()),
        lambda: x[:, :1].expand_as(x) if x.dim() > 1 and x.shape[1] else x,
    )
    return d.choice(kinds)()


QUICK = settings(max_examples=500, deadline=None, derandomize=True, database=None)
LONG = settings(max_examples=50_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**40)


@QUICK
@given(seeds)
def test_right_inputs(seed):
    check_right_inputs(seed)


@QUICK
@given(seeds)
def test_wrong_inputs(seed):
    check_wrong_inputs(seed)


@pytest.mark.slow
@LONG
@given(seeds)
def test_many_right_inputs(seed):
    check_right_inputs(seed)


@pytest.mark.slow
@LONG
@given(seeds)
def test_many_wrong_inputs(seed):
    check_wrong_inputs(seed)


def test_every_op_is_drawn():
    """What an op is added to the package for is tested here too, unless it is another name of one that is."""
    aliases = {"chunk_gdn", "fused_recurrent_gdn", "chunk_lightning_attn", "chunk_retention"}
    drawn = {FAMILIES[seed % len(FAMILIES)](Draw(seed))[0].__name__ for seed in range(40 * len(FAMILIES))}
    assert drawn == set(kernels.__all__) - aliases - {"__version__", "report", "show_config"}
