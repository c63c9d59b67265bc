"""Recall and bits per byte of a model at multiples of the training length."""

from collections.abc import Iterator

from torch import nn

from halo.config import EvalSettings
from halo.data import Corpus
from halo.evaluation.needle import recall, token_stream
from halo.evaluation.perplexity import bits_per_byte

TOKENS_PER_FORWARD = 8192


def evaluate(model: nn.Module, label: str, corpus: Corpus, settings: EvalSettings) -> Iterator[dict]:
    """One row per length: recall and bits per byte on held-out text, each with a standard error.

    A length longer than all held-out text has bits_per_byte None.
    """
    tokenizer = corpus.tokenizer
    stream = token_stream(tokenizer, corpus.held_out_texts())
    for multiple in settings.multiples:
        length = settings.length * multiple
        batch = max(1, TOKENS_PER_FORWARD // length)
        needles = recall(model, tokenizer, length, settings.recall_samples, haystack=stream, batch_size=batch)
        text = {"bits_per_byte": None, "stderr": None}
        if len(stream) >= length:
            text = bits_per_byte(model, tokenizer, stream, length, settings.text_tokens, batch_size=batch)
        yield {
            "model": label,
            "multiple": multiple,
            "length": length,
            "recall": needles["recall"],
            "recall_error": needles["stderr"],
            "bits_per_byte": text["bits_per_byte"],
            "bits_per_byte_error": text["stderr"],
        }
