"""What a stage works with: the configuration, the processes, the files of the run, and teacher and data on demand."""

import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from halo import files, models, teachers
from halo.compute import Compute
from halo.data import Batch, Corpus, batches
from halo.flops import stage_flops_per_token
from halo.footprint import Sizes, training_memory
from halo.hardware import this_machine
from halo.journal import Journal
from halo.progress import TokenisingProgress, warn
from halo.settings import HaloError, Settings, TrainingSettings
from halo.sharding import whole_state
from halo.stages import ALIGNED_STAGES, SAMPLE_ORDERS, STAGES, TRAINED_STAGES
from halo.trainer import BatchSource, Run, Training, train
from halo.unpacking import unpacked
from hypenet import HypeNetForCausalLM
from hypenet.conversion import attend_with_kernels

if TYPE_CHECKING:
    from halo.config import Config


class Job:
    """One conversion, as its stages see it. Teacher, tokenizer and data are loaded once, when first needed.

    Args:
        config: The configuration.
        compute: Device and processes; started from the configuration if not given.
        like: A job with the same teacher, data and seed; its loaded objects are reused.
    """

    def __init__(self, config: "Config", compute: Compute | None = None, like: "Job | None" = None) -> None:
        self.config, self.out = config, config.out
        if like is not None:
            compute = compute or like.compute
            self.corpus, self.teacher_config = like.corpus, like.teacher_config
        self.compute: Compute = compute or Compute.start(config.device, config.precision, config.threads)

    @cached_property
    def teacher_config(self) -> PreTrainedConfig:
        """The teacher's configuration, checked."""
        return teachers.check_teacher(self.config.teacher)

    @cached_property
    def teacher_name(self) -> str:
        """The name to load the teacher by: the configured one, or the folder that a .gguf file was converted to."""
        return self.compute.from_main(lambda: unpacked(self.config.teacher, self.out / files.TEACHER))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer."""
        return teachers.load_tokenizer(self.teacher_name)

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The teacher in the arithmetic's dtype, on the device, in evaluation mode."""
        teacher = teachers.load_teacher(self.teacher_name, self.compute.device, self.compute.dtype)
        if self.compute.device.type == "cpu":  # where the kernel is faster than torch's
            attend_with_kernels(teacher)
        return teacher.requires_grad_(False).eval()

    @cached_property
    def corpus(self) -> Corpus:
        """The text of training, of choices and of the final measurement."""
        corpus = Corpus(self.config.data, self.tokenizer, self.config.seed, self.out / "data", self.training_tokens())
        self.compute.from_main(lambda: corpus.prepare(TokenisingProgress()))
        if self.compute.main:
            for line in corpus.complaints():
                warn(line)
        return corpus

    def load_teacher_weights(self) -> PreTrainedModel:
        """Load the teacher on the CPU in the dtype that it is stored in, to copy weights from."""
        stored = getattr(self.teacher_config, "dtype", None)
        dtype = stored if isinstance(stored, torch.dtype) else torch.float32
        return teachers.load_teacher(self.teacher_name, torch.device("cpu"), dtype)

    def release_teacher(self) -> None:
        """Free the teacher's memory."""
        self.__dict__.pop("teacher", None)

    def training_tokens(self) -> int:
        """Return the tokens of all training stages together."""
        stages: list[TrainingSettings] = [getattr(self.config, name) for name in TRAINED_STAGES]
        return sum(stage.steps * stage.batch * stage.length for stage in stages)

    def training_length(self) -> int:
        """Return the longest sequence in training, in tokens."""
        lengths = [getattr(self.config, name).length for name in TRAINED_STAGES if getattr(self.config, name).steps]
        return max(lengths, default=self.config.align.length)

    def directory(self, stage: str) -> Path:
        """Return the directory of a stage's result."""
        if stage in ALIGNED_STAGES and self.config.aligned is not None:
            other = self.config.aligned
            return other / stage if (other / stage / files.DONE).is_file() or stage != "align" else other
        return self.out / stage

    def identity(self, stage: str) -> dict[str, Any]:
        """Return everything that a stage's result depends on: inputs, and the settings up to this stage."""
        config = self.config
        found: dict[str, Any] = {
            "teacher": config.teacher,
            "teacher_fingerprint": self.teacher_fingerprint,
            "mixer": config.mixer,
            "seed": config.seed,
            "precision": self.compute.precision,
            "data": config.data.identity() | {"fingerprint": self.corpus.fingerprint},
        }
        if config.architecture:
            found["architecture"] = config.architecture
        if config.aligned is not None:
            found["aligned"] = str(config.aligned)
        for name in STAGES[: STAGES.index(stage) + 1]:
            section = getattr(config, name, None)
            if not isinstance(section, Settings) or (name in ALIGNED_STAGES and config.aligned is not None):
                continue
            found[name] = section.identity()
            if name == "calibrate":
                found[name]["parts"] = "+".join(config.calibration_parts)
                if not config.calibration_parts:  # as runs of versions without this stage
                    del found[name]
        return found

    @cached_property
    def teacher_fingerprint(self) -> str:
        """A short text that changes when the teacher's files do."""
        return self.compute.from_main(lambda: teachers.fingerprint(self.config.teacher))

    def journal(self, stage: str) -> Journal:
        """Open the journal of a stage that measures."""
        return Journal(self.directory(stage), self.identity(stage), self.compute)

    def train(self, training: Training) -> None:
        """Train a stage on its samples."""
        settings = training.settings
        kept = None if training.name == "align" else len(self.softmax_layers())
        flops = stage_flops_per_token(
            training.name,
            self.teacher_config,
            self.config.mixer,
            settings.length,
            softmax_layers=kept,
            architecture=self.config.architecture,
        )
        run = Run(
            self.batch_source(settings, SAMPLE_ORDERS[training.name]),
            self._held_out(settings),
            self.identity(training.name),
            flops,
            self.config.tensorboard,
            self._sync_every_micro_batch(training.name, settings),
        )
        train(training, run, self.directory(training.name), self.compute)

    def batch_source(self, settings: TrainingSettings, order: int) -> BatchSource:
        """Return this process's share of the training batches of an order of the samples, from any step on."""
        samples, compute = self.corpus.samples(settings.length, settings.needle_ratio, order), self.compute
        return lambda step: batches(samples, settings.batch, step, compute.rank, compute.world, compute.device)

    def sizes(self, softmax_layers: Sequence[int]) -> Sizes:
        """Measure the models of this conversion, with softmax attention in some layers of the student.

        Raises:
            HaloError: If the fields of `architecture` do not fit the teacher.
        """
        return Sizes.of(self.teacher_config, self.config.mixer, softmax_layers, **self.config.architecture)

    def _sync_every_micro_batch(self, stage: str, settings: TrainingSettings) -> bool:
        """Choose by the memory that the stage will need; all processes the same, or they would wait for each other."""
        if self.compute.world == 1:
            return False
        kept = [] if stage == "align" else self.softmax_layers()
        memory = training_memory(stage, self.sizes(kept), settings, this_machine(self.compute))
        return self.compute.agree(memory.sync_every_micro_batch)[0]

    def _held_out(self, settings: TrainingSettings) -> list[Batch]:
        """Return held-out text for the measurements of a stage, in batches that every process has a share of."""
        if settings.held_out_every is None:
            return []
        world = self.compute.world
        size = (settings.micro_batch or max(settings.batch // world, 1)) * world
        chunks = self.corpus.chunks("choose", settings.held_out_samples, settings.length)
        whole = chunks[: max(len(chunks) // size, 1) * size]
        if len(whole) % world:
            raise HaloError(f"held_out_samples: must be at least the {world} processes, got {len(whole)} samples")
        return [Batch(ids, torch.zeros_like(ids, dtype=torch.int32)) for ids in whole.split(size)]

    def load_mixers(self, stage: str) -> nn.ModuleList:
        """Load the twins that transfer, calibrate or align left, in float32 on the CPU."""
        path = self.directory(stage) / files.MIXERS
        config, remedy = self.config, _again(path.parent)
        return models.load_mixers(path, self.teacher_config, config.mixer, remedy, **config.architecture)

    def untrained_mixers(self) -> nn.ModuleList:
        """Load the twins that alignment begins with: calibrated ones, or those of transfer if nothing is calibrated."""
        return self.load_mixers("calibrate" if self.config.calibration_parts else "transfer").to(self.compute.device)

    def measured_mixers(self) -> nn.ModuleList:
        """Load the twins that align left to measure them, as the teacher: frozen, in the arithmetic's dtype."""
        mixers = self.load_mixers("align").to(self.compute.device, self.compute.dtype)
        return mixers.requires_grad_(False).eval()

    def load_student(self, stage: str) -> HypeNetForCausalLM:
        """Load the student that distill or finetune left to train it, in float32 on the device."""
        directory = self.directory(stage)
        return models.load_hypenet(directory / files.MODEL, self.compute.device, _again(directory))

    def measured_student(self, stage: str) -> HypeNetForCausalLM:
        """Load a student to measure it, as the teacher: frozen, in the arithmetic's dtype.

        Args:
            stage: That left it: "distill", "finetune", or "scale" for the finished model.
        """
        directory = self.directory(stage)
        path = (self.out if stage == "scale" else directory) / files.MODEL
        student = models.load_hypenet(path, self.compute.device, _again(directory), self.compute.dtype)
        student.requires_grad_(False).eval()
        return student

    def save_student(self, student: HypeNetForCausalLM, stage: str) -> None:
        """Write a trained student, gathered from all processes, as a folder of transformers."""
        state = whole_state(student, self.compute)
        if self.compute.main:
            path = self.directory(stage) / files.MODEL
            files.write_directory(path, lambda partial: student.save_pretrained(partial, state_dict=state))

    def save_model(self, base: float | None) -> None:
        """Write the finished model: what finetune left, the chosen base, the tokenizer, and a measured context length.

        Args:
            base: Of the HyPE scale; None for no scale.
        """
        trained = self.directory("finetune") / files.MODEL

        def write(partial: Path) -> None:
            shutil.copytree(trained, partial, dirs_exist_ok=True)
            models.set_saved_scale_base(partial, base)
            self.tokenizer.save_pretrained(partial)
            models.raise_context_length(partial, max(self.config.scale.length, self.config.eval.longest()))

        files.write_directory(self.out / files.MODEL, write)

    def softmax_layers(self) -> list[int]:
        """Return the softmax layers that the select stage chose."""
        path = self.directory("select") / files.SELECTION
        layers = files.read_json(path, _again(path.parent)).get("layers")
        count = self.teacher_config.num_hidden_layers
        if not isinstance(layers, list) or not all(isinstance(i, int) and 0 <= i < count for i in layers):
            raise HaloError(f"{path}: layers must be numbers below {count}, got {layers}; {_again(path.parent)}")
        return layers


def _again(directory: Path) -> str:
    return f"delete {directory} to run its stage again"
