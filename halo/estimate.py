"""What a conversion will take, before anything is paid for: tokens, operations, hours, memory and disk of every stage.

Hours are operations / (processes * peak * utilisation). The utilisations of the training stages are those of the
published conversion of Qwen3-1.7B, 10.0, 43.4 and 37.7 A800-hours (arXiv 2601.22156, table 8), by this count of
operations; those of the stages that only run models forward are an assumption.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from halo import footprint
from halo.config import Config
from halo.flops import ModelSize, calibration_flops, training_flops
from halo.footprint import Memory, Sizes
from halo.hardware import Machine, find_machine
from halo.selection.cost import cost_of
from halo.selection.policies import count_runs
from halo.selection.settings import check_layers, gate_settings
from halo.settings import HaloError, LossSettings, TrainingSettings
from halo.stages import ALIGNED_STAGES, STAGES, TRAINED_STAGES
from halo.stages.evaluate import MIN_SAMPLES

UTILISATION = {
    "calibrate": 0.2,
    "align": 0.16,
    "distill": 0.36,
    "finetune": 0.40,
    "select": 0.3,
    "scale": 0.3,
    "eval": 0.3,
}
CPU_UTILISATION = 0.5  # of the measured rate of matrix products, all stages
TOKEN_BYTES = 4  # of a token in a shard


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        name: Of the stage.
        steps: Optimizer steps; None for a stage that does not train.
        tokens: That models process, all processes together.
        flops: Floating-point operations.
        utilisation: Share of the peak that `hours` assumes.
        hours: Of wall time.
        memory: Of one process; None for a stage that runs no model.
        results, checkpoints: Bytes on disk; checkpoints are deleted at the end of the stage.
    """

    name: str
    steps: int | None
    tokens: int
    flops: float
    utilisation: float
    hours: float
    memory: Memory | None
    results: float
    checkpoints: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A conversion.

    Attributes:
        gpus: As asked for, such as "8xH100".
        machine: The same in numbers.
        teacher, student: Numbers of parameters.
        stages: The stages that run.
        shards: Bytes of tokenised text; None if the source is not streamed, where it depends on the files.
        disk: Bytes at the fullest moment, with `shards` if known.
        host: Bytes of main memory of a node while its processes build models.
    """

    gpus: str
    machine: Machine
    teacher: int
    student: int
    stages: list[StagePlan] = field(default_factory=list)
    shards: float | None = None
    disk: float = 0.0
    host: float = 0.0

    @property
    def hours(self) -> float:
        """Hours of wall time."""
        return sum(stage.hours for stage in self.stages)

    def too_large(self) -> list[StagePlan]:
        """Return the stages that do not fit into the memory."""
        return [stage for stage in self.stages if stage.memory and stage.memory.total > self.machine.available]


def plan(config: Config, gpus: str, teacher_config: PreTrainedConfig, machine: Machine | None = None) -> Plan:
    """Plan a conversion.

    Args:
        config: Its configuration.
        gpus: "8xH100", "H200", "cpu" (its speed is measured), or "cpu@0.2" with the TFLOP/s of its matrix products.
        teacher_config: The teacher's configuration.
        machine: What `gpus` names, if it is known already.

    Raises:
        HaloError: If `gpus` names no known hardware, or the settings do not fit the teacher or the number of GPUs.
    """
    machine = machine or find_machine(gpus, config.precision, config.threads)
    for name in TRAINED_STAGES:
        settings: TrainingSettings = getattr(config, name)
        if settings.batch % machine.processes:
            raise HaloError(
                f"{name}.batch: must be a multiple of the {machine.processes} processes, got {settings.batch}"
            )
    keep = check_layers(config.select, teacher_config.num_hidden_layers)
    kept = sorted(set(config.select.layers)) if config.select.layers is not None else range(keep)
    sizes = Sizes.of(teacher_config, config.mixer, kept, **config.architecture)
    planner = _Planner(config, machine, sizes)
    stages = [getattr(planner, name)() for name in STAGES if config.aligned is None or name not in ALIGNED_STAGES]
    trained = sum(stage.tokens for stage in stages if isinstance(getattr(config, stage.name, None), TrainingSettings))
    streamed = all(_is_streamed(entry.source) for entry in config.data.sources())
    shards = TOKEN_BYTES * trained / (1 - config.data.held_out) if streamed else None
    return Plan(
        gpus=gpus,
        machine=machine,
        teacher=sizes.teacher.parameters,
        student=sizes.student.parameters,
        stages=stages,
        shards=shards,
        disk=_fullest(stages) + (shards or 0),
        host=footprint.host_bytes(sizes, stored_bytes(teacher_config), len(kept), machine),
    )


def stored_bytes(teacher_config: PreTrainedConfig) -> int:
    """Return the bytes of a weight in a teacher's files, 4 if its configuration does not say."""
    stored = getattr(teacher_config, "dtype", None)
    return stored.itemsize if isinstance(stored, torch.dtype) else footprint.WIDE


@dataclass(frozen=True)
class _Planner:
    """Plans each stage; a method for each."""

    config: Config
    machine: Machine
    sizes: Sizes

    def transfer(self) -> StagePlan:
        return self._stage("transfer", None, 0, 0.0, None, footprint.model_bytes(self.sizes.mixers))

    def calibrate(self) -> StagePlan:
        settings, sizes = self.config.calibrate, self.sizes
        parts = self.config.calibration_parts
        if not parts:
            return self._stage("calibrate", None, 0, 0.0, None, 0.0)
        fitted, held = settings.samples * settings.length, settings.held_samples * settings.length
        # Every process runs the teacher on all sequences, and calibrates its share of the layers.
        teacher = (fitted + held) * sizes.teacher.forward(settings.length) * self.machine.processes
        flops = teacher + calibration_flops(sizes.teacher, sizes.twins, settings.length, fitted, held, parts)
        memory = footprint.calibrate_memory(sizes.teacher, sizes.twins, settings, self.machine)
        return self._stage("calibrate", None, fitted + held, flops, memory, footprint.model_bytes(sizes.mixers))

    def align(self) -> StagePlan:
        return self._trained("align", self.config.align, self.sizes.twins, self.sizes.mixers)

    def distill(self) -> StagePlan:
        return self._trained("distill", self.config.distill, self.sizes.student, self.sizes.student.parameters)

    def finetune(self) -> StagePlan:
        return self._trained("finetune", self.config.finetune, self.sizes.student, self.sizes.student.parameters)

    def select(self) -> StagePlan:
        settings, sizes = self.config.select, self.sizes
        if not settings.measures:
            return self._stage("select", None, 0, 0.0, None, 0.0)
        runs = count_runs(settings, len(sizes.teacher.layers))
        cost = cost_of(runs, settings, sizes.teacher, sizes.twins, sizes.student, self.machine.width)
        weights = self.machine.width * (sizes.teacher.parameters + sizes.mixers)
        tokens = settings.batch * max(settings.recall_length, settings.language_length)
        # Two heads, whose logits are computed 512 tokens at a time.
        memory = footprint.inference_memory(weights, sizes.teacher, tokens, self.machine, 2 * 512)
        if not runs.training_tokens:
            return self._stage("select", None, cost.tokens, cost.flops, memory, 0.0, parts=cost.passes)
        gates = footprint.gate_memory(weights, sizes.teacher, sizes.twins, gate_settings(settings), self.machine)
        memory = max(memory, gates, key=lambda found: found.total)
        return self._stage("select", settings.joint_steps, cost.tokens, cost.flops, memory, 0.0)

    def scale(self) -> StagePlan:
        settings, student = self.config.scale, self.sizes.student
        tokens, runs = settings.documents * settings.length, len(settings.grid)
        flops = tokens * (student.forward(settings.length) + student.head())
        weights = self.machine.width * student.parameters
        memory = footprint.inference_memory(weights, student, settings.length, self.machine)
        results = footprint.model_bytes(student.parameters)
        return self._stage("scale", None, runs * tokens, runs * flops, memory, results, parts=runs)

    def eval(self) -> StagePlan:
        settings, sizes = self.config.eval, self.sizes
        tokens, flops = 0, 0.0
        for multiple in settings.multiples:
            length = settings.length * multiple
            samples = settings.recall_samples
            if settings.recall_tokens is not None:
                samples = min(samples, max(MIN_SAMPLES, settings.recall_tokens // length))
            prompts = samples + len(settings.tasks) * settings.task_samples
            text = max(settings.text_tokens // length, 1) * length
            for model in (sizes.teacher, sizes.student, sizes.student):
                tokens += prompts * length + text
                flops += (prompts * length + text) * model.forward(length) + text * model.head()
        weights = self.machine.width * (sizes.teacher.parameters + sizes.student.parameters)
        longest = max(settings.batch_tokens, settings.length * max(settings.multiples))
        memory = footprint.inference_memory(weights, sizes.student, longest, self.machine)
        parts = 3 * len(settings.multiples) * (1 + len(settings.tasks))
        return self._stage("eval", None, tokens, flops, memory, 0.0, parts=parts)

    def _trained(self, name: str, settings: TrainingSettings, student: ModelSize, trained: int) -> StagePlan:
        tokens = settings.steps * settings.batch * settings.length
        loss = settings if isinstance(settings, LossSettings) else None
        recompute, two_passes = bool(loss and loss.checkpoint_activations), bool(loss and loss.vocab_chunk)
        flops = training_flops(name, self.sizes.teacher, student, settings.length, recompute, two_passes)
        checkpoints = footprint.CHECKPOINTS_ON_DISK * footprint.checkpoint_bytes(trained) if settings.steps else 0.0
        results = footprint.model_bytes(trained)
        memory = footprint.training_memory(name, self.sizes, settings, self.machine)
        return self._stage(name, settings.steps, tokens, tokens * flops, memory, results, checkpoints)

    def _stage(
        self,
        name: str,
        steps: int | None,
        tokens: int,
        flops: float,
        memory: Memory | None,
        results: float,
        checkpoints: float = 0.0,
        parts: int | None = None,
    ) -> StagePlan:
        utilisation = UTILISATION.get(name, 0.0) if self.machine.cuda else CPU_UTILISATION
        # Whole parts of a measurement are dealt to the processes.
        busy = self.machine.processes if parts is None else parts / -(-parts // self.machine.processes)
        hours = flops / (busy * self.machine.peak * utilisation) / 3600 if flops else 0.0
        return StagePlan(name, steps, tokens, flops, utilisation, hours, memory, results, checkpoints)


def _is_streamed(source: str) -> bool:
    return source != "stdlib" and source.count("/") <= 1 and not Path(source).expanduser().exists()


def _fullest(stages: list[StagePlan]) -> float:
    """Return the bytes on disk at the fullest moment: the results so far, with a stage's checkpoints."""
    kept, most = 0.0, 0.0
    for stage in stages:
        most = max(most, kept + max(stage.checkpoints, 0.0) + stage.results)
        kept += stage.results
    return most


def as_record(planned: Plan) -> dict[str, Any]:
    """Return a plan as plain JSON: bytes, hours and operations as numbers."""
    record = asdict(planned)
    for stage, plain in zip(planned.stages, record["stages"], strict=True):
        if stage.memory is not None:
            plain["memory"]["total"] = stage.memory.total
        plain["fits"] = stage not in planned.too_large()
    fits = not planned.too_large()
    totals = {"tokens": sum(stage.tokens for stage in planned.stages), "hours": planned.hours}
    totals |= {"flops": sum(stage.flops for stage in planned.stages)}
    totals |= {
        "gpu_hours": planned.hours * planned.machine.processes,
        "fits": fits,
        "memory_available": planned.machine.available,
    }
    return record | {"total": totals}
