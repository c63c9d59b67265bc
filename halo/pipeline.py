"""The order of the stages, and which of them are finished.

A stage is finished once done.json exists in its directory. It is written last and holds the identity of the result:
everything that decides what it is (inputs and settings, of this stage and the ones before), so that results of other
settings are never used by mistake. What only says how a result is computed may change at any time.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from halo import files, preflight
from halo.checkpoint import first_difference
from halo.compute import Compute
from halo.config import Config
from halo.job import Job
from halo.plan import expectation
from halo.progress import say
from halo.settings import HaloError
from halo.stages import ALIGNED_STAGES, STAGES, stage_module


class Pipeline:
    """Runs the stages of a configuration.

    Args:
        config: The configuration.
        compute: Device and processes; started from the configuration if not given.
        like: A pipeline with the same teacher, data and seed; its loaded objects are reused.
    """

    def __init__(self, config: Config, compute: Compute | None = None, like: "Pipeline | None" = None) -> None:
        self.job: Job = Job(config, compute, like.job if like else None)
        self.config, self.compute, self.out = config, self.job.compute, config.out
        self.locked = self.checked = False

    def run(self) -> None:
        """Run all stages that are not finished.

        Raises:
            HaloError: As for `run_stage`, and before the first stage if a later one would miss anything.
        """
        with self._locked():
            ahead = [stage for stage in STAGES if not (self.job.directory(stage) / files.DONE).is_file()]
            if ahead:
                self._check_ahead()
                if self.compute.main:
                    say(expectation(self.config, self.compute, self.job.teacher_config, ahead))
            for stage in STAGES:
                self.run_stage(stage)

    def run_stage(self, stage: str) -> None:
        """Run one stage, unless it is finished.

        Raises:
            HaloError: If the stage before it is not finished, if a result was made with other settings, if this or a
                later stage would miss anything, or if another process works in the same output directory.
        """
        if stage in ALIGNED_STAGES and self.config.aligned is not None:
            self._say(f"{stage:10} taken from {self.job.directory(stage)}")
            return
        with self._locked():
            self._run_stage(stage)

    def _run_stage(self, stage: str) -> None:
        job = self.job
        directory = job.directory(stage)
        identity = job.identity(stage)  # Loads the data in every process, and reports missing data now.
        if self.compute.from_main(lambda: self._is_done(stage)):
            self._say(f"{stage:10} done already in {directory}")
            return
        needed = [
            name for name in STAGES[: STAGES.index(stage)] if name != "calibrate" or self.config.calibration_parts
        ]
        if needed:
            self.compute.from_main(lambda: self._require(needed[-1]))
        self._check_ahead()
        self.compute.from_main(lambda: self._prepare(directory))
        began = time.monotonic()
        stage_module(stage).run(job)
        self.compute.barrier()
        seconds = round(time.monotonic() - began, 1)
        record = {"stage": stage, "seconds": seconds, "settings": identity}
        self.compute.from_main(lambda: files.write_json(directory / files.DONE, record))
        self.compute.from_main(lambda: files.remove(directory / files.CHECKPOINTS))
        self._say(f"{stage:10} done in {seconds:.0f} s -> {directory}")

    def _check_ahead(self) -> None:
        """Check, once, that no stage will miss anything."""
        if not self.checked:
            preflight.check(self.job)
            self.checked = True

    def _is_done(self, stage: str) -> bool:
        directory = self.job.directory(stage)
        if not (directory / files.DONE).exists():
            return False
        self._check_identity(stage)
        # Left by a process that was killed between the two.
        files.remove(directory / files.CHECKPOINTS)
        return True

    def _require(self, stage: str) -> None:
        directory = self.job.directory(stage)
        if not (directory / files.DONE).is_file():
            if stage == "align" and self.config.aligned is not None:
                raise HaloError(f"aligned: must be the directory of a finished conversion, got {self.config.aligned}")
            raise HaloError(f"{directory}: must hold the result of {stage}; run `halo {stage}` first")
        self._check_identity(stage)

    def _check_identity(self, stage: str) -> None:
        directory = self.job.directory(stage)
        remedy = f"delete {directory} to run its stage again"
        made_with = files.read_json(directory / files.DONE, remedy).get("settings")
        if not isinstance(made_with, dict):
            raise HaloError(f"{directory / files.DONE}: must hold the settings of its stage, got none; {remedy}")
        settings = self.job.identity(stage)
        if stage == "align" and self.config.aligned is not None:
            same = {name: settings[name] for name in ("teacher", "teacher_fingerprint", "mixer")}
            settings = made_with | same | {"architecture": _of_the_twins(settings)}
            made_with = made_with | {"architecture": _of_the_twins(made_with)}
        difference = first_difference(made_with, settings)
        if difference:
            raise HaloError(
                f"{directory}: was made with other settings ({difference}); give another --out or delete it"
            )

    def _prepare(self, directory: Path) -> None:
        for place in (self.out, directory):
            files.remove_leftovers(place)
        plain = self.config.model_dump(mode="json")
        files.write_file(self.out / files.CONFIG, lambda path: path.write_text(yaml.safe_dump(plain, sort_keys=False)))

    def _say(self, text: str) -> None:
        if self.compute.main:
            say(text)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other runs out of the output directory; inside of itself it does nothing."""
        if self.locked:
            yield
            return
        held: list[int | None] = []
        self.compute.from_main(lambda: held.append(_take_lock(self.out)))
        self.locked = True
        try:
            yield
        finally:
            self.locked = False
            for lock in held:
                if lock is not None:
                    os.close(lock)


def _of_the_twins(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the student's configuration that recurrent layers depend on."""
    return {name: value for name, value in settings.get("architecture", {}).items() if not name.startswith("attn_")}


def _take_lock(out: Path) -> int | None:
    """Return the file that is locked, None in a directory that cannot be written, which `preflight` reports."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / files.LOCK, os.O_RDWR | os.O_CREAT)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(lock, 100).decode(errors="replace").strip()
        os.close(lock)
        raise HaloError(f"{out}: must not be in use by another run, got process {owner}") from None
    os.ftruncate(lock, 0)
    os.write(lock, json.dumps(os.getpid()).encode())
    return lock
