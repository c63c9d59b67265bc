"""Measure prefill and decode of HypeNet and its Qwen3 teacher, with random weights: time per token and memory.

The sizes are Qwen3-0.6B's on the CPU and Qwen3-1.7B's on a GPU. One in four layers of HypeNet is softmax attention, as
in the paper. A decode step at context length L runs on a cache of L tokens with random contents: its time does not
depend on them, and reading so long a prompt takes hours on a CPU.
"""

import gc
import math
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, TypedDict

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import hypenet_kernels
from bench import records, timing
from bench.records import ModelRecord
from hypenet import HypeNetCache, from_teacher

WIDTHS: dict[str, dict[str, Any]] = {
    "cpu": {"hidden_size": 1024, "intermediate_size": 3072},
    "cuda": {"hidden_size": 2048, "intermediate_size": 6144},
}
COMMON: dict[str, Any] = {
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 2**20,
}
NAMES = {"cpu": "Qwen3-0.6B", "cuda": "Qwen3-1.7B"}
LAYERS = 28
QUICK_LAYERS = 4
LENGTHS = {
    "cpu": (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
    "cuda": (2048, 8192, 16384, 65536, 131072, 262144, 524288, 1048576),
}
QUICK_LENGTHS = {"cpu": (128, 256), "cuda": (2048, 8192)}
PREFILL_LENGTHS = {"cpu": (128, 256, 512, 2048, 16384), "cuda": LENGTHS["cuda"]}
MAX_SLOW_PREFILL = 2048  # beyond it the dtype whose products are several times slower is not waited for
PREFILL_SECONDS = 15.0  # a prefill is repeated up to three times within so long
DTYPES = {"cpu": (torch.bfloat16, torch.float32), "cuda": (torch.bfloat16,)}
MAX_CACHE_BYTES = {"cpu": 8e9, "cuda": 60e9}
PROMPT = 16  # tokens that are really read before a cache is filled
DECODE_STEPS = 12
IMPORTS = {
    "transformers": "from transformers import Qwen3ForCausalLM",
    "hypenet": "from hypenet import HypeNetForCausalLM",
}
SOFTMAX_EVERY = 4


class Measured(TypedDict):
    """A records.ModelRow without its model, dtype and length."""

    prefill_s: float | None
    decode_ms: float
    decode_low_ms: float
    decode_high_ms: float
    cache_bytes: int
    peak_bytes: int | None


def run(device: str, quick: bool, layers: int | None, on_length: Callable[[int, int, str], None]) -> ModelRecord:
    """Measure both models at every context length; on_length(index, count, name) is called before each."""
    kind = torch.device(device).type
    lengths = (QUICK_LENGTHS if quick else LENGTHS)[kind]
    layers = layers or (QUICK_LAYERS if quick else LAYERS)
    rows: list[records.ModelRow] = []
    count = len(lengths) * len(DTYPES[kind]) * 2
    for dtype in DTYPES[kind]:
        models = build(device, layers, dtype)
        for length in lengths:
            for name, model in models.items():
                shown = str(dtype).removeprefix("torch.")
                on_length(len(rows), count, f"{name}, {shown}, {length} tokens")
                if _teacher_cache_bytes(layers, length, dtype) > MAX_CACHE_BYTES[kind]:
                    continue
                rows.append({"model": name, "dtype": shown, "length": length, **measure(model, length, device)})
                gc.collect()
        del models
    return {
        "kind": "model",
        "stamp": records.stamp(device),
        "layers": layers,
        "widths": WIDTHS[kind] | COMMON,
        "name": NAMES[kind],
        "filled": True,
        "import_s": import_seconds(),
        "rows": rows,
    }


def import_seconds() -> dict[str, float]:
    """Return the wall time of processes that import one model class each, the best of three in turns."""
    times: dict[str, list[float]] = {package: [] for package in IMPORTS}
    for _ in range(3):
        for package, line in IMPORTS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", line], check=True)
            times[package].append(time.perf_counter() - began)
    return {package: round(min(each), 2) for package, each in times.items()}


def build(device: str, layers: int, dtype: torch.dtype) -> dict[str, Any]:
    """Build teacher and HypeNet of the same widths."""
    torch.manual_seed(0)
    widths = WIDTHS[torch.device(device).type] | COMMON
    config = Qwen3Config(num_hidden_layers=layers, tie_word_embeddings=True, **widths)
    with torch.device(device):
        teacher = Qwen3ForCausalLM(config).eval().to(dtype)
    student = from_teacher(teacher, list(range(SOFTMAX_EVERY - 1, layers, SOFTMAX_EVERY)), mixer="lightning")
    return {"Qwen3": teacher, "HypeNet": student.eval().to(device=device, dtype=dtype)}


def slow_dtype(kind: str) -> torch.dtype:
    """Return the dtype whose matrix products this kind of device is slow at: bfloat16 on CPUs that lack them."""
    multiplies = kind == "cuda" or hypenet_kernels.report()["level"] == "v4_bf16"
    return torch.float32 if multiplies else torch.bfloat16


@torch.no_grad()
def measure(model: PreTrainedModel, length: int, device: str) -> Measured:
    """Measure a prefill of `length` tokens, decode steps on a cache of as many, and the memory of the cache."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, COMMON["vocab_size"], (1, length), device=device)
    prefill = None
    too_slow = model.dtype == slow_dtype(kind) and length > MAX_SLOW_PREFILL
    if length in PREFILL_LENGTHS[kind] and not too_slow:
        model(input_ids=ids[:, :64], logits_to_keep=1)
        _wait(device)
        times: list[float] = []
        while len(times) < 3 and sum(times) < PREFILL_SECONDS:
            started = time.perf_counter()
            model(input_ids=ids, use_cache=True, logits_to_keep=1)
            _wait(device)
            times.append(time.perf_counter() - started)
        prefill = min(times)
    cache, token = filled_cache(model, length, device), ids[:, :1]

    def step() -> None:
        model(input_ids=token, past_key_values=cache, use_cache=True)
        _wait(device)

    for _ in range(2):
        step()
    decode = timing.summary([timing.sample(step, 1) for _ in range(DECODE_STEPS)])
    return {
        "prefill_s": prefill,
        "decode_ms": decode.median,
        "decode_low_ms": decode.low,
        "decode_high_ms": decode.high,
        "cache_bytes": cache_bytes(cache),
        "peak_bytes": torch.cuda.max_memory_allocated() if kind == "cuda" else None,
    }


@torch.no_grad()
def filled_cache(model: PreTrainedModel, length: int, device: str) -> Cache:
    """Return a cache as after a prompt of `length` tokens, with random keys and values."""
    ids, added = torch.zeros(1, PROMPT, dtype=torch.int64, device=device), length - PROMPT
    if model.config.model_type == "hypenet":
        cache = HypeNetCache(model.config, capacity=length + DECODE_STEPS + 2)
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        for index in model.config.softmax_layers:
            layer: Any = cache.layers[index]
            for x in (layer.keys, layer.values):
                x[:, :length].normal_()
        assert cache.lengths is not None
        cache.lengths += added
        cache.count(added)
        return cache
    dynamic = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=dynamic, logits_to_keep=1)
    for layer in dynamic.layers:
        B, heads, _, size = layer.keys.shape
        layer.keys, layer.values = (layer.keys.new_empty(B, heads, length, size).normal_() for _ in range(2))
    return dynamic


def _teacher_cache_bytes(layers: int, length: int, dtype: torch.dtype) -> float:
    heads, size = COMMON["num_key_value_heads"], COMMON["head_dim"]
    return math.prod((2, layers, length, heads, size, dtype.itemsize))


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of all distinct tensors that the layers of a cache hold."""
    held: dict[int, int] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            for x in value if isinstance(value, (list, tuple)) else [value]:
                if torch.is_tensor(x):
                    held[x.data_ptr()] = x.untyped_storage().nbytes()
    return sum(held.values())


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
