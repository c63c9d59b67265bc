"""Export: the finished model of a run as a folder that needs nothing of the run, for transformers and the Hub."""

import json
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from halo import files
from halo.card import model_card
from halo.saved import load_saved
from halo.settings import HaloError
from hypenet import HypeNetForCausalLM
from hypenet.published import published_layout

Dtype = Literal["bf16", "fp16", "fp32"]
Layout = Literal["hypenet", "published"]
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = get_args(Layout)
EXPORT = "export"
CARD = "README.md"
LOADING = ("is_local", "local_files_only", "name_or_path")


def export(
    run: Path,
    to: Path | None = None,
    *,
    dtype: Dtype = "bf16",
    layout: Layout = "hypenet",
    max_position_embeddings: int | None = None,
    license_name: str = "unknown",
    repository: str | None = None,
) -> Path:
    """Write the finished model of a run as a folder of transformers, with its tokenizer and a model card.

    Args:
        run: Directory of a conversion.
        to: The folder to write, which must be new or empty; default <run>/export.
        dtype: Data type of the weights; decays stay float32.
        layout: "hypenet", or "published" for the fields and names of the published checkpoints.
        max_position_embeddings: Context length that the configuration promises to other programs; default: the longest
            that `halo eval` measured.
        license_name: Identifier of a license, as the Hub has them.
        repository: Name that the folder will have on the Hub, for the card's examples.

    Returns:
        The folder.

    Raises:
        HaloError: If the run is not finished, or the model does not fit the layout.

    Example:
        >>> export(Path("runs/2b"), layout="published", license_name="apache-2.0")  # doctest: +SKIP
        PosixPath('runs/2b/export')
    """
    for name, value, choices in (("dtype", dtype, tuple(DTYPES)), ("layout", layout, LAYOUTS)):
        if value not in choices:
            raise HaloError(f"{name}: must be one of {', '.join(choices)}, got {value}")
    for file, remedy in ((files.CONFIG, "is it the directory of a conversion?"), (files.MODEL, "run `halo scale`")):
        if not (run / file).exists():
            raise HaloError(f"{run / file}: must exist; {remedy}")
    target = run / EXPORT if to is None else to
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise HaloError(f"{target}: must be a new or empty directory; delete it or give another --to")
    length = measured_length(run) if max_position_embeddings is None else max_position_embeddings
    if length < 1:
        raise HaloError(f"max_position_embeddings: must be at least 1, got {length}")
    loaded, tokenizer = load_saved(run / files.MODEL, DTYPES[dtype], "delete it and run `halo scale` again")
    model = cast(HypeNetForCausalLM, loaded)
    model.config.max_position_embeddings = tokenizer.model_max_length = length
    fields, state = None, None
    if layout == "published":
        try:
            fields, state = published_layout(model)
        except ValueError as error:
            raise HaloError(str(error)) from None
    card = model_card(run, model, license_name, repository or target.resolve().name)

    def write(folder: Path) -> None:
        model.save_pretrained(folder, state_dict=state)
        if fields is not None:
            _write_json(folder / "config.json", fields)
        tokenizer.save_pretrained(folder)
        _forget_where_it_came_from(folder / "tokenizer_config.json")
        (folder / CARD).write_text(card, "utf-8")

    files.write_directory(target, write)
    return target


def measured_length(run: Path) -> int:
    """Return the greatest length, in tokens, at which the converted model's recall or bits per byte were measured.

    Raises:
        HaloError: If there is no such measurement.
    """
    remedy = "run `halo eval`, or give --max-position-embeddings (published: 1048576)"
    path = run / "eval" / files.RESULTS
    record = files.read_json(path, remedy)
    with files.reading(path, remedy):
        lengths = [
            int(row["length"])
            for row in record["rows"]
            if row["model"].startswith("converted")
            and (row.get("recall") is not None or row.get("bits_per_byte") is not None)
        ]
    if not lengths:
        raise HaloError(f"{path}: must have a measurement of the converted model; {remedy}")
    return max(lengths)


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload a folder as a model of the Hugging Face Hub, which is created if it does not exist.

    Args:
        folder: What `export` wrote.
        repository: "name" or "owner/name".

    Returns:
        The address of the upload.

    Raises:
        HaloError: If it does not succeed; the folder stays.
    """
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        name = hub.create_repo(repository, exist_ok=True).repo_id
        return str(hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload the model"))
    except Exception as error:  # of the network, of the Hub, of a token that is missing
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise HaloError(
            f"--push-to-hub: {repository} must be writable, got {reason}; the model is in {folder}"
        ) from None


def _forget_where_it_came_from(path: Path) -> None:
    """Remove from a tokenizer's configuration what only says how it was loaded here."""
    record: dict[str, Any] = json.loads(path.read_text("utf-8"))
    _write_json(path, {name: value for name, value in record.items() if name not in LOADING})


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
