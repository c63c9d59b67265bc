"""Small tokenizers of the kinds that models have. They differ in digits, spaces and in what has a token of its own."""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from halo.evaluation.vocabulary import WORDS

TEXT = [
    "The magic number for quiet river is 48213.\nThe magic number for silver window is 90127.\n" * 40,
    "The special number of garden market is 1234567. A quiet letter from the mountain bridge, the winter harbour.\n"
    * 40,
    "def winter(value):\n    return value + 1024  # the market is closed on 31.12.1999\n" * 40,
    " ".join([*WORDS, "quiet", "river", "morning", "letter", "harbour"]) * 10,
]
END = "<|end|>"


def _wrap(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def _byte_level(pre_tokenizer, size=700):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return _wrap(tokenizer)


def gpt2():
    """Byte-level BPE: numbers are merged as they come, so they have different numbers of tokens."""
    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def single_digits():
    """SmolLM2, and Qwen but for its space: each digit is a token, and so is the space before a number."""
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return _byte_level(pre_tokenizers.Sequence(parts))


def three_digits():
    """Llama 3: up to three digits are a token, all of which the vocabulary has."""
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    parts = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2200, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    numbers = " ".join(f"{number:03d}" for number in range(1000))
    tokenizer.train_from_iterator(TEXT + [numbers] * 20, trainer)
    return _wrap(tokenizer)


def bytes_only():
    """A byte is a token, as in ByT5 and MambaByte."""
    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), size=257)


def sentencepiece_bpe():
    """Llama 2, Mistral: BPE over text with a mark for the space, byte fallback, a space before the start of a text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    special = ["<unk>", END, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=list("abcdef0123456789-?:"), show_progress=False
    )
    tokenizer.train_from_iterator((word for text in TEXT for word in text.split()), trainer)
    return _wrap(tokenizer)


def unigram():
    """T5, XLM-R, Gemma's kind of model: Unigram over words whose space is a mark, which a decoded text loses."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", behavior="isolated"), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=["<unk>", END], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([*TEXT * 5, "0123456789 abcdefghijklmnopqrstuvwxyz-."], trainer)
    return _wrap(tokenizer)


def chinese():
    """A vocabulary of Chinese characters, with letters and digits one at a time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    text = "秋天的河流很安静。窗外的花园里有一封银色的信。" * 20
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[END], show_progress=False)
    letters = "abcdefghijklmnopqrstuvwxyzT 0123456789.\n-"
    tokenizer.train_from_iterator([text, letters], trainer)
    return _wrap(tokenizer)


def whitespace():
    """Words between spaces: whatever is not in the vocabulary is lost."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=500, special_tokens=["<unk>", END], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return _wrap(tokenizer)


KINDS = (gpt2, single_digits, three_digits, bytes_only, sentencepiece_bpe, unigram, chinese)
