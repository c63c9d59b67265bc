"""What could not be read: counted by reason, with the first places by name."""

from collections import Counter
from typing import Any

MAX_EXAMPLES = 20


class Tally:
    """Counts records, and those that were skipped.

    Attributes:
        records: Records that were looked at.
        replaced: Documents that were kept although some of their bytes were no text.
        reasons: How many records were skipped for each reason.
        examples: The first skipped records, as "place: reason".
    """

    def __init__(self, plain: dict[str, Any] | None = None) -> None:
        plain = plain or {}
        self.records: int = plain.get("records", 0)
        self.replaced: int = plain.get("replaced", 0)
        self.reasons: Counter[str] = Counter(plain.get("reasons", {}))
        self.examples: list[str] = list(plain.get("examples", []))

    @property
    def skipped(self) -> int:
        """The number of skipped records."""
        return self.reasons.total()

    def skip(self, place: str, reason: str) -> None:
        """Count a record that cannot be used."""
        self.reasons[reason] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(f"{place}: {reason}")

    def add(self, other: "Tally") -> None:
        """Add the counts of `other`."""
        self.records += other.records
        self.replaced += other.replaced
        self.reasons += other.reasons
        self.examples = (self.examples + other.examples)[:MAX_EXAMPLES]

    def take(self) -> dict[str, Any]:
        """Return all counts and set them to zero."""
        plain = self.plain()
        self.__init__()  # type: ignore[misc]
        return plain

    def plain(self) -> dict[str, Any]:
        """Return all counts as plain JSON."""
        return {
            "records": self.records,
            "skipped": self.skipped,
            "replaced": self.replaced,
            "reasons": dict(sorted(self.reasons.items())),
            "examples": self.examples,
        }
