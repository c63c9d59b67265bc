"""From texts to tokens. A fast tokenizer is used without transformers, so that a worker process starts in no time."""

from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoder:
    """Returns the tokens of texts as the tokenizer does, without special tokens but with EOS at the end.

    It can be sent to another process, and does not depend on later changes of the tokenizer.

    Args:
        tokenizer: Has an EOS token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.eos = tokenizer.eos_token_id
        self.slow = None if tokenizer.is_fast else tokenizer
        self.fast: Tokenizer | None = None
        if tokenizer.is_fast:
            self.fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self.fast.no_truncation()
            self.fast.no_padding()
            self.fast.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """Return the tokens of each text and EOS, uint32."""
        if not texts:
            return []
        if self.fast is not None:
            rows = [encoding.ids for encoding in self.fast.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            assert self.slow is not None
            rows = self.slow(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [np.array([*ids, self.eos], np.uint32) for ids in rows]
