"""Measure prefill and decode of transformers' models with and without `patch_transformers`.

A small random model of each family is timed as a whole, and the functions that are replaced by themselves, on the
arguments of their first call in the model. Both variants are timed in one run, alternating sample by sample, on the
same weights and tokens, after their logits were compared.
"""

import contextlib
import functools
import importlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, TypedDict, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench import family_models, records, timing
from bench.records import FamiliesRecord, FamilyRow, Times
from hypenet_kernels.integrations import patch_transformers

WIDTHS: dict[str, int] = {
    "hidden": 1024,
    "head_dim": 64,
    "heads": 16,
    "intermediate": 2048,
    "vocabulary": 8192,
    "chunk": 128,
}
GATED_DELTA = family_models.Size(key_heads=8, value_heads=16, key_dim=128, **WIDTHS)
MAMBA2 = family_models.Size(key_heads=1, value_heads=32, key_dim=128, **WIDTHS)
DTYPES = torch.float32, torch.bfloat16
PREFILL_TOKENS, DECODE_BATCH, CONTEXT = 1024, 8, 64
QUICK_FAMILIES = "qwen3_next", "bamba"
MIN_ROUNDS, MAX_ROUNDS = 7, 60
# Error of the logits, relative to the float32 model's, allowed beyond twice the error without the patch.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: torch.finfo(torch.bfloat16).eps}
CHUNK_FUNCTIONS = "torch_chunk_gated_delta_rule", "mamba2_chunk_scan", "causal_conv1d_fn"
STEP_FUNCTIONS = "torch_recurrent_gated_delta_rule", "mamba2_selective_state_update", "causal_conv1d_update"

Call = Callable[[], Any]


class Compared(TypedDict):
    """A records.FamilyRow without what it is about."""

    without: Times
    patched: Times
    ratio: float


def run(
    device: str, names: list[str], quick: bool, seconds: float, on_case: Callable[[int, int, str], None]
) -> FamiliesRecord:
    """Measure the named families, default all; on_case(index, count, name) is called before each.

    `seconds` are spent on every whole model in every phase, half of that on every function.
    """
    names = list(names or (QUICK_FAMILIES if quick else family_models.FAMILIES))
    if unknown := set(names) - set(family_models.FAMILIES):
        raise ValueError(f"bench: families must be of {', '.join(family_models.FAMILIES)}, got {', '.join(unknown)}")
    rows: list[FamilyRow] = []
    count = len(names) * len(DTYPES)
    timing.keep_buffers()
    for name in names:
        index = names.index(name) * len(DTYPES)

        def on_dtype(dtype: torch.dtype, name: str = name, index: int = index) -> None:
            on_case(index + DTYPES.index(dtype), count, f"{name}, {_short(dtype)}")

        rows += _family(name, device, seconds, on_dtype)
    sizes = {"prefill": PREFILL_TOKENS, "decode_batch": DECODE_BATCH, "decode_context": CONTEXT, **WIDTHS}
    return {"kind": "families", "stamp": records.stamp(device), "sizes": sizes, "rows": rows}


@torch.no_grad()
def _family(name: str, device: str, seconds: float, on_dtype: Callable[[torch.dtype], None]) -> list[FamilyRow]:
    """Return the rows of one family; timing ends where the patched logits are wrong."""
    uses_gated_delta_rule = "linear_key_head_dim" in family_models.FAMILIES[name](GATED_DELTA)
    model: Any = family_models.build(name, GATED_DELTA if uses_gated_delta_rule else MAMBA2)
    model.to(device)
    prompt = torch.randint(3, WIDTHS["vocabulary"], (1, PREFILL_TOKENS), device=device)
    context = torch.randint(3, WIDTHS["vocabulary"], (DECODE_BATCH, CONTEXT), device=device)
    exact = model(input_ids=prompt, use_cache=False).logits.float()

    def prefill() -> Call:
        return functools.partial(model, input_ids=prompt, use_cache=True, logits_to_keep=1)

    def decode() -> Call:
        """Return a step that continues a cache of its own."""
        out = model(input_ids=context, use_cache=True, logits_to_keep=1)
        cache = "cache_params" if "cache_params" in out else "past_key_values"
        return functools.partial(model, input_ids=context[:, :1], use_cache=True, **{cache: out[cache]})

    rows: list[FamilyRow] = []
    for dtype in DTYPES:
        on_dtype(dtype)
        model.to(dtype)
        what = _short(dtype)
        if failure := _failure(model, prompt, exact):
            rows.append({"family": name, "dtype": what, "phase": "prefill", "part": "model", "failure": failure})
            break
        for phase, make, functions in (("prefill", prefill, CHUNK_FUNCTIONS), ("decode", decode, STEP_FUNCTIONS)):
            parts = _parts(model, make, functions, device, seconds)
            rows += [
                {"family": name, "dtype": what, "phase": phase, "part": part, **compared}
                for part, compared in parts.items()
            ]
    return rows


def _failure(model: PreTrainedModel, prompt: Tensor, exact: Tensor) -> str | None:
    """Return in words how the patched logits are less accurate than twice the unpatched ones' error, or None."""
    errors = {}
    for variant in ("without", "patched"):
        with _patched(variant):
            logits = model(input_ids=prompt, use_cache=False).logits.float()
        errors[variant] = ((logits - exact).norm() / exact.norm()).item()
    bound = 2 * errors["without"] + TOLERANCE[model.dtype]
    return (
        None
        if errors["patched"] <= bound
        else f"error of the logits {errors['patched']:.1e}, at most {bound:.1e} allowed"
    )


def _parts(
    model: PreTrainedModel, make: Callable[[], Call], functions: tuple[str, ...], device: str, seconds: float
) -> dict[str, Compared]:
    steps, calls = {}, {}
    for variant in ("without", "patched"):
        with _patched(variant):
            steps[variant], calls[variant] = make(), _first_calls(model, functions, make)
    compared = {"model": _compared(steps, _patched, device, seconds)}
    for function in calls["without"]:
        pair = {variant: calls[variant][function] for variant in calls}
        compared[function] = _compared(pair, _unchanged, device, seconds / 2)
    return compared


def _patched(variant: str) -> AbstractContextManager[Any]:
    return patch_transformers() if variant == "patched" else contextlib.nullcontext()


def _unchanged(variant: str) -> AbstractContextManager[Any]:
    return contextlib.nullcontext()


def _compared(
    functions: dict[str, Call], context_of: Callable[[str], AbstractContextManager[Any]], device: str, seconds: float
) -> Compared:
    """Return the milliseconds of both variants, timed in turns, and how many times as fast the patched one is."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    calls = {}
    for name, function in functions.items():
        with context_of(name):
            calls[name] = max(1, round(timing.SHORTEST_SAMPLE / (1e-3 * _sample(function, 1, device) + 1e-9)))
    started = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - started > seconds:
            break
        for name, function in functions.items():
            with context_of(name):
                samples[name].append(_sample(function, calls[name], device))
    without, patched = (timing.summary(samples[name]) for name in ("without", "patched"))
    return {
        "without": cast(Times, asdict(without)),
        "patched": cast(Times, asdict(patched)),
        "ratio": without.median / patched.median,
    }


def _sample(function: Call, calls: int, device: str) -> float:
    if torch.device(device).type != "cuda":
        return timing.sample(function, calls)
    torch.cuda.synchronize()

    def waited() -> None:
        function()
        torch.cuda.synchronize()

    return timing.sample(waited, calls)


def _first_calls(model: PreTrainedModel, names: tuple[str, ...], make: Callable[[], Call]) -> dict[str, Call]:
    """Return the first call of each function of the modeling file, as callables without arguments."""
    module = importlib.import_module(type(model).__module__)
    functions, step = {name: vars(module)[name] for name in names if name in vars(module)}, make()
    taken: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def recording(name: str) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            taken.setdefault(name, (args, kwargs))
            return functions[name](*args, **kwargs)

        return record

    try:
        for name in functions:
            setattr(module, name, recording(name))
        step()
    finally:
        for name, function in functions.items():
            setattr(module, name, function)
    return {name: _call(functions[name], *arguments) for name, arguments in taken.items()}


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Return the call, which stores a final state back where the initial one is, as the layers do."""
    state = kwargs.get("initial_state")

    def call() -> None:
        result = function(*args, **kwargs)
        if state is not None and result[1] is not None:
            state.copy_(result[1])

    return call


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
