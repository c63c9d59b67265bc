"""Everything that any stage will need, checked before the first one: no hours are spent on a run that must fail.

Every shortfall is listed at once. A stage that needs something of the data has a function `shortfalls` beside its
settings; what needs the machine is here.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch

from halo import files, footprint
from halo.estimate import stored_bytes
from halo.footprint import Sizes
from halo.hardware import main_memory, this_machine
from halo.job import Job
from halo.selection.settings import check_layers, gate_settings
from halo.settings import HaloError, Settings, TrainingSettings
from halo.stages import SAMPLE_ORDERS, STAGES, TRAINED_STAGES, stage_module
from hypenet import HypeNetForCausalLM, config_from_teacher

MODELS_ON_DISK = 3  # of distill, finetune and scale
PROBE_TOKENS = 96


def check(job: Job) -> None:
    """Check that the stages of a conversion will find what they need.

    Raises:
        HaloError: If anything is missing; the message has a line for each shortfall.
    """
    found = list(dict.fromkeys(_shortfalls(job)))
    if len(found) == 1:
        raise HaloError(found[0])
    if found:
        raise HaloError("\n  ".join([f"{job.out}: {len(found)} things are missing for the whole conversion", *found]))


def _shortfalls(job: Job) -> Iterator[str]:
    config = job.config
    yield from _attempt(lambda: _check_writable(job))
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        yield "tensorboard: must be false where the package is missing (pip install tensorboard), got true"
    yield from _attempt(lambda: job.teacher_config)
    yield from _attempt(lambda: check_layers(config.select, job.teacher_config.num_hidden_layers))
    yield from _batches(job)
    yield from _attempt(lambda: job.tokenizer)
    if "tokenizer" in job.__dict__:
        yield from _data(job)
    if "teacher_config" in job.__dict__:
        sizes: list[Sizes] = []
        yield from _attempt(lambda: sizes.append(job.sizes(_kept_layers(job))))
        if sizes:
            yield from _attempt(lambda: _check_layer(job))
            yield from _memory_and_disk(job, sizes[0])


def _attempt(check: Callable[[], Any]) -> Iterator[str]:
    """Yield the message of the HaloError that a check raises, if any."""
    try:
        check()
    except HaloError as error:
        yield str(error)


def _check_writable(job: Job) -> None:
    with files.writing(job.out):
        job.out.mkdir(parents=True, exist_ok=True)
        probe = job.out / f".writable-{os.getpid()}{files.PARTIAL}"  # other processes of the run try the same
        probe.write_text("")
        probe.unlink()


def _batches(job: Job) -> Iterator[str]:
    world = job.compute.world
    trained: dict[str, TrainingSettings] = {f"{name}.": getattr(job.config, name) for name in TRAINED_STAGES}
    if job.config.select.policy == "joint":
        trained["select.joint_"] = gate_settings(job.config.select)
    for name, settings in trained.items():
        if settings.batch % world:
            yield f"{name}batch: must be a multiple of the {world} processes, got {settings.batch}"
        elif settings.micro_batch and settings.micro_batch > 1 and (settings.batch // world) % settings.micro_batch:
            share = settings.batch // world
            yield f"{name}micro_batch: must divide each process's {share} sequences, got {settings.micro_batch}"


def _data(job: Job) -> Iterator[str]:
    try:
        corpus = job.corpus
    except HaloError as error:
        yield str(error)
        return
    for name in STAGES:
        section = getattr(job.config, name, None)
        if isinstance(section, TrainingSettings) and section.steps:
            try:
                corpus.samples(section.length, section.needle_ratio, SAMPLE_ORDERS[name])
            except HaloError as error:
                yield f"{name}: {error}"
            if section.held_out_every and corpus.count_chunks("choose", section.length) < max(2, job.compute.world):
                yield (
                    f"{name}.held_out_every: must be null where held-out text has fewer than two samples of "
                    f"{section.length} tokens, got {section.held_out_every}"
                )
        needs: Callable[[Settings, Any], Iterator[str]] | None = getattr(stage_module(name), "shortfalls", None)
        if needs is not None and section is not None:
            try:
                yield from needs(section, corpus)
            except HaloError as error:
                yield f"{name}: {error}"


def _check_layer(job: Job) -> None:
    """Run a step of one softmax and one recurrent layer of the student's width on the device, forward and backward."""
    options: dict[str, Any] = job.config.architecture
    config = config_from_teacher(job.teacher_config, keep_layers=[0], mixer=job.config.mixer, **options)
    plain = config.to_dict() | {"num_hidden_layers": 2, "mixer_types": ["attn", job.config.mixer], "vocab_size": 256}
    plain |= {"intermediate_size": 128, "tie_word_embeddings": True, "layer_types": None}
    plain |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    ids = torch.arange(PROBE_TOKENS)[None].to(job.compute.device) % 256
    try:
        model = HypeNetForCausalLM(type(config)(**plain)).to(job.compute.device)  # type: ignore[arg-type]
        with job.compute.autocast():
            logits = model(input_ids=ids).logits
        logits.float().square().mean().backward()
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise HaloError(
            f"device: a step of the student's layers must run on {job.compute.device} in {job.compute.precision}, "
            f"got {type(error).__name__}: {reason}"
        ) from None


def _kept_layers(job: Job) -> range:
    """Return as many layers as stay attention; none if the settings are wrong, which is listed already."""
    try:
        return range(check_layers(job.config.select, job.teacher_config.num_hidden_layers))
    except HaloError:
        return range(0)


def _memory_and_disk(job: Job, sizes: Sizes) -> Iterator[str]:
    count = sizes.twins.parameters
    disk = footprint.CHECKPOINTS_ON_DISK * footprint.checkpoint_bytes(count)
    disk += MODELS_ON_DISK * footprint.model_bytes(count)
    finished = all((job.directory(name) / files.DONE).is_file() for name in TRAINED_STAGES)
    free = shutil.disk_usage(job.out).free if job.out.is_dir() else None  # that it cannot be made is listed already
    if not finished and free is not None and free < disk:
        yield f"out: must have {_gib(disk)} of free space for checkpoints and models, got {_gib(free)}"
    machine = this_machine(job.compute)
    # Weights, gradients and moments of the student, and a teacher of its size.
    state = 2 * footprint.WIDE + footprint.ADAM
    needed = count * (state / job.compute.world + job.compute.dtype.itemsize)
    if needed > machine.memory:
        yield (
            f"device: must hold {_gib(needed)} of weights, gradients and optimizer state for {job.compute.world} "
            f"processes, got {_gib(machine.memory)}; use more devices"
        )
    # Every process of a node builds the models on the CPU, whatever the device.
    kept, stored = len(_kept_layers(job)), stored_bytes(job.teacher_config)
    host, total = footprint.host_bytes(sizes, stored, kept, machine), main_memory()
    if host > total:
        yield (
            f"memory: must hold {_gib(host)} of models while the {machine.shards} processes of a node build them on "
            f"the CPU, got {_gib(total)}; start fewer processes on a node"
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
