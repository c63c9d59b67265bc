"""The `hypenet` command: continue a prompt, describe a model.

It is in this package because importing `hypenet` loads torch and transformers, which takes seconds: here help, the
version and the line that names a missing package appear at once.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halo.command import Precision, application
from halo.errors import HaloError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hypenet import HypeNetConfig

# Tokens of a prompt that are read at once; of a longer one the progress is shown.
PROMPT_PIECE = 4096
MAX_SEED = 2**32 - 1

app = application("hypenet", "Run and describe HypeNet models.")


@app.command()
def generate(
    model: Annotated[Path, typer.Option("--model", help="Directory of a saved model.")],
    prompt: Annotated[str, typer.Option(help="Text to continue; '-' reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy decoding.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Probability mass for nucleus sampling.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Random seed for sampling.")] = 0,
    dtype: Annotated[Precision, typer.Option(help="Data type of the weights; auto: as saved.")] = Precision.auto,
    device: Annotated[str, typer.Option(help="Device to run on; auto: a GPU if there is one.")] = "auto",
) -> None:
    """Continue a prompt and print the text as it is generated."""
    if not 0 <= seed <= MAX_SEED:
        raise HaloError(f"--seed: must be from 0 to {MAX_SEED}, got {seed}")
    if not 0 <= temperature < math.inf:
        raise HaloError(f"--temperature: must be a finite number of at least 0, got {temperature}")
    text = _read_prompt(prompt)
    _check_folder(model)
    import torch
    from transformers import GenerationConfig, TextStreamer, set_seed
    from transformers.utils import logging

    from halo.device import find_device
    from halo.saved import load_saved

    logging.disable_progress_bar()
    place = find_device(device)
    network, tokenizer = load_saved(model, dtype.value, "copy the folder again")
    inputs = tokenizer(text, return_tensors="pt")
    tokens = inputs["input_ids"].shape[1]
    if tokens == 0:
        raise HaloError("--prompt: must hold at least one token, got an empty text")
    sampling: dict[str, float] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    saved = network.generation_config
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=saved.eos_token_id if saved.eos_token_id is not None else tokenizer.eos_token_id,
        pad_token_id=saved.pad_token_id if saved.pad_token_id is not None else tokenizer.pad_token_id,
        prefill_chunk_size=PROMPT_PIECE if tokens > PROMPT_PIECE else None,
        **sampling,
    )
    set_seed(seed)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that has not all characters must not end the program
        sys.stdout.reconfigure(errors="replace")
    print(text, end="", flush=True)
    try:
        inputs = inputs.to(place)
        network.to(place)  # type: ignore[arg-type]  # transformers wraps Module.to without its types
        continue_text: Any = network.generate
        with _prompt_progress(network, tokens):
            continue_text(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                generation_config=settings,
                streamer=streamer,
            )
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "alloc" in str(error):
            print(flush=True)
            raise HaloError(
                f"must have memory for the model and {tokens} + {max_new_tokens} tokens on {place}, got too little; "
                "lower --max-new-tokens, or give --dtype bfloat16"
            ) from None
        raise


@app.command()
def info(model: Annotated[Path, typer.Argument(help="Directory of a saved model.")]) -> None:
    """Describe a model: its layers, its parameters and the memory that a sequence takes."""
    _check_folder(model)
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoConfig

    from halo.files import reading
    from hypenet import HypeNetConfig

    with reading(model, "copy the folder again"):
        config = AutoConfig.from_pretrained(model)
    if not isinstance(config, HypeNetConfig):
        raise HaloError(f"{model}: must hold a HypeNet, got model_type {config.model_type!r}")
    table = Table(show_header=False, title=str(model))
    for name, value in describe(config).items():
        table.add_row(name, value)
    Console().print(table)


def describe(config: "HypeNetConfig") -> dict[str, str]:
    """Return the rows that `hypenet info` prints, by name."""
    import torch

    from hypenet import HypeNetForCausalLM
    from hypenet.configuration_hypenet import SOFTMAX

    with torch.device("meta"):
        network = HypeNetForCausalLM(config)
    kinds = {kind: [i for i, mixer in enumerate(config.mixers) if mixer == kind] for kind in config.mixers}
    softmax = [
        "rotary positions" if config.attn_use_rope else "no positions",
        "output gate" if config.attn_use_output_gate else "no gate",
        "no logit scale" if config.attn_logits_scaling is None else f"logit scale {config.attn_logits_scaling}",
    ]
    rows = {"parameters": f"{network.num_parameters():,}" + (" (tied head)" if config.tie_word_embeddings else "")}
    rows["size"] = (
        f"{config.num_hidden_layers} layers, width {config.hidden_size}, MLP {config.intermediate_size}, "
        f"{config.num_attention_heads} query and {config.num_key_value_heads} key-value heads of {config.head_dim}"
    )
    for kind, layers in kinds.items():
        rows[f"{kind} layers"] = f"{len(layers)}: {' '.join(map(str, layers))}"
        if kind == SOFTMAX:
            rows["softmax attention"] = ", ".join(softmax)
    per_token = {dtype: config.cache_bytes_per_token(dtype) for dtype in (torch.bfloat16, torch.float32)}
    rows["cache per token"] = f"{per_token[torch.bfloat16]:,} B in bfloat16, {per_token[torch.float32]:,} B in float32"
    rows["state per sequence"] = f"{config.state_bytes():,} B at any length"
    return rows


def _read_prompt(prompt: str) -> str:
    """Return the text of `--prompt`, or of standard input for "-"."""
    place, data = "--prompt", prompt.encode("utf-8", "surrogateescape")
    if prompt == "-":
        place, data = "standard input", typer.get_binary_stream("stdin").read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HaloError(f"{place}: must be UTF-8, got byte 0x{data[error.start]:02x} at {error.start}") from None


def _check_folder(model: Path) -> None:
    if not (model / "config.json").is_file():
        raise HaloError(f"model: must be the directory of a saved model, with config.json, got {model}")


@contextmanager
def _prompt_progress(network: "PreTrainedModel", tokens: int) -> Iterator[None]:
    """Show on a terminal how much of a long prompt has been read, until all of it has."""
    if tokens <= PROMPT_PIECE:
        yield
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"reading {tokens:,} tokens", total=tokens)

        def count(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            progress.advance(task, kwargs["input_ids"].shape[1])
            if progress.finished:
                progress.stop()
                handle.remove()

        handle = network.register_forward_hook(count, with_kwargs=True)
        yield
