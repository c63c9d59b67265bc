"""The `hypenet` command: continue a prompt, talk with a model, describe it.

It is in this package because importing `hypenet` loads torch and transformers, which takes seconds: here help, the
version and the line that names a missing package appear at once.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from halo.command import Precision, application
from halo.errors import HaloError

PREFILL_CHUNK = 4096
MAX_SEED = 2**32 - 1

ModelFolder = Annotated[Path, typer.Option("--model", help="Directory of a saved model.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Largest number of tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy decoding.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Probability mass for nucleus sampling.")]
Seed = Annotated[int, typer.Option(help="Random seed for sampling.")]
PrefillChunk = Annotated[int, typer.Option(min=1, help="Tokens of the prompt to read at once; fewer need less memory.")]
Dtype = Annotated[Precision, typer.Option(help="Data type of the weights; auto: as saved.")]
Device = Annotated[str, typer.Option(help="Device to run on; auto: a GPU if there is one.")]

app = application("hypenet", "Run and describe HypeNet models.")


@app.command()
def generate(
    model: ModelFolder,
    prompt: Annotated[str, typer.Option(help="Text to continue; '-' reads standard input.")],
    context: Annotated[Path | None, typer.Option(help="Text file to put before the prompt.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, also with a chat template.")] = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    prefill_chunk: PrefillChunk = PREFILL_CHUNK,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the model first: minutes, for long texts.")
    ] = False,
    dtype: Dtype = Precision.auto,
    device: Device = "auto",
) -> None:
    """Continue a prompt, or answer it if the tokenizer has a chat template, and print the text as it is generated.

    The speed is printed on standard error at the end.
    """
    _check_sampling(temperature, seed)
    text = _read_prompt(prompt)
    before = "" if context is None else _read_context(context)
    _check_folder(model)
    from halo.continuation import Settings, Writer

    settings = Settings(max_new_tokens, temperature, top_p, seed, prefill_chunk)
    writer = Writer(model, dtype.value, device, settings)
    if writer.tokenizer.chat_template and not raw:
        ids = writer.encode(writer.render([{"role": "user", "content": before + text}]), special=False)
    else:
        ids = writer.encode(before + text, special=True)
        print(text, end="", flush=True)
    if not ids:
        raise HaloError("--prompt: must hold at least one token, got an empty text")
    if compile:
        writer.compile(ids)
    _, speed = writer.write(ids)
    print(speed, file=sys.stderr)


@app.command()
def chat(
    model: ModelFolder,
    system: Annotated[str | None, typer.Option(help="System message to begin with.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue plain text, without a chat template.")] = False,
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    prefill_chunk: PrefillChunk = PREFILL_CHUNK,
    dtype: Dtype = Precision.auto,
    device: Device = "auto",
) -> None:
    """Talk with a model, line by line, from a terminal or a pipe; /reset begins anew, /quit ends.

    The model's cache is kept, so that every turn reads only what is new.
    """
    _check_sampling(temperature, seed)
    _check_folder(model)
    from halo.chat import Chat, typed_lines
    from halo.continuation import Settings, Writer

    settings = Settings(max_new_tokens, temperature, top_p, seed, prefill_chunk)
    conversation = Chat(Writer(model, dtype.value, device, settings), system, raw)
    conversation.run(typed_lines() if sys.stdin.isatty() else _piped_lines())


@app.command()
def info(
    model: Annotated[Path, typer.Argument(help="Directory of a saved model.")],
    bandwidth: Annotated[
        float | None, typer.Option(help="Memory bandwidth to expect, in GB/s; default: that of a copy, measured.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Describe a model: its layers, its parameters, the memory that a sequence takes, and the expected decode time.

    The time is an estimate from memory traffic alone; computation and launches come on top.
    """
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise HaloError(f"--bandwidth: must be a finite number above 0, got {bandwidth}")
    _check_folder(model)
    import torch
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoConfig

    from halo.describe import decode_estimates, describe, measured_bandwidth
    from halo.device import find_device
    from halo.files import reading
    from hypenet import HypeNetConfig

    place = find_device(device)

    with reading(model, "copy the folder again"):
        config = AutoConfig.from_pretrained(model)
    if not isinstance(config, HypeNetConfig):
        raise HaloError(f"{model}: must hold a HypeNet, got model_type {config.model_type!r}")
    table = Table(show_header=False, title=str(model))
    for name, value in describe(config).items():
        table.add_row(name, value)
    console = Console()
    console.print(table)
    source = "stated" if bandwidth is not None else f"measured, a copy on {place}"
    rate = measured_bandwidth(place) if bandwidth is None else bandwidth * 1e9
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    rows, line = decode_estimates(config, dtype, rate)
    name = str(dtype).removeprefix("torch.")
    speeds = Table("context", "time per token", "all-softmax teacher")
    for row in rows:
        speeds.add_row(*row)
    console.print(f"Estimated decode time, one sequence, {name}: memory traffic / {rate / 1e9:.3g} GB/s ({source})")
    console.print(speeds)
    console.print(f"Estimate: {line}")


def _check_sampling(temperature: float, seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise HaloError(f"--seed: must be from 0 to {MAX_SEED}, got {seed}")
    if not 0 <= temperature < math.inf:
        raise HaloError(f"--temperature: must be a finite number of at least 0, got {temperature}")


def _read_prompt(prompt: str) -> str:
    """Return the text of `--prompt`, or of standard input for "-"."""
    if prompt == "-":
        return _decode("standard input", typer.get_binary_stream("stdin").read())
    return _decode("--prompt", prompt.encode("utf-8", "surrogateescape"))


def _read_context(path: Path) -> str:
    """Return the text of the file of `--context`."""
    try:
        return _decode(f"--context: {path}", path.read_bytes())
    except OSError as error:
        raise HaloError(f"--context: must be a file that can be read, got {path}: {error.strerror}") from None


def _piped_lines() -> Iterator[str]:
    """Yield the lines of standard input as they come."""
    for number, line in enumerate(typer.get_binary_stream("stdin"), start=1):
        yield _decode(f"standard input, line {number}", line).rstrip("\r\n")


def _decode(place: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HaloError(f"{place}: must be UTF-8, got byte 0x{data[error.start]:02x} at {error.start}") from None


def _check_folder(model: Path) -> None:
    if not (model / "config.json").is_file():
        raise HaloError(f"model: must be the directory of a saved model, with config.json, got {model}")
