"""Prefill and decode of HypeNet against its Qwen3 teacher, on random weights: time per token and memory by context.

The widths are Qwen3-1.7B's; the number of layers is what the machine bears, one in four of HypeNet's with softmax
attention, as in the paper. Decoding at a context of L starts from a cache that a prefill of L tokens left.
"""

import gc
import time

import torch
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench import records, timing
from hypenet import from_qwen3

WIDTHS = {
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


def run(device, quick, layers, on_length):
    """The record: a row per model and context length."""
    kind = torch.device(device).type
    lengths = (QUICK_LENGTHS if quick else LENGTHS)[kind]
    layers = layers or LAYERS[kind]
    rows = []
    models = build(device, layers)
    for length in lengths:
        for name, model in models.items():
            on_length(len(rows), len(lengths) * len(models), f"{name}, {length} tokens")
            rows.append({"model": name, "length": length} | measure(model, length, device))
            gc.collect()
    return {"kind": "model", "stamp": records.stamp(device), "layers": layers, "widths": WIDTHS, "rows": rows}


def build(device, layers):
    """Teacher and HypeNet of the same widths, in bfloat16 on a GPU."""
    torch.manual_seed(0)
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    config = Qwen3Config(num_hidden_layers=layers, tie_word_embeddings=True, **WIDTHS)
    with torch.device(device):
        teacher = Qwen3ForCausalLM(config).eval().to(dtype)
    student = from_qwen3(teacher, list(range(SOFTMAX_EVERY - 1, layers, SOFTMAX_EVERY)), mixer="lightning")
    return {"Qwen3": teacher, "HypeNet": student.eval().to(device=device, dtype=dtype)}


@torch.no_grad()
def measure(model, length, device):
    """Seconds of a prefill, of a decode step (median and quartiles), bytes of the cache after it, the most in use."""
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

    def step():
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


def cache_bytes(cache):
    """Of all distinct tensors that the layers of a cache hold."""
    held = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            for x in value if isinstance(value, (list, tuple)) else [value]:
                if torch.is_tensor(x):
                    held[x.data_ptr()] = x.untyped_storage().nbytes()
    return sum(held.values())


def _wait(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def terminal(record):
    table = Table(title=f"{record['stamp']['device']}, {record['layers']} layers", header_style="bold")
    for name in HEADER:
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in record["rows"]:
        table.add_row(*cells(row))
    return table


HEADER = ["model", "context", "prefill tokens/s", "decode ms", "cache MB", "peak MB"]


def cells(row):
    return [
        row["model"],
        str(row["length"]),
        f"{row['prefill_tokens_per_s']:.0f}",
        f"{row['decode_ms']:.2f}",
        f"{row['cache_bytes'] / 1e6:.2f}",
        "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
    ]
