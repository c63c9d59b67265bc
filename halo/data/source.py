"""The interface of a source of text."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from halo.data.tally import Tally


@dataclass(frozen=True)
class Record:
    """The text of one record.

    Attributes:
        text: The text, of any length.
        place: Where it was found, for messages.
        next: The position after it, as plain JSON, from which a source can be read on.
        begun, fraction: Share of the source that is read before and after it, 0 to 1, or 0 if it is not known.
        key: A number that decides on which side of the split it is, 64 bits; None for a hash of the text.
    """

    text: str
    place: str
    next: Any
    begun: float = 0.0
    fraction: float = 0.0
    key: int | None = None


class Source(ABC):
    """Text that is read in order, from any position."""

    name: str
    # Whether it is read only until there are enough tokens.
    streamed: ClassVar[bool] = False
    # Whether its keys alone decide what is held out, so that no text is added to make the least.
    fixed_split: ClassVar[bool] = False

    @abstractmethod
    def identity(self) -> Any:
        """Return what tells this text from another without reading all of it, as plain JSON."""

    def place(self, position: Any) -> Any:
        """Return what two positions have in common if and only if the same records follow."""
        return position

    @abstractmethod
    def read(self, position: Any, tally: Tally) -> Iterator[Record]:
        """Yield the records after a position; None is the beginning. What cannot be read is counted in `tally`.

        Raises:
            HaloError: If the source cannot be read.
        """
