"""A conversion small enough for a test: text of sixty words, its tokenizer, a random Qwen3 of three layers."""

import random
import re

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from halo.config import make_config
from halo.demo.train_teacher import train_tokenizer

LAYERS = 3
WORDS = re.findall(
    r"\w+",
    "river stone quiet morning window garden silver letter winter summer market bridge candle forest island "
    "mountain harbour meadow thunder shadow copper violet lantern orchard pepper walnut marble ribbon saddle timber",
)


def documents(count=60, words=60, seed=0):
    rng = random.Random(seed)
    return [f"document {i}: " + " ".join(rng.choices(WORDS, k=words)) + "." for i in range(count)]


def tiny_tokenizer():
    return train_tokenizer(documents(), seed=0)


def tiny_teacher(vocab_size=None, tokenizer=None, layers=LAYERS):
    vocab_size = len(tokenizer) if vocab_size is None else vocab_size
    token = None if tokenizer is None else tokenizer.eos_token_id
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=True,
        initializer_range=0.1,
        eos_token_id=token,
        bos_token_id=token,
    )
    torch.manual_seed(1)
    return Qwen3ForCausalLM(config).eval()


def write_inputs(directory):
    """Write a teacher and a directory of text files under `directory`."""
    tokenizer = tiny_tokenizer()
    tiny_teacher(tokenizer=tokenizer).save_pretrained(directory / "teacher")
    tokenizer.save_pretrained(directory / "teacher")
    (directory / "text").mkdir()
    for i, text in enumerate(documents()):
        (directory / "text" / f"{i:02d}.txt").write_text(text)


def config_tree(directory, out="out"):
    """Return the configuration of a whole conversion that takes a few seconds."""
    training = {"steps": 4, "batch": 2, "length": 48, "learning_rate": 1e-3, "warmup": 1, "log_every": 1}
    return {
        "teacher": str(directory / "teacher"),
        "out": str(directory / out),
        "data": {"source": str(directory / "text"), "held_out": 0.3, "needle_ratio": 0.3},
        "calibrate": {"samples": 4, "held_samples": 2, "length": 64},
        "align": training,
        "select": {
            "keep": 1,
            "recall_samples": 3,
            "recall_length": 160,
            "language_samples": 4,
            "language_length": 32,
            "bootstrap": 20,
        },
        "distill": training,
        "finetune": training | {"length": 64, "micro_batch": 1},
        "scale": {"grid": [None, 10, 100], "length": 64, "documents": 2},
        "eval": {"length": 160, "multiples": [1, 2], "recall_samples": 4, "recall_tokens": 640, "text_tokens": 320},
    }


def tiny_config(directory, **sections):
    return make_config(config_tree(directory) | sections)
