"""The `hypenet` command: continue a prompt, describe a model.

It is in this package because importing `hypenet` loads torch and transformers, which takes seconds: here help, the
version and the line that names a missing package appear at once.
"""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halo.extras import version

if TYPE_CHECKING:
    from hypenet import HypeNetConfig

app = typer.Typer(
    name="hypenet",
    help="Run and describe HypeNet models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Precision(StrEnum):
    """Data types that a model can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


ModelFolder = Annotated[Path, typer.Option("--model", help="Directory of a saved model.", exists=True, file_okay=False)]


def print_version(wanted: bool) -> None:
    """Print the version and exit, if `--version` was given."""
    if wanted:
        typer.echo(f"hypenet {version()}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Define the options that precede a command; what they do is in their callbacks."""


@app.command()
def generate(
    model: ModelFolder,
    prompt: Annotated[str, typer.Option(help="Text to continue; '-' reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy decoding.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Probability mass for nucleus sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Random seed for sampling.")] = 0,
    dtype: Annotated[Precision, typer.Option(help="Data type of the weights; auto: as saved.")] = Precision.auto,
    device: Annotated[str, typer.Option(help="Device to run on; auto: a GPU if there is one.")] = "auto",
) -> None:
    """Continue a prompt and print the text as it is generated."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextStreamer, set_seed
    from transformers.utils import logging

    import hypenet  # noqa: F401  registers the model type

    logging.disable_progress_bar()
    text = typer.get_text_stream("stdin").read() if prompt == "-" else prompt
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype.value).eval()
        network.to(device)
    except (OSError, ValueError) as error:
        raise _failure(error) from None
    inputs = tokenizer(text, return_tensors="pt").to(device)
    if inputs["input_ids"].shape[1] == 0:
        raise _failure("--prompt must hold at least one token, got an empty text")
    sampling: dict[str, float] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    saved = network.generation_config
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=saved.eos_token_id if saved.eos_token_id is not None else tokenizer.eos_token_id,
        pad_token_id=saved.pad_token_id if saved.pad_token_id is not None else tokenizer.pad_token_id,
        **sampling,
    )
    set_seed(seed)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    print(text, end="", flush=True)
    network.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        generation_config=settings,
        streamer=streamer,
    )


@app.command()
def info(
    model: Annotated[Path, typer.Argument(help="Directory of a saved model.", exists=True, file_okay=False)],
) -> None:
    """Describe a model: its layers, its parameters and the memory that a sequence takes."""
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoConfig

    from hypenet import HypeNetConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise _failure(error) from None
    if not isinstance(config, HypeNetConfig):
        raise _failure(f"{model} must hold a HypeNet, got model_type {config.model_type!r}")
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


def _failure(message: object) -> typer.BadParameter:
    """Return the error that Typer prints as one line, with exit code 2."""
    return typer.BadParameter(str(message).splitlines()[0])
