"""Train the demo's teacher: `python -m halo.demo.train_teacher --out halo/demo/teacher`.

A small Qwen3 learns the corpus and key-value recall. The budget is a number of tokens, and a batch is a function of
(seed, step), so runs are repeatable and an interrupted run resumes from `--run-dir`. The context grows in phases.
Repeated random segments in the early phases make induction heads form, without which recall appears late or never.
"""

import argparse
import json
import math
import os
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halo.extras import require

require("halo.demo.train_teacher", "halo")

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from halo.demo import corpus
from halo.evaluation.needle import NEEDLE_END, NEEDLE_LINK, NEEDLE_PREFIX, NUM_DIGITS, NeedleTask, recall, token_stream
from halo.evaluation.perplexity import bits_per_byte

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 2048
TRAINING_LENGTH = 512


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of the training run; progress is the share of the tokens that are done."""

    num_tokens: int = 21_000_000
    batch_tokens: int = 6144
    # (context length, share of the tokens after which it ends)
    contexts: tuple[tuple[int, float], ...] = ((96, 0.3112), (160, 0.40), (256, 0.62), (TRAINING_LENGTH, 1.0))
    episode_share: float = 0.6
    repeat_share: float = 1 / 3  # of all sequences, up to `repeat_until`
    repeat_until: float = 0.40
    max_needles: int = 8
    answer_weight: float = 4.0
    learning_rate: float = 3e-3
    warmup_steps: int = 150
    decay_from: float = 0.65  # constant until here, then linear to `final_rate`
    final_rate: float = 0.02
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0

    def context(self, progress: float) -> int:
        """Return the context length at a given progress."""
        return next(length for length, end in self.contexts if progress < end or end == 1.0)

    def rate(self, step: int, progress: float) -> float:
        """Return the learning rate."""
        if progress > self.decay_from:
            left = (1 - progress) / (1 - self.decay_from)
            return self.learning_rate * max(left, self.final_rate)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps)


def model_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    """Return the configuration of the teacher."""
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=TRAINING_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


def train_tokenizer(documents: list[str], seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every digit is a token, alone or with a space before it."""
    tokenizer = Tokenizer(models.BPE())
    digit = pre_tokenizers.Split(Regex(r" ?\d"), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digit, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = np.random.default_rng(seed)
    values = ("".join(map(str, rng.integers(0, 10, NUM_DIGITS))) for _ in range(4000))
    templates = [f"{NEEDLE_PREFIX}{NEEDLE_LINK} {value}{NEEDLE_END}\n" for value in values]
    tokenizer.train_from_iterator(documents + templates, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


class Batches:
    """Makes the batches of a run."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stream: np.ndarray, recipe: Recipe, seed: int) -> None:
        self.task = NeedleTask(tokenizer, stream)
        self.stream, self.recipe, self.seed = stream, recipe, seed

    def batch(self, step: int, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens [B, T] of a step and the weight of each token in the loss [B, T]."""
        rng = np.random.default_rng((self.seed, step))
        length = self.recipe.context(progress)
        repeats = self.recipe.repeat_share if progress < self.recipe.repeat_until else 0.0
        rows = []
        for _ in range(self.recipe.batch_tokens // length):
            if rng.random() < repeats:
                rows.append(self._repeat(rng, length))
            elif rng.random() < self.recipe.episode_share:
                rows.append(self._episode(rng, length))
            else:
                rows.append(self._text(rng, length))
        ids, weights = zip(*rows, strict=True)
        return torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(weights))

    def _text(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        start = rng.integers(0, len(self.stream) - length)
        ids = self.stream[start : start + length].astype(np.int64)
        return ids, np.ones(length, dtype=np.float32)

    def _repeat(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        period = rng.integers(8, length // 2 + 1)
        ids = np.resize(rng.integers(1, VOCAB_SIZE, size=period), length)
        return ids, (np.arange(length) >= period).astype(np.float32)

    def _episode(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        room = (length - length // 8) // self.task.min_length(1, 1)
        num_needles = int(rng.integers(1, min(self.recipe.max_needles, room) + 1))
        # Query every needle: more answers give a denser training signal.
        episode = self.task.episode(rng, length, num_needles, num_needles)
        weights = np.ones(length, dtype=np.float32)
        digits = np.arange(self.task.answer_length)
        weights[episode.needle_starts[:, None] + digits] = 0.0
        weights[episode.answer_starts[:, None] + digits] = self.recipe.answer_weight
        return episode.input_ids, weights


def weighted_loss(model: Qwen3ForCausalLM, ids_BT: torch.Tensor, weights_BT: torch.Tensor) -> torch.Tensor:
    """Compute the weighted mean of the next-token losses."""
    hidden_BTC = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state[:, :-1]
    logits_BTV = model.lm_head(hidden_BTC).float()
    nll = F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
    weights = weights_BT[:, 1:].flatten()
    return (nll * weights).sum() / weights.sum()


def build_optimizer(model: Qwen3ForCausalLM, recipe: Recipe) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


class Run:
    """One training run, whose tokenizer, checkpoint, log and snapshots are in `run_dir`."""

    def __init__(self, args: argparse.Namespace, recipe: Recipe) -> None:
        self.args, self.recipe, self.dir = args, recipe, Path(args.run_dir)
        self.dir.mkdir(parents=True, exist_ok=True)
        self.num_steps = math.ceil(recipe.num_tokens / recipe.batch_tokens)
        self.tokenizer = self._tokenizer()
        self.heldout = token_stream(self.tokenizer, corpus.documents("heldout"))
        train = token_stream(self.tokenizer, corpus.documents("train"))
        self.batches = Batches(self.tokenizer, train, recipe, args.seed)
        torch.manual_seed(args.seed)
        self.model = Qwen3ForCausalLM(model_config(self.tokenizer))
        self.optimizer = build_optimizer(self.model, recipe)
        self.step = 0
        self._resume()
        self.log(event="start", train_tokens=len(train), heldout_tokens=len(self.heldout), num_steps=self.num_steps)

    def train(self) -> None:
        """Run all steps that are left."""
        losses, logged_at, saved_at, tokens = [], time.monotonic(), time.monotonic(), 0
        while self.step < self.num_steps:
            progress = self.step / self.num_steps
            context = self.recipe.context(progress)
            ids, weights = self.batches.batch(self.step, progress)
            rate = self.recipe.rate(self.step, progress)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = weighted_loss(self.model, ids, weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            losses.append(loss.item())
            tokens += ids.numel()
            if self.step % self.args.log_every == 0:
                speed = tokens / (time.monotonic() - logged_at)
                self.log(context=context, rate=rate, loss=float(np.mean(losses)), tokens_per_second=round(speed))
                losses, logged_at, tokens = [], time.monotonic(), 0
            if self.step % self.args.evaluate_every == 0:
                self.log(**self.evaluate((256, 512), num_samples=24, num_tokens=16384))
                self.snapshot("latest")
                logged_at = time.monotonic()
            phase_ends = self.recipe.context(self.step / self.num_steps) != context
            if phase_ends or time.monotonic() - saved_at > self.args.checkpoint_seconds:
                self.checkpoint()
                saved_at = time.monotonic()
            if phase_ends:
                self.snapshot(f"context{context}")
        self.checkpoint()

    def evaluate(self, lengths: tuple[int, ...], num_samples: int, num_tokens: int) -> dict[str, Any]:
        """Measure recall and bits per byte at several lengths."""
        result: dict[str, Any] = {}
        for length in lengths:
            batch_size = max(1, self.recipe.batch_tokens // length)
            score = recall(
                self.model, self.tokenizer, length, num_samples, seed=1, haystack=self.heldout, batch_size=batch_size
            )
            bits = bits_per_byte(self.model, self.tokenizer, self.heldout, length, num_tokens, batch_size)
            result[f"recall_{length}"] = score
            result[f"bits_per_byte_{length}"] = {key: bits[key] for key in ("bits_per_byte", "stderr")}
        return result

    def checkpoint(self) -> None:
        """Save model, optimizer and step, to resume from."""
        state = {"step": self.step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, self.dir / "checkpoint.partial")
        os.replace(self.dir / "checkpoint.partial", self.dir / "checkpoint.pt")

    def snapshot(self, name: str) -> None:
        """Save the model under a name in `run_dir`."""
        partial, final = self.dir / f"{name}.partial", self.dir / name
        shutil.rmtree(partial, ignore_errors=True)
        self.save(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)

    def save(self, path: Path) -> None:
        """Save model and tokenizer in the format of transformers."""
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    def log(self, **fields: Any) -> None:
        """Append a line to log.jsonl and print it."""
        line = {"time": round(time.time()), "step": self.step, "tokens": self.step * self.recipe.batch_tokens, **fields}
        with (self.dir / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        path = self.dir / "tokenizer"
        if not path.exists():
            train_tokenizer(corpus.documents("train"), self.args.seed).save_pretrained(path)
        return PreTrainedTokenizerFast.from_pretrained(path)

    def _resume(self) -> None:
        path = self.dir / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]


def main() -> None:
    """Train and save the teacher, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="halo/demo/teacher", help="directory of the trained teacher")
    parser.add_argument("--run-dir", default="teacher_run", help="directory of checkpoint, log and snapshots")
    parser.add_argument("--tokens", type=int, default=Recipe.num_tokens)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--evaluate-every", type=int, default=200)
    parser.add_argument("--checkpoint-seconds", type=float, default=120)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    run = Run(args, Recipe(num_tokens=args.tokens))
    run.train()
    finish(run, Path(args.out))


def finish(run: Run, out: Path) -> None:
    """Save the teacher and its metrics."""
    run.save(out)
    metrics = {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "tokens": run.num_steps * run.recipe.batch_tokens,
        "seed": run.args.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        **run.evaluate((128, 256, 512, 1024, 2048), num_samples=100, num_tokens=65536),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    run.log(event="end", **metrics)


if __name__ == "__main__":
    main()
