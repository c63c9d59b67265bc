"""A saved model that continues text: the settings of `generate`, streaming, speed, and the cache between calls."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, TextStreamer, set_seed
from transformers.utils import logging

from halo.device import find_device
from halo.errors import HaloError
from halo.saved import load_saved
from hypenet.modeling_hypenet import CACHE

COMPILED_TOKENS = 64  # of a prompt, to compile with


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen, and how many are read at once.

    Attributes:
        max_new_tokens: Largest number of tokens of a continuation.
        temperature: Of sampling; 0 is greedy decoding.
        top_p: Probability mass of nucleus sampling.
        seed: Of the samples.
        prefill_chunk: Tokens of a prompt that are read at once; of a longer one the progress is shown.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    prefill_chunk: int


@dataclass(frozen=True)
class Speed:
    """Tokens that a continuation read and then wrote one by one, and the seconds that these took.

    The first new token comes from the last one read, and counts there.
    """

    read: int
    read_seconds: float
    written: int
    written_seconds: float

    def __str__(self) -> str:
        """Return one line with both rates."""
        parts = (("prefill", self.read, self.read_seconds), ("decode", self.written, self.written_seconds))
        return ", ".join(
            f"{name} {count:,} tokens in {seconds:.2f} s" + (f" ({count / seconds:,.1f} tokens/s)" if count else "")
            for name, count, seconds in parts
        )


class TimedStreamer(TextStreamer):
    """Prints the text as it is generated, and notes when each token was there."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Print what is complete; the first call has the prompt, before it is read."""
        self.times.append(time.perf_counter())
        super().put(value)


class Writer:
    """A saved model with its tokenizer, which continues token lists and prints the new text.

    Args:
        folder: Folder of the model.
        dtype: Data type of the weights, or "auto".
        device: Device to run on, or "auto".
        settings: How tokens are chosen.

    Raises:
        HaloError: If the folder or the device cannot be used.
    """

    def __init__(self, folder: Path, dtype: str, device: str, settings: Settings) -> None:
        logging.disable_progress_bar()
        self.settings = settings
        self.device = find_device(device)
        self.network, self.tokenizer = load_saved(folder, dtype, "copy the folder again")
        with self._enough_memory("the model"):
            self.network.to(self.device)  # type: ignore[arg-type]  # transformers wraps Module.to without its types
        self.forget()
        set_seed(settings.seed)
        if hasattr(sys.stdout, "reconfigure"):  # a terminal that has not all characters must not end the program
            sys.stdout.reconfigure(errors="replace")

    def forget(self) -> None:
        """Drop the tokens that the cache holds."""
        self.held: list[int] = []
        self.cache: Any = None

    def compile(self, ids: list[int]) -> None:
        """Compile the model for prompts and single tokens of any length, by continuing some tokens once.

        Raises:
            HaloError: If torch cannot compile here.
        """
        from torch._dynamo.exc import TorchDynamoException

        self.network.forward = torch.compile(self.network.forward, dynamic=True)
        try:
            with torch.no_grad():
                cache = None
                for piece in (ids[:COMPILED_TOKENS], ids[:1], ids[:1], ids[:1]):
                    inputs = torch.tensor([piece], device=self.device)
                    cache = self.network(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)[CACHE]
        except TorchDynamoException as error:
            told = str(error).strip().splitlines()[0][:200]
            raise HaloError(f"--compile: must be possible with this machine's compiler, got {told}") from None

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return the tokens of a text, with those that the tokenizer puts around a text if `special`."""
        tokens: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return tokens

    def render(self, messages: list[dict[str, str]]) -> str:
        """Return a conversation as the tokenizer's chat template writes it, up to where the answer begins.

        Raises:
            HaloError: If the template cannot write it.
        """
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError) as error:
            told = " ".join(str(error).split())[:200]
            raise HaloError(f"chat template: must write this conversation, got {told}; --raw does without") from None
        return str(text)

    def write(self, ids: list[int]) -> tuple[list[int], Speed]:
        """Continue tokens, print the text, and return the new tokens and the speed.

        What the cache holds of `ids` is not read again; if it holds anything else, all of them are read.

        Raises:
            HaloError: If memory does not suffice.
        """
        if ids[: len(self.held)] != self.held or len(ids) == len(self.held):
            self.forget()
        reading = len(ids) - len(self.held)
        streamer = TimedStreamer(self.tokenizer)
        inputs = torch.tensor([ids])
        continue_text: Any = self.network.generate
        with self._enough_memory(f"the model and {len(ids)} + {self.settings.max_new_tokens} tokens"):
            inputs = inputs.to(self.device)
            with self._reading_shown(reading):
                result = continue_text(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    generation_config=self._generation_config(reading),
                    streamer=streamer,
                    past_key_values=self.cache,
                )
        every: list[int] = result.sequences[0].tolist()
        self.cache, self.held = result[CACHE], every[:-1]  # the last token has not been read
        start, first, last = streamer.times[0], streamer.times[1], streamer.times[-1]
        return every[len(ids) :], Speed(reading, first - start, len(every) - len(ids) - 1, last - first)

    def _generation_config(self, reading: int) -> GenerationConfig:
        settings, saved = self.settings, self.network.generation_config
        sampling: dict[str, Any] = {"do_sample": settings.temperature > 0}
        if settings.temperature > 0:
            sampling |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        own = self.tokenizer
        return GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=saved.eos_token_id if saved.eos_token_id is not None else own.eos_token_id,
            pad_token_id=saved.pad_token_id if saved.pad_token_id is not None else own.pad_token_id,
            return_dict_in_generate=True,
            prefill_chunk_size=settings.prefill_chunk if reading > settings.prefill_chunk else None,
            **sampling,
        )

    @contextmanager
    def _enough_memory(self, needs: str) -> Iterator[None]:
        """Report that memory does not suffice in one line."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "alloc" in str(error):
                print(flush=True)
                raise HaloError(
                    f"must have memory for {needs} on {self.device}, got too little; "
                    "lower --max-new-tokens, or give --dtype bfloat16"
                ) from None
            raise

    @contextmanager
    def _reading_shown(self, tokens: int) -> Iterator[None]:
        """Show on a terminal how much of a long prompt has been read, until all of it has."""
        if tokens <= self.settings.prefill_chunk:
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

            handle = self.network.register_forward_hook(count, with_kwargs=True)
            yield
