"""A dataset of Hugging Face, streamed."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PreTrainedTokenizerBase

from halo.data.formats import CHAT_KEYS
from halo.data.records import Unusable, record_text
from halo.data.settings import SourceSettings
from halo.data.source import Record, Source
from halo.data.tally import Tally
from halo.settings import HaloError

if TYPE_CHECKING:
    import datasets

REACH_SECONDS = 20.0


class HubText(Source):
    """The rows of a dataset, in the order of the dataset; a position is a row number and the reader's state there.

    Args:
        entry: The source, with every key filled in.
        tokenizer: For its chat template.
    """

    streamed: ClassVar[bool] = True

    def __init__(self, entry: SourceSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name, self.subset, self.split = entry.source, entry.subset, entry.split or "train"
        self.field, self.tokenizer = entry.field or "text", tokenizer

    def identity(self) -> Any:
        return ["dataset", self.name, self.subset, self.split, self.field]

    def place(self, position: Any) -> Any:
        # The state of the reader of one place depends on where it began.
        return position and position["row"]

    def read(self, position: Any, tally: Tally) -> Iterator[Record]:
        rows = self._rows()
        number = 0
        if position is not None:
            # The state is loaded once, and `rows` is iterated over once: `datasets` applies it to every later pass too.
            number = position["row"]
            rows.load_state_dict(position["state"])
        passing = iter(rows)
        while (row := self._next(passing)) is not None:
            number += 1
            place = f"{self.name} row {number}"
            if number == 1 and self.field not in row and not any(key in row for key in CHAT_KEYS):
                columns = ", ".join(sorted(row))
                raise HaloError(f"data.field: must name a column of text, one of {columns}, got {self.field}")
            tally.records += 1
            try:
                text = record_text(row, self.field, self.tokenizer)
            except Unusable as problem:
                tally.skip(place, str(problem))
                continue
            yield Record(text, place, {"row": number, "state": rows.state_dict()})

    def _rows(self) -> "datasets.IterableDataset":
        import datasets

        try:
            reach_dataset(self.name)
            return datasets.load_dataset(self.name, self.subset, split=self.split, streaming=True)
        except Exception as error:
            raise HaloError(
                f"data.source: must be an existing path or a dataset that can be reached, got {self.name} "
                f"({_first_line(error)})"
            ) from None

    def _next(self, rows: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        try:
            return next(rows, None)
        except Exception as error:
            raise HaloError(
                f"data.source: {self.name} must stay reachable, got {_first_line(error)}; the same command continues"
            ) from None


def reach_dataset(name: str) -> None:
    """Ask for a dataset once; loading one that cannot be reached retries for half a minute.

    Raises:
        Exception: The client's, if there is no such dataset or no connection.
    """
    from huggingface_hub import HfApi

    HfApi().dataset_info(name, timeout=REACH_SECONDS)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
