"""Measure prefill and decode of HypeNet and its Qwen3 teacher, with random weights: time per token and memory.

The widths are Qwen3-1.7B's; the number of layers depends on the machine. One in four layers of HypeNet is softmax
attention, as in the paper. A decode step at context length L follows a prefill of L tokens.
"""

import gc
import time
from collections.abc import Callable
from typing import Any, TypedDict

import torch
from transformers import Cache, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from bench import records, timing
from bench.records import ModelRecord
from hypenet import from_teacher

WIDTHS: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32768,
    "max_position_embeddings": 2**20,
}
LAYERS = {"cpu": 4, "cuda": 28}
LENGTHS = {"cpu": (512, 2048, 8192), "cuda": (2048, 8192, 32768, 131072)}
QUICK_LENGTHS = {"cpu": (128, 256), "cuda": (2048, 8192)}
DECODE_STEPS = 16
SOFTMAX_EVERY = 4


class Measured(TypedDict):
    """A records.ModelRow without its model and length."""

    prefill_s: float
    prefill_tokens_per_s: float
    decode_ms: float
    decode_low_ms: float
    decode_high_ms: float
    cache_bytes: int
    peak_bytes: int | None


def run(device: str, quick: bool, layers: int | None, on_length: Callable[[int, int, str], None]) -> ModelRecord:
    """Measure both models at every context length; on_length(index, count, name) is called before each."""
    kind = torch.device(device).type
    lengths = (QUICK_LENGTHS if quick else LENGTHS)[kind]
    layers = layers or LAYERS[kind]
    rows: list[records.ModelRow] = []
    models = build(device, layers)
    for length in lengths:
        for name, model in models.items():
            on_length(len(rows), len(lengths) * len(models), f"{name}, {length} tokens")
            rows.append({"model": name, "length": length, **measure(model, length, device)})
            gc.collect()
    return {"kind": "model", "stamp": records.stamp(device), "layers": layers, "widths": WIDTHS, "rows": rows}


def build(device: str, layers: int) -> dict[str, Any]:
    """Build teacher and HypeNet of the same widths, in bfloat16 on a GPU and float32 on the CPU."""
    torch.manual_seed(0)
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    config = Qwen3Config(num_hidden_layers=layers, tie_word_embeddings=True, **WIDTHS)
    with torch.device(device):
        teacher = Qwen3ForCausalLM(config).eval().to(dtype)
    student = from_teacher(teacher, list(range(SOFTMAX_EVERY - 1, layers, SOFTMAX_EVERY)), mixer="lightning")
    return {"Qwen3": teacher, "HypeNet": student.eval().to(device=device, dtype=dtype)}


@torch.no_grad()
def measure(model: PreTrainedModel, length: int, device: str) -> Measured:
    """Measure a prefill of `length` tokens, decode steps after it, and the memory of the cache."""
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, WIDTHS["vocab_size"], (1, length), device=device)
    model(input_ids=ids[:, :64], logits_to_keep=1)
    _wait(device)
    started = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    _wait(device)
    prefill = time.perf_counter() - started
    token = ids[:, :1]

    def step() -> None:
        model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        _wait(device)

    for _ in range(2):
        step()
    samples = [timing.sample(step, 1) for _ in range(DECODE_STEPS)]
    decode = timing.summary(samples)
    return {
        "prefill_s": prefill,
        "prefill_tokens_per_s": length / prefill,
        "decode_ms": decode.median,
        "decode_low_ms": decode.low,
        "decode_high_ms": decode.high,
        "cache_bytes": cache_bytes(out.past_key_values),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_cuda else None,
    }


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
