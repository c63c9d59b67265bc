"""The section `data` of a configuration: which text, how it is split, and how training samples are made of it."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, PositiveInt

from halo.settings import HOW, Settings

# Training text; held-out text that layers and scales are chosen by; held-out text that only final figures use.
SPLITS = ("train", "choose", "judge")


class SourceSettings(Settings):
    """One source of text. Keys that are not given are those of the section `data`."""

    source: str = Field(min_length=1, description='"stdlib", a file, directory or glob, or a Hugging Face dataset')
    weight: float = Field(1.0, gt=0, description="share of the training chunks of text, relative to the other sources")
    subset: str | None = Field(None, description="configuration name of a Hugging Face dataset")
    split: str | None = Field(None, description="split of a Hugging Face dataset")
    field: str | None = Field(None, description="key of the text in a record")


def _as_list(value: Any) -> Any:
    if isinstance(value, str):
        return [{"source": value}]
    if isinstance(value, (list, tuple)) and value:
        return [{"source": entry} if isinstance(entry, str) else entry for entry in value]
    raise ValueError(f"must be a string or a list of {{source, weight, subset, split, field}}, got {value!r}"[:200])


def _as_written(value: tuple[SourceSettings, ...]) -> Any:
    plain = [entry.model_dump(mode="json", exclude_defaults=True) for entry in value]
    return plain[0]["source"] if len(plain) == 1 and set(plain[0]) == {"source"} else plain


Sources = Annotated[tuple[SourceSettings, ...], BeforeValidator(_as_list), PlainSerializer(_as_written)]


class DataSettings(Settings):
    """Sources of the text, and how it is split and cut into training samples."""

    source: Sources = Field(
        description='"stdlib", a file, directory or glob (.txt, .md, .rst, .jsonl, .json, each also .gz or .zst, and '
        ".parquet), a Hugging Face dataset, or a list of {source, weight, subset, split, field}"
    )
    subset: str | None = Field(None, description="configuration name of a Hugging Face dataset")
    split: str = Field("train", description="split of a Hugging Face dataset")
    field: str = Field(
        "text", description='key of the text in a record; chats in "messages" or "conversations" are found without it'
    )
    held_out: float = Field(
        0.01,
        gt=0,
        lt=1,
        description="share of the text that is not trained on: half to choose layers and the scale by, half for the "
        "final figures; each half of a small corpus is at least 32,768 tokens or a sixteenth of the text, save that of "
        "stdlib, whose documents were held out from the demo's teacher too",
    )
    needle_ratio: float = Field(0.0, ge=0, le=1, description="share of training samples that are recall episodes")
    isolate_documents: bool = Field(False, description="do not carry attention or state across documents")
    max_document: PositiveInt = Field(
        1_000_000, ge=1000, description="characters; a longer document is cut into several"
    )
    max_skipped: float = Field(
        0.05, ge=0, le=1, json_schema_extra=HOW, description="share of a source's records that may be unreadable"
    )
    workers: PositiveInt | None = Field(
        None, le=1024, json_schema_extra=HOW, description="processes that tokenise; default: the number of CPUs"
    )

    def sources(self) -> list[SourceSettings]:
        """Return the sources with every key filled in; weights sum to 1."""
        total = sum(entry.weight for entry in self.source)
        return [
            entry.model_copy(
                update={
                    "weight": entry.weight / total,
                    "subset": entry.subset if entry.subset is not None else self.subset,
                    "split": entry.split or self.split,
                    "field": entry.field or self.field,
                }
            )
            for entry in self.source
        ]
