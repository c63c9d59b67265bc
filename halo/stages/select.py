"""Layer selection: variants of the teacher are measured on the same samples, and a policy chooses by the results.

Leaves selection.json: the layers that stay attention, what was measured, and what it cost.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from halo import files
from halo.data import Corpus
from halo.job import Job
from halo.journal import Journal
from halo.progress import StageProgress, say, warn
from halo.selection.cost import Cost, Runs, cost_of
from halo.selection.joint import GATES, train_gates
from halo.selection.measurer import SPLIT, ModelMeasurer, Samples, Unmeasured
from halo.selection.policies import choose, count_runs
from halo.selection.scores import Choice, equivalence_lines
from halo.selection.settings import SelectSettings, check_layers, gate_settings

MIN_CHUNKS = 2
# Settings that the results of variants depend on.
SAMPLE_SETTINGS = ("recall_samples", "recall_length", "language_samples", "language_length")


def run(job: Job) -> None:
    """Choose the layers and write the choice."""
    settings, num_layers = job.config.select, job.teacher_config.num_hidden_layers
    check_layers(settings, num_layers)
    record: dict[str, Any] = {"num_layers": num_layers, "policy": settings.policy}
    record |= _measured(job) if settings.measures else {"layers": choose(Unmeasured(num_layers), settings).layers}
    if job.compute.main:
        for warning in record.get("warnings", []):
            warn(warning)
        say(f"{'select':10} softmax attention stays in layers {record['layers']} (policy: {record['policy']})")
        for line in equivalence_lines(record.get("equivalents", [])):
            say(f"{'select':10} {line}")
        files.write_json(job.directory("select") / files.SELECTION, record)
        for checkpoints in job.directory("select").glob(f"{GATES}*/{files.CHECKPOINTS}"):
            files.remove(checkpoints)


def shortfalls(settings: SelectSettings, corpus: Corpus) -> Iterator[str]:
    """Yield a line for everything that the measurement needs and the text or the lengths do not give."""
    if not settings.measures:
        return
    least = corpus.task(SPLIT).min_length()
    if settings.recall_length < least:
        yield f"select.recall_length: must be at least {least} with this tokenizer, got {settings.recall_length}"
    if corpus.count_chunks(SPLIT, settings.language_length) < MIN_CHUNKS:
        yield (
            f"select.language_length: must leave {MIN_CHUNKS} chunks of held-out text, got {settings.language_length} "
            f"tokens of {corpus.store(SPLIT).num_tokens}; raise data.held_out"
        )
    if settings.policy == "joint":
        training = gate_settings(settings)
        corpus.samples(training.length, training.needle_ratio)  # raises what it lacks


def open_journal(job: Job) -> Journal:
    """Open the journal of the variants, whose results do not depend on the policy."""
    identity = job.identity("select")
    identity["select"] = {name: identity["select"][name] for name in SAMPLE_SETTINGS}
    return Journal(job.directory("select"), identity, job.compute)


def _measured(job: Job) -> dict[str, Any]:
    """Measure and choose, and return what selection.json has of it."""
    settings, num_layers, main = job.config.select, job.teacher_config.num_hidden_layers, job.compute.main
    cost = _cost(job, count_runs(settings, num_layers), settings)
    if main:
        say(f"{'select':10} policy {settings.policy} takes {cost.line()}")
    twins = job.measured_mixers()
    samples = Samples.draw(job.corpus, settings)
    # Training shows its own progress, and there is one line for it.
    shown = main and settings.policy != "joint"
    with StageProgress("select", cost.passes, shown) as progress, job.compute.autocast():
        measurer = ModelMeasurer(
            job.teacher,
            twins,
            samples,
            settings,
            open_journal(job),
            job.config.seed,
            progress.update,
            partial(train_gates, job, twins),
            job.config.attention_has_positions,
        )
        choice = choose(measurer, settings)
    students = sum(variant.is_student for variant in measurer.measured.values())
    runs = Runs(len(measurer.measured) - students, students, 0, cost.runs.training_tokens)
    drawn = {"language_samples": len(samples.text), "recall_samples": len(samples.episodes)}
    return _record(choice, num_layers) | drawn | {"cost": _cost(job, runs, settings.model_copy(update=drawn)).plain()}


def _cost(job: Job, runs: Runs, settings: SelectSettings) -> Cost:
    sizes = job.sizes(range(check_layers(settings, job.teacher_config.num_hidden_layers)))
    return cost_of(runs, settings, sizes.teacher, sizes.twins, sizes.student, job.compute.dtype.itemsize)


def _record(choice: Choice, num_layers: int) -> dict[str, Any]:
    """Return a choice as plain JSON, with a row for each layer."""
    columns = {"score": choice.scores, "score_error": choice.score_error, "kept_share": choice.kept_share}
    plain = {name: values.tolist() for name, values in (columns | choice.columns).items() if values is not None}
    return {
        "layers": choice.layers,
        "equivalents": choice.equivalents,
        "exchanges": choice.exchanges,
        "rounds": choice.rounds,
        "warnings": choice.warnings,
        "table": [{"layer": i} | {name: values[i] for name, values in plain.items()} for i in range(num_layers)],
    }
