"""Calibration, between transfer and align: closed forms set some of the twins' weights, from a little training text.

One forward pass of the teacher serves all layers. A layer is measured, its twin calibrated, and its error measured on
other sequences as soon as it has run; nothing is trained. Source: arXiv 2606.16429; `halo.calibration` has the forms.

Leaves mixers.safetensors, the twins' weights in float32, and calibration.json.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn

from halo import checkpoint, files, models
from halo.calibration import faithful, parts
from halo.calibration.layer import LayerData, observed_layers, relative_error
from halo.calibration.settings import SHORTEST, CalibrateSettings
from halo.calibration.statistics import Statistics, measure
from halo.data import Batch, Corpus
from halo.job import Job
from halo.journal import Journal
from halo.progress import StageProgress, say, warn
from halo.settings import HaloError
from halo.stages import SAMPLE_ORDERS
from hypenet.mixers import GatedDeltaNet, Mixer


@dataclass(frozen=True)
class Calibration:
    """How to calibrate the twin of one layer.

    Attributes:
        parts: What to set, in order; see `halo.calibration.choice`.
        settings: Its numbers.
        seed: Of what is random in `faithful`.
    """

    parts: tuple[str, ...]
    settings: CalibrateSettings
    seed: int

    def apply(self, layer: int, mixer: Mixer, attention: nn.Module, data: LayerData) -> dict[str, Any]:
        """Calibrate a twin in place.

        Args:
            layer: The number of the layer.
            mixer: Its twin, fresh from transfer, on the device of the data.
            attention: The teacher's layer.
            data: What it does on all sequences; the last `held_samples` are measured on.

        Returns:
            What to report, as plain JSON: how far the heads look back, their entropy, and the errors at first and
            after each part.
        """
        settings = self.settings
        fitted, held = data[: -settings.held_samples], data[-settings.held_samples :]
        statistics = measure(attention, fitted, settings.sinks, settings.block)
        fit = parts.Fit(fitted, statistics, settings.gain == "head", settings.ridge)
        errors = [relative_error(mixer, held)]
        for part in self.parts:
            if part == "faithful":
                seed = 1000 * self.seed + layer
                faithful.calibrate(cast(GatedDeltaNet, mixer), attention, fitted, seed, settings.block)
            else:
                parts.PARTS[part](mixer, fit)
            errors.append(relative_error(mixer, held))
        if not all(math.isfinite(error) for error in errors):
            raise HaloError(f"calibrate: errors must be finite, got {errors} in layer {layer} for {list(self.parts)}")
        if "rank" in self.parts:
            parts.restore_slopes(mixer)
        return {"layer": layer, "errors": errors} | _plain(statistics)


def run(job: Job) -> None:
    """Calibrate the twins and save them."""
    settings = job.config.calibrate
    chosen = job.config.calibration_parts
    directory = job.directory("calibrate")
    if not chosen:
        return
    job.compute.from_main(lambda: refuse_older_alignment(job.directory("align")))
    batch = calibration_batch(job.corpus, settings).to(job.compute.device)
    # Autocast would go on using its copies of weights that need a gradient, though they are changed here.
    twins = job.load_mixers("transfer").requires_grad_(False)
    calibration = Calibration(chosen, settings, job.config.seed)
    rows = calibrate_twins(job, twins, batch, calibration, directory / files.CHECKPOINTS)
    if job.compute.main:
        for layer, twin in enumerate(twins):
            path = _layer_file(directory / files.CHECKPOINTS, layer)
            with files.reading(path, f"delete {directory} to run its stage again"):
                twin.load_state_dict(load_file(path))
        models.save_mixers(twins.state_dict(), directory / files.MIXERS)
        record = {
            "parts": list(chosen),
            "samples": settings.samples,
            "held_samples": settings.held_samples,
            "length": batch.input_ids.shape[1],
            "layers": rows,
        }
        files.write_json(directory / files.CALIBRATION, record)
        first, last = (sum(row["errors"][place] for row in rows) / len(rows) for place in (0, -1))
        say(f"{'calibrate':10} {'+'.join(chosen)}: relative error {first:.3f} -> {last:.3f}, mean over layers")


def calibrate_twins(
    job: Job, twins: nn.ModuleList, batch: Batch, calibration: Calibration, directory: Path
) -> list[dict[str, Any]]:
    """Calibrate every twin, the layers shared out over the processes, and return what to report of each.

    Args:
        job: Provides the teacher, the arithmetic, and the journal of layers that are finished.
        twins: Fresh from transfer, on the CPU; those of this process are changed.
        batch: The sequences to fit on, then those to measure on.
        calibration: How to calibrate.
        directory: Receives the weights of every twin.
    """
    compute, journal = job.compute, job.journal("calibrate")
    keys = [f"layer {layer}" for layer in range(len(twins))]
    own = [layer for layer, key in enumerate(keys) if layer % compute.world == compute.rank]
    missing = {layer for layer in own if keys[layer] not in journal.pieces}

    def observe(layer: int, data: LayerData) -> None:
        if layer not in missing:
            return
        attention = cast(Any, job.teacher).model.layers[layer].self_attn
        mixer = cast(Mixer, twins[layer]).to(compute.device)

        def calibrate() -> dict[str, Any]:
            row = calibration.apply(layer, mixer, attention, data)
            models.save_mixers(mixer.state_dict(), _layer_file(directory, layer))
            return row

        journal.once(keys[layer], calibrate)
        mixer.cpu()
        progress.update(min(layer + compute.world, len(twins)), "layers")

    if missing:
        isolate = job.config.data.isolate_documents
        with (
            StageProgress("calibrate", len(twins), compute.main) as progress,
            torch.no_grad(),
            compute.autocast(),
            observed_layers(job.teacher, batch, isolate, observe),
        ):
            models.hidden_states(job.teacher, batch, isolate)
    return _gathered(journal, keys)


def calibration_batch(corpus: Corpus, settings: CalibrateSettings) -> Batch:
    """Return sequences of training text: those to fit on, then those to measure on.

    Raises:
        HaloError: If there is too little of it.
    """
    count = settings.samples + settings.held_samples
    length = available_length(corpus, settings)
    if length < settings.length:
        warn(f"calibrate: the training text has {count} sequences of {length} tokens, not of {settings.length}")
    return corpus.samples(length, stage=SAMPLE_ORDERS["calibrate"]).batch(0, count)


def available_length(corpus: Corpus, settings: CalibrateSettings) -> int:
    """Return how many tokens each sequence can have without text that comes twice.

    Raises:
        HaloError: If they are too few.
    """
    count = settings.samples + settings.held_samples
    length = min(settings.length, corpus.store("train").num_tokens // count)
    if length < SHORTEST:
        raise HaloError(
            f"calibrate.samples: must leave {SHORTEST} tokens of training text for each of {count} sequences with "
            f"calibrate.held_samples, got {length}; set them lower or calibrate.parts to off"
        )
    return length


def refuse_older_alignment(directory: Path) -> None:
    """Check that twins were not aligned without calibration, as all were by versions without this stage.

    Raises:
        HaloError: If the directory of align holds a result or a checkpoint of such twins.
    """
    again = f"delete {directory} to run its stage again"
    found = [(directory / files.DONE, "settings")]
    found += [(path, "identity") for path in (directory / files.CHECKPOINTS).glob(f"step-*/{checkpoint.RECORD}")]
    for path, key in found:
        if path.is_file() and "calibrate" not in files.read_json(path, again).get(key, {}):
            raise HaloError(
                f"{directory}: was made without calibration; continue with --set calibrate.parts=off, or delete it to "
                "calibrate"
            )


def shortfalls(settings: CalibrateSettings, corpus: Corpus) -> Iterator[str]:
    """Yield a line for everything that the stage needs and the text does not give."""
    if settings.parts == "off":
        return
    try:
        corpus.samples(available_length(corpus, settings), stage=SAMPLE_ORDERS["calibrate"])
    except HaloError as error:
        yield str(error)


def _plain(statistics: Statistics) -> dict[str, list[float]]:
    return {"look_back": statistics.look_back_H.tolist(), "entropy": statistics.entropy_H.tolist()}


def _layer_file(directory: Path, layer: int) -> Path:
    return directory / f"layer-{layer}.safetensors"


def _gathered(journal: Journal, keys: list[str]) -> list[dict[str, Any]]:
    """Return the rows of all layers, of every process."""

    def missing() -> Any:
        raise AssertionError("a layer of this process has not been calibrated")

    return list(journal.measure(dict.fromkeys(keys, missing)).values())
