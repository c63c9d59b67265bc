"""The command `halo plan`: the teacher's configuration, and the table."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig, Qwen3Config

from halo import estimate
from halo.columns import columns
from halo.compute import Compute
from halo.config import Config
from halo.estimate import CPU_UTILISATION, Plan, StagePlan
from halo.hardware import RESERVED, measured_flops, this_machine
from halo.progress import say
from halo.settings import HaloError, LossSettings, TrainingSettings
from halo.teachers import check_teacher
from hypenet.conversion import family_of

# Sizes of teachers that can be planned for without the Hub: hidden, MLP, layers, query heads, tied head.
QWEN3 = {
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
}
GIB = 2**30
HEAD = ["stage", "steps", "tokens", "FLOPs", "used", "hours"]
HEAD += ["weights", "grads", "Adam", "activ.", "loss", "memory", "disk"]


def print_plan(planned: Plan, config: Config) -> None:
    """Print a plan: a row per stage, totals, what does not fit, and what was assumed."""
    machine = planned.machine
    say(
        f"{planned.gpus}: {machine.processes} x {machine.peak / 1e12:,.4g} TFLOP/s, {machine.memory / GIB:,.0f} GiB "
        f"each; teacher {planned.teacher / 1e9:,.3f} B parameters, student {planned.student / 1e9:,.3f} B"
    )
    tokens, flops = (sum(getattr(stage, name) for stage in planned.stages) for name in ("tokens", "flops"))
    total = ["total", "", _count(tokens), f"{flops:.1e}", "", _hours(planned.hours), *[""] * 6, _gib(planned.disk)]
    for line in columns([HEAD, *(_row(stage, planned) for stage in planned.stages), total]):
        say(line)
    for line in _notes(planned, config):
        say(line)


def find_teacher(name: str, file: Path | None = None) -> PreTrainedConfig:
    """Return the configuration of a teacher, without the Hub where that is possible.

    Args:
        name: As in the configuration. Qwen3-1.7B, 4B and 8B and their base models are known without the Hub.
        file: Its config.json, or a directory that has one, to use instead.

    Raises:
        HaloError: If it cannot be read or converted.
    """
    if file is not None:
        try:
            config = AutoConfig.from_pretrained(file)
            family_of(config)
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise HaloError(f"--teacher-config: must be the config.json of a teacher, got {file} ({reason})") from None
        return config
    match = re.fullmatch(r"Qwen/Qwen3-(1\.7B|4B|8B)(-Base)?", name)
    if match and not Path(name).is_dir():
        hidden, mlp, layers, heads, tied = QWEN3[match[1]]
        return Qwen3Config(
            vocab_size=151_936,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=tied,
        )
    return check_teacher(name)


def expectation(config: Config, compute: Compute, teacher_config: PreTrainedConfig, names: Sequence[str]) -> str:
    """Return one line on what the stages of these names will take on the hardware that they are about to run on."""
    machine = this_machine(compute)
    if not machine.cuda:
        machine = replace(machine, peak=measured_flops(compute.dtype, seconds=0.1) / machine.processes)
    if not machine.peak:
        name = torch.cuda.get_device_name(compute.device)
        return f"estimate   none: the speed of {name} is not known; halo plan --gpus has that of others"
    planned = estimate.plan(config, "", teacher_config, machine)
    stages = [stage for stage in planned.stages if stage.name in names and stage.hours]
    parts = ", ".join(f"{stage.name} {_duration(stage.hours)}" for stage in stages)
    hours, tokens = sum(stage.hours for stage in stages), sum(stage.tokens for stage in stages)
    return f"estimate   {_duration(hours)} for {_count(tokens)} tokens ({parts}); details: halo plan"


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:.0f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"


def _row(stage: StagePlan, planned: Plan) -> list[str]:
    memory = stage.memory
    parts = (
        [] if memory is None else [memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.loss]
    )
    mark = "!" if stage in planned.too_large() else ""
    return [
        stage.name,
        "" if stage.steps is None else f"{stage.steps:,}",
        _count(stage.tokens),
        f"{stage.flops:.1e}" if stage.flops else "",
        f"{stage.utilisation:.0%}" if stage.flops else "",
        _hours(stage.hours),
        *([_gib(part) for part in parts] or [""] * 5),
        "" if memory is None else mark + _gib(memory.total),
        _gib(stage.results + stage.checkpoints),
    ]


def _notes(planned: Plan, config: Config) -> list[str]:
    machine = planned.machine
    gpu_hours = f", {planned.hours * machine.processes:,.1f} GPU-hours" if machine.cuda else ""
    reserved = f" ({RESERVED / GIB:.0f} GiB kept free)" if machine.cuda else ""
    used = "of the peak" if machine.cuda else f"of the rate of matrix products ({CPU_UTILISATION:.0%} assumed)"
    shards = "the size of the text" if planned.shards is None else f"{_gib(planned.shards)} GiB"
    lines = [
        f"{planned.hours:,.1f} hours{gpu_hours}. 'used' is the share {used} that the hours assume",
        f"memory is that of one process in GiB{reserved}; disk is in GiB, training stages with three checkpoints",
        f"tokenised text on disk: {shards}; main memory of a node while models are built: {_gib(planned.host)} GiB",
    ]
    lines += [
        f"{stage.name} reduces gradients after every micro-batch: whole gradients would not fit, or are not wanted"
        for stage in planned.stages
        if stage.memory and stage.memory.sync_every_micro_batch
    ]
    lines += [
        f"! {stage.name} takes {_gib(stage.memory.total)} GiB of {_gib(machine.available)}{_remedy(stage, config)}"
        for stage in planned.too_large()
        if stage.memory is not None
    ]
    return lines


def _remedy(stage: StagePlan, config: Config) -> str:
    section = getattr(config, stage.name)
    if isinstance(section, TrainingSettings):
        wanted = ["more memory"]
        if isinstance(section, LossSettings) and not section.checkpoint_activations:
            wanted.insert(0, f"{stage.name}.checkpoint_activations")
        if section.micro_batch != 1:
            wanted.insert(0, f"a smaller {stage.name}.micro_batch")
        return f": needs {' or '.join(wanted)}"
    keys = {"select": "batch", "scale": "length"}
    if config.select.policy == "joint":
        keys["select"] = "joint_length" if config.select.joint_micro_batch == 1 else "joint_micro_batch"
    key = keys.get(stage.name)
    return f": lower {stage.name}.{key}" if key else ": remove the largest of eval.multiples"


def _count(tokens: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.0f}" if tokens else ""


def _hours(hours: float) -> str:
    return f"{hours:.1f}" if hours >= 1 else f"{hours:.2g}" if hours else ""


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}" if size >= GIB / 20 else f"{size / GIB:.1g}" if size else "0"
