"""The models of transformers with and without `patch_transformers`: prefill and decode of a small random model of each
family, the whole model and the functions that are replaced apart.

Both variants are timed in one run, sample by sample in turns, on the same weights and tokens, after their logits were
compared. A function apart is timed on the arguments of its first call in the model.
"""

import contextlib
import functools
import importlib
import time

import torch

from bench import family_models, records, tables, timing
from hypenet_kernels.integrations import patch_transformers

WIDTHS = {"hidden": 1024, "head_dim": 64, "heads": 16, "intermediate": 2048, "vocabulary": 8192, "chunk": 128}
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


def run(device, names, quick, seconds, on_case):
    """Return the record: a row for each family, dtype, phase (prefill, decode) and part (model or function)."""
    names = list(names or (QUICK_FAMILIES if quick else family_models.FAMILIES))
    if unknown := set(names) - set(family_models.FAMILIES):
        raise ValueError(f"bench: families must be of {', '.join(family_models.FAMILIES)}, got {', '.join(unknown)}")
    rows, count = [], len(names) * len(DTYPES)
    timing.keep_buffers()
    for name in names:
        index = names.index(name) * len(DTYPES)

        def on_dtype(dtype, name=name, index=index):
            on_case(index + DTYPES.index(dtype), count, f"{name}, {_short(dtype)}")

        rows += _family(name, device, seconds, on_dtype)
    sizes = {"prefill": [1, PREFILL_TOKENS], "decode": [DECODE_BATCH, 1], "context": CONTEXT, "widths": WIDTHS}
    return {"kind": "families", "stamp": records.stamp(device), "sizes": sizes, "rows": rows}


@torch.no_grad()
def _family(name, device, seconds, on_dtype):
    """Return the rows of one family; timing ends where the patched logits are wrong."""
    uses_gated_delta_rule = "linear_key_head_dim" in family_models.FAMILIES[name](GATED_DELTA)
    model = family_models.build(name, GATED_DELTA if uses_gated_delta_rule else MAMBA2).to(device)
    prompt = torch.randint(3, WIDTHS["vocabulary"], (1, PREFILL_TOKENS), device=device)
    context = torch.randint(3, WIDTHS["vocabulary"], (DECODE_BATCH, CONTEXT), device=device)
    exact = model(input_ids=prompt, use_cache=False).logits.float()

    def prefill():
        return functools.partial(model, input_ids=prompt, use_cache=True, logits_to_keep=1)

    def decode():
        """Return a step that continues a cache of its own."""
        out = model(input_ids=context, use_cache=True, logits_to_keep=1)
        cache = "cache_params" if "cache_params" in out else "past_key_values"
        return functools.partial(model, input_ids=context[:, :1], use_cache=True, **{cache: out[cache]})

    rows = []
    for dtype in DTYPES:
        on_dtype(dtype)
        model.to(dtype)
        row = {"family": name, "dtype": _short(dtype)}
        if failure := _failure(model, prompt, exact):
            rows.append(row | {"phase": "prefill", "part": "model", "failure": failure})
            break
        for phase, make, functions in (("prefill", prefill, CHUNK_FUNCTIONS), ("decode", decode, STEP_FUNCTIONS)):
            rows += [row | {"phase": phase} | part for part in _parts(model, make, functions, device, seconds)]
    return rows


def _failure(model, prompt, exact):
    """Return in words how the patched logits are less accurate than twice the unpatched ones' error, or None."""
    errors = {}
    for variant in ("without", "with"):
        with _patched(variant):
            logits = model(input_ids=prompt, use_cache=False).logits.float()
        errors[variant] = ((logits - exact).norm() / exact.norm()).item()
    bound = 2 * errors["without"] + TOLERANCE[model.dtype]
    return None if errors["with"] <= bound else f"error of the logits {errors['with']:.1e}, at most {bound:.1e} allowed"


def _parts(model, make, functions, device, seconds):
    steps, calls = {}, {}
    for variant in ("without", "with"):
        with _patched(variant):
            steps[variant], calls[variant] = make(), _first_calls(model, functions, make)
    rows = [{"part": "model"} | _compared(steps, _patched, device, seconds)]
    for function in calls["without"]:
        pair = {variant: calls[variant][function] for variant in calls}
        rows.append({"part": function} | _compared(pair, _unchanged, device, seconds / 2))
    return rows


def _patched(variant):
    return patch_transformers() if variant == "with" else contextlib.nullcontext()


def _unchanged(variant):
    return contextlib.nullcontext()


def _compared(functions, context_of, device, seconds):
    """Return the milliseconds of both variants, timed in turns, and how many times as fast the patched one is."""
    samples, calls = {name: [] for name in functions}, {}
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
    summaries = {name: timing.summary(taken) for name, taken in samples.items()}
    rows = {name: {"median": x.median, "low": x.low, "high": x.high} for name, x in summaries.items()}
    return rows | {"ratio": rows["without"]["median"] / rows["with"]["median"]}


def _sample(function, calls, device):
    if torch.device(device).type != "cuda":
        return timing.sample(function, calls)
    torch.cuda.synchronize()

    def waited():
        function()
        torch.cuda.synchronize()

    return timing.sample(waited, calls)


def _first_calls(model, names, make):
    """Return the first call of each function of the modeling file, as callables without arguments."""
    module = importlib.import_module(type(model).__module__)
    functions, taken, step = {name: vars(module)[name] for name in names if name in vars(module)}, {}, make()

    def recording(name):
        def record(*args, **kwargs):
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


def _call(function, args, kwargs):
    """Return the call, which stores a final state back where the initial one is, as the layers do."""
    state = kwargs.get("initial_state")

    def call():
        result = function(*args, **kwargs)
        if state is not None and result[1] is not None:
            state.copy_(result[1])

    return call


def _short(dtype):
    return str(dtype).removeprefix("torch.")


HEADER = ["family", "dtype", "phase", "part", "transformers", "patched", "faster by"]


def cells(row):
    head = [row["family"], row["dtype"], row["phase"], row["part"]]
    if "failure" in row:
        return [*head, "", "", row["failure"]]
    times = [f"{row[name]['median']:.3g} ms {tables.spread_of(row[name])}" for name in ("without", "with")]
    return [*head, *times, f"{row['ratio']:.2f} x"]


def summary(record):
    """Return a row for each family and dtype: the ratios of the model and of the recurrence, in both phases."""
    found = {}
    for row in record["rows"]:
        part = "model" if row["part"] == "model" else "recurrence"
        if not row["part"].startswith("causal_conv1d"):
            found.setdefault((row["family"], row["dtype"]), {})[row["phase"], part] = row.get("ratio")
    places = [(phase, part) for phase in ("prefill", "decode") for part in ("model", "recurrence")]
    return [
        [*key, *(f"{ratios[place]:.2f} x" if ratios.get(place) else "" for place in places)]
        for key, ratios in found.items()
    ]


SUMMARY_HEADER = ["family", "dtype", "prefill", "its recurrence", "decode", "its recurrence"]


def section(record):
    """Return the record's part of RESULTS.md."""
    sizes = record["sizes"]
    return (
        "How many times as fast transformers' models are with `patch_transformers()`: random weights, 4 layers of "
        f"width {sizes['widths']['hidden']}, prefill of {sizes['prefill'][1]} tokens, decoding at batch "
        f"{sizes['decode'][0]}. The recurrence is the function that is replaced, on the model's tensors.\n\n"
        + tables.markdown(SUMMARY_HEADER, summary(record))
    )


def terminal(record):
    from rich.table import Table

    table = Table(title=record["stamp"]["device"], header_style="bold")
    for name in HEADER:
        table.add_column(name)
    for row in record["rows"]:
        table.add_row(*cells(row))
    return table
