"""One conversion: the order of the stages, their inputs and results, and which of them are finished.

Each stage owns the directory <out>/<stage>. It is finished once done.json exists there, which is written last and holds
the settings of this stage and the ones before it, so that results of other settings are never used by mistake.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from halo import models, plan, teachers
from halo.config import STAGE_HELP, Config, HaloError
from halo.data import Corpus
from halo.journal import Journal
from halo.progress import StageProgress, say, warn
from halo.stages.align import Align
from halo.stages.distill import Distill
from halo.stages.evaluate import Labelled, evaluate
from halo.stages.finetune import Finetune
from halo.stages.scale import choose_scale
from halo.stages.select import measure_swaps
from halo.trainer import CHECKPOINT, METRICS, Stage, train, write_atomically
from hypenet import HypeNetForCausalLM

STAGES = tuple(STAGE_HELP)
DONE = "done.json"
SELECTION = "selection.json"
SCALE = "scale.json"
RESULTS = "results.json"


class Conversion:
    """Runs the stages of a configuration. Teacher, tokenizer and data are loaded once, when first needed.

    Args:
        config: The configuration.
        like: A conversion with the same teacher, data and seed; its loaded objects are reused.
    """

    def __init__(self, config: Config, like: "Conversion | None" = None) -> None:
        self.config = config
        self.out = config.out
        self.device = _device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        if like is not None:
            self.teacher, self.corpus = like.teacher, like.corpus
        self.stages: dict[str, Callable[[], None]] = {
            "transfer": self._transfer,
            "align": self._align,
            "select": self._select,
            "distill": self._distill,
            "finetune": self._finetune,
            "scale": self._scale,
            "eval": self._evaluate,
        }

    def run(self) -> None:
        """Run all stages that are not finished."""
        for stage in STAGES:
            self.run_stage(stage)

    def run_stage(self, stage: str) -> None:
        """Run one stage, unless it is finished.

        Raises:
            HaloError: If the stage before it is not finished, or if a result was made with other settings.
        """
        if stage in ("transfer", "align") and self.config.aligned is not None:
            say(f"{stage:10} taken from {self._aligned}")
            return
        directory = self.directory(stage)
        settings = self._settings(stage)
        if (directory / DONE).is_file():
            self._check_settings(directory, settings)
            say(f"{stage:10} done already in {directory}")
            return
        before = STAGES.index(stage) - 1
        if before >= 0:
            self._require(STAGES[before])
        _ = self.corpus  # Report missing data now, not hours later.
        directory.mkdir(parents=True, exist_ok=True)
        plain = self.config.model_dump(mode="json")
        self.out.joinpath("config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
        began = time.monotonic()
        self.stages[stage]()
        record = {"stage": stage, "seconds": round(time.monotonic() - began, 1), "settings": settings}
        write_atomically(directory / DONE, lambda path: path.write_text(json.dumps(record, indent=1)))
        (directory / CHECKPOINT).unlink(missing_ok=True)
        say(f"{stage:10} done in {record['seconds']:.0f} s -> {directory}")

    def directory(self, stage: str) -> Path:
        """Return the directory of a stage's result."""
        if stage == "align" and self._aligned is not None:
            return self._aligned
        return self.out / stage

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The teacher, in fp32."""
        return teachers.load_teacher(self.config.teacher, self.device)

    @cached_property
    def corpus(self) -> Corpus:
        """The training and held-out data."""
        tokenizer = teachers.load_tokenizer(self.config.teacher)
        return Corpus(self.config.data, tokenizer, self.config.seed, self.out / "data")

    @property
    def _aligned(self) -> Path | None:
        """The align directory of another conversion if `config.aligned` names it or its parent, else None."""
        path = self.config.aligned
        if path is None:
            return None
        return path / "align" if (path / "align" / DONE).is_file() else path

    @property
    def layers(self) -> list[int]:
        """The softmax layers that the select stage chose."""
        return json.loads((self.directory("select") / SELECTION).read_text())["layers"]

    def converted(self) -> HypeNetForCausalLM:
        """Load the final model."""
        return models.load_hypenet(self.out / "model", self.device)

    def _transfer(self) -> None:
        torch.manual_seed(self.config.seed)
        models.make_twins(self.teacher, self.config.mixer).save_pretrained(self.directory("transfer"))

    def _align(self) -> None:
        twins = models.load_hypenet(self.directory("transfer"), self.device)
        stage = Align(self.teacher, twins, self.config.align, self.config.data.isolate_documents)
        self._train(stage)
        twins.save_pretrained(self.directory("align"))

    def _select(self) -> None:
        settings, seed = self.config.select, self.config.seed
        num_layers = self.teacher.config.num_hidden_layers
        keep = settings.keep or max(1, num_layers // 4)
        record: dict[str, Any] = {"num_layers": num_layers, "score": settings.score}
        if settings.layers is not None:
            if not settings.layers or max(settings.layers) >= num_layers:
                raise HaloError(f"select.layers: must be layers below {num_layers}, got {settings.layers}")
            record |= {"score": "given", "layers": sorted(set(settings.layers))}
        elif keep > num_layers:
            raise HaloError(f"select.keep: must be at most the teacher's {num_layers} layers, got {keep}")
        elif settings.score == "even":
            record["layers"] = plan.even_layers(num_layers, keep)
        else:
            twins = models.load_hypenet(self.directory("align"), self.device)
            with StageProgress("select", num_layers) as progress:
                journal = self._journal("select")
                measured = measure_swaps(
                    self.teacher, twins, self.corpus, settings, journal, lambda n: progress.update(n, "layers swapped")
                )
            rule = plan.ScoreRule(settings.score, settings.language_weight, settings.eps)
            chosen = plan.choose(measured, keep, rule, settings.bootstrap, settings.stable_share, seed)
            record |= _selection_record(measured, chosen)
            for warning in chosen.warnings:
                warn(warning)
        say(f"{'select':10} softmax attention stays in layers {record['layers']} (score: {record['score']})")
        _write_json(self.directory("select") / SELECTION, record)

    def _distill(self) -> None:
        settings = self.config.distill
        twins = models.load_hypenet(self.directory("align"), self.device)
        torch.manual_seed(self.config.seed)
        student = models.make_student(self.teacher, twins, self.layers, self.config.mixer, settings.gate_init)
        del twins
        self._train(Distill(self.teacher, student, settings, self.config.data.isolate_documents))
        student.save_pretrained(self.directory("distill"))

    def _finetune(self) -> None:
        # Free the teacher's memory for the long sequences.
        self.__dict__.pop("teacher", None)
        student = models.load_hypenet(self.directory("distill"), self.device)
        self._train(Finetune(student, self.config.finetune, self.config.data.isolate_documents))
        student.save_pretrained(self.directory("finetune"))

    def _scale(self) -> None:
        student = models.load_hypenet(self.directory("finetune"), self.device)
        grid = self.config.scale.grid
        with StageProgress("scale", len(grid)) as progress:
            rows = choose_scale(
                student,
                self.corpus,
                self.config.scale,
                self._journal("scale"),
                lambda n: progress.update(n, "bases tried"),
            )
        best, second = rows[0], rows[1] if len(rows) > 1 else None
        if second and second["advantage_error"] is not None and second["advantage"] < 2 * second["advantage_error"]:
            warn(
                f"the choice of the scale's base is not certain: a = {best['a']} is better than a = {second['a']} by "
                f"{second['advantage']:.4f} +- {second['advantage_error']:.4f} nats; measure more documents"
            )
        say(f"{'scale':10} a = {best['a']}, loss {best['loss']:.4f}")
        _write_json(self.directory("scale") / SCALE, {"a": best["a"], "length": self.config.scale.length, "grid": rows})
        student.save_pretrained(self.out / "model")
        self.corpus.tokenizer.save_pretrained(self.out / "model")

    def _evaluate(self) -> None:
        settings = self.config.eval
        student = self.converted()
        chosen = student.config.attn_logits_scaling
        labelled: list[Labelled] = [
            ("teacher", self.teacher, None),
            ("converted", student, chosen),
        ]
        if chosen is not None:
            labelled.append(("converted, no scale", student, None))
        rows = evaluate(labelled, self.corpus, settings, self._journal("eval"))
        _write_json(self.directory("eval") / RESULTS, {"training_length": settings.length, "rows": rows})

    def _train(self, stage: Stage) -> None:
        settings = stage.settings
        offset = STAGES.index(stage.name)
        batches = self.corpus.batches(settings.length, settings.batch, settings.needle_ratio, offset)
        train(stage, batches, self.directory(stage.name), self.device, self.config.precision, self.config.seed)

    def _journal(self, stage: str) -> Journal:
        return Journal(self.directory(stage) / METRICS, self._settings(stage))

    def _settings(self, stage: str) -> dict[str, Any]:
        """Return all settings that a stage's result depends on: its own and those of the stages before it."""
        config = self.config
        shared = {"teacher": config.teacher, "mixer": config.mixer, "seed": config.seed, "precision": config.precision}
        settings: dict[str, Any] = {**shared, "data": config.data.model_dump(mode="json")}
        if config.aligned is not None:
            settings["aligned"] = str(config.aligned)
        for name in STAGES[: STAGES.index(stage) + 1]:
            section = getattr(config, name, None)
            if section is not None and not (name == "align" and config.aligned is not None):
                settings[name] = section.model_dump(mode="json")
        return settings

    def _check_settings(self, directory: Path, settings: dict[str, Any]) -> None:
        made_with = json.loads((directory / DONE).read_text())["settings"]
        difference = _first_difference(made_with, settings)
        if difference:
            raise HaloError(
                f"{directory}: was made with other settings ({difference}); give another --out or delete it"
            )

    def _require(self, stage: str) -> None:
        directory = self.directory(stage)
        if not (directory / DONE).is_file():
            if stage == "align" and self.config.aligned is not None:
                raise HaloError(f"aligned: must be the directory of a finished conversion, got {self.config.aligned}")
            raise HaloError(f"{directory}: must hold the result of {stage}; run `halo {stage}` first")
        settings = self._settings(stage)
        if stage == "align" and self.config.aligned is not None:
            made_with = json.loads((directory / DONE).read_text())["settings"]
            settings = made_with | {name: settings[name] for name in ("teacher", "mixer")}
        self._check_settings(directory, settings)


def _selection_record(measured: plan.Measurements, chosen: plan.Plan) -> dict[str, Any]:
    drops = plan.measure_drops(measured)
    columns = {key: value.tolist() for key, value in asdict(drops).items()}
    columns |= {"score_value": chosen.scores.tolist(), "score_error": chosen.score_error.tolist()}
    columns |= {"kept_share": chosen.kept_share.tolist()}
    layers = range(len(chosen.scores))
    rows = [{"layer": layer} | {key: column[layer] for key, column in columns.items()} for layer in layers]
    return {
        "layers": chosen.layers,
        "teacher_recall": float(measured.recall.mean()),
        "teacher_loss": float(measured.loss.mean()),
        "episodes": len(measured.recall),
        "chunks": len(measured.loss),
        "warnings": chosen.warnings,
        "table": rows,
    }


def _first_difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str | None:
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found = _first_difference(before, after, f"{prefix}{key}.")
            if found:
                return found
        elif before != after:
            return f"{prefix}{key}: {before} there, {after} now"
    return None


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda partial: partial.write_text(json.dumps(record, indent=1)))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise HaloError(f"device: must be one that this machine has, got {name}")
    return torch.device(name)
