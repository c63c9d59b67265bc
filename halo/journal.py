"""Finished pieces of a measurement, one JSON line each, so that a killed run takes up after the last of them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from halo.config import HaloError


class Journal:
    """`once(key, measure)` measures a piece the first time and reads it back from then on.

    The first line holds the settings that the pieces belong to; pieces of other settings are refused.
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
        # A line that a kill cut off is dropped, so that the next one starts on its own.
        kept = [{"settings": settings}, *({"key": key, "value": value} for key, value in self.pieces.items())]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def once(self, key: str, measure: Callable[[], Any]) -> Any:
        """What `measure()` returns, which must be plain JSON."""
        if key not in self.pieces:
            self.pieces[key] = measure()
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "value": self.pieces[key]}) + "\n")
        return self.pieces[key]


def _whole_lines(path: Path) -> Iterator[Any]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
