"""Finished parts of a measurement, one JSON line each, so that an interrupted run continues after the last of them.

Several processes share the parts of a measurement: each keeps a journal of its own and reads those of the others.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from halo import files
from halo.compute import Compute
from halo.progress import warn


class Journal:
    """Measured values by key: `once(key, measure)` measures at the first call and reads the value afterwards.

    Args:
        directory: Of the stage; the journals metrics*.jsonl are in it, whose first lines hold the settings.
        settings: What the values depend on, as plain JSON. A journal of other settings is started anew.
        compute: The processes that share the work; None for one.
        writer: The number of this journal in the directory, by default the rank.
    """

    def __init__(
        self, directory: Path, settings: dict[str, Any], compute: Compute | None = None, writer: int | None = None
    ) -> None:
        self.compute = compute
        rank = (compute.rank if compute else 0) if writer is None else writer
        path = directory / files.METRICS
        self.path = path if rank == 0 else path.with_name(f"{path.stem}-{rank}{path.suffix}")
        head = {"settings": settings}
        self.pieces: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for other in sorted(directory.glob(f"{path.stem}*{path.suffix}")):
            lines = files.read_lines(other)
            if lines and lines[0] != head:
                if other == self.path:
                    warn(f"{other}: is of other settings; the measurement starts again")
                continue
            pieces = {line["key"]: line["value"] for line in lines[1:] if {"key", "value"} <= line.keys()}
            self.pieces |= pieces
            if other == self.path:
                own = pieces
        # Rewritten, so that a line that was cut off is gone and the next one starts on a line of its own.
        kept = [head, *({"key": key, "value": value} for key, value in own.items())]
        files.write_file(self.path, lambda partial: partial.write_text("".join(json.dumps(x) + "\n" for x in kept)))

    def once(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return the value stored under `key`, or call `measure` and store its result, which must be plain JSON."""
        if key not in self.pieces:
            self.pieces[key] = measure()
            with files.writing(self.path), self.path.open("a") as file:
                file.write(json.dumps({"key": key, "value": self.pieces[key]}) + "\n")
        return self.pieces[key]

    def measure(
        self, parts: Mapping[str, Callable[[], Any]], on_progress: Callable[[int, str], None] = lambda done, key: None
    ) -> dict[str, Any]:
        """Measure every part once, shared out over the processes, and return all values by key.

        Args:
            parts: A function for each key, whose result must be plain JSON.
            on_progress: Called with the number of parts that are done and the key of the last one.
        """
        world, rank = (self.compute.world, self.compute.rank) if self.compute else (1, 0)
        for number, (key, part) in enumerate(parts.items()):
            if number % world == rank:
                self.once(key, part)
                on_progress(min(number + world, len(parts)), key)
        found = self.compute.gather(self.pieces) if self.compute else [self.pieces]
        for pieces in found:
            self.pieces |= pieces
        return {key: self.pieces[key] for key in parts}
