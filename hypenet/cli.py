"""The `hypenet` command: continue a prompt, describe a model."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextStreamer, set_seed
from transformers.utils import logging

from hypenet.configuration_hypenet import SOFTMAX, HypeNetConfig
from hypenet.modeling_hypenet import HypeNetForCausalLM

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class Precision(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


ModelFolder = Annotated[Path, typer.Option("--model", help="Folder of a saved model.", exists=True, file_okay=False)]


@app.command()
def generate(
    model: ModelFolder,
    prompt: Annotated[str, typer.Option(help="Text to continue; '-' reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most probable token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: Annotated[Precision, typer.Option(help="auto: as it was saved.")] = Precision.auto,
    device: Annotated[str, typer.Option(help="auto: a GPU if there is one.")] = "auto",
) -> None:
    """Continue a prompt, printing the text as it comes."""
    logging.disable_progress_bar()
    text = typer.get_text_stream("stdin").read() if prompt == "-" else prompt
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype.value).to(device).eval()
    except (OSError, ValueError) as error:
        raise _failure(error) from None
    inputs = tokenizer(text, return_tensors="pt").to(device)
    if inputs["input_ids"].shape[1] == 0:
        raise _failure("--prompt must hold at least one token, got an empty text")
    sampling = {"do_sample": temperature > 0}
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
def info(model: Annotated[Path, typer.Argument(help="Folder of a saved model.", exists=True, file_okay=False)]) -> None:
    """Describe a model: its layers, parameters, and what a sequence costs in memory."""
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


def describe(config: HypeNetConfig) -> dict[str, str]:
    """What `hypenet info` prints, by name."""
    with torch.device("meta"):
        network = HypeNetForCausalLM(config)
    kinds = {kind: [i for i, mixer in enumerate(config.mixer_types) if mixer == kind] for kind in config.mixer_types}
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
    rows["state per sequence"] = f"{config.state_bytes():,} B, whatever its length"
    return rows


def _failure(message: object) -> typer.BadParameter:
    return typer.BadParameter(str(message).splitlines()[0])


if __name__ == "__main__":
    app()
