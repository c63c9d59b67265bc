"""Finished parts of a measurement, one JSON line each, so that an interrupted run continues after the last of them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from halo.config import HaloError


class Journal:
    """A file of measured values by key: `once(key, measure)` measures at the first call and reads the value afterwards.

    Args:
        path: The file; its first line holds the settings.
        settings: What the values depend on, as plain JSON.

    Raises:
        HaloError: If the file exists and was written with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.pieces: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = list(_whole_lines(path)) if path.is_file() else []
        if lines and lines[0] != {"settings": settings}:
            raise HaloError(f"{path}: must come from the same settings; give another --out or delete it")
        for line in lines[1:]:
            self.pieces[line["key"]] = line["value"]
        # Drop a line that was cut off, so that the next one starts on a line of its own.
        kept = [{"settings": settings}, *({"key": key, "value": value} for key, value in self.pieces.items())]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def once(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return the value stored under `key`, or call `measure` and store its result, which must be plain JSON."""
        if key not in self.pieces:
            self.pieces[key] = measure()
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "value": self.pieces[key]}) + "\n")
        return self.pieces[key]


def _whole_lines(path: Path) -> Iterator[Any]:
    """Yield the parsed lines up to the first that is not complete JSON."""
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
