"""`python -m bench`: measure ops and models, plot, compare two records, write RESULTS.md."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ModuleNotFoundError as error:
    raise SystemExit(f"bench: needs {error.name}; install with: pip install 'hypenet[bench]'") from None
import torch

from bench import records

app = typer.Typer(
    help="Measure the kernels and the model, against roofs and peers of the same run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(width=None if sys.stdout.isatty() else 160)

DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")]
QuickOption = Annotated[bool, typer.Option("--quick", help="A selection, in under a minute.")]
OutOption = Annotated[Path | None, typer.Option(help="JSON file of the results; default under bench/results.")]


@app.command()
def ops(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME ...]", help="Ops; default all.")] = None,
    device: DeviceOption = "auto",
    quick: QuickOption = False,
    dtype: Annotated[str | None, typer.Option(help="Only cases of this type: float32, bfloat16.")] = None,
    out: OutOption = None,
    csv: Annotated[Path | None, typer.Option(help="CSV file to write besides.")] = None,
) -> None:
    """Time every op at model shapes, with its share of the roof and its ratio to each peer that imports."""
    from bench import ops as runner
    from bench import tables

    device = _device(device)
    path = out or records.folder(device) / ("quick.json" if quick else "ops.json")
    with _progress() as progress:
        task = progress.add_task("checks and roofs", total=None)

        def on_case(index, count, name):
            progress.update(task, total=count, completed=index, description=name)

        try:
            # Saved with every change, so that a run that is stopped leaves what it measured.
            save, seconds = partial(records.save, path), runner.QUICK_SECONDS if quick else runner.SECONDS
            record = runner.run(names or [], device, quick, dtype, seconds, on_case, save)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        except runner.DeviceLost as error:
            raise SystemExit(f"bench: {error}\nfor the rest: python -m bench.ops {device} {path}") from None
    console.print(tables.terminal(record))
    console.print(f"written to {path}")
    if csv is not None:
        records.save_csv(csv, record["rows"])
    if any(row["failure"] for row in record["rows"]):
        raise SystemExit("bench: an op is wrong, see the table")


@app.command()
def model(
    device: DeviceOption = "auto",
    quick: QuickOption = False,
    layers: Annotated[int | None, typer.Option(min=4, help="Layers, a multiple of 4; default by device.")] = None,
    out: OutOption = None,
) -> None:
    """Prefill and decode of HypeNet and of its Qwen3 teacher against context length, on random weights."""
    from bench import model as runner

    device = _device(device)
    with _progress() as progress:
        task = progress.add_task("weights", total=None)

        def on_length(index, count, name):
            progress.update(task, total=count, completed=index, description=name)

        record = runner.run(device, quick, layers, on_length)
    console.print(runner.terminal(record))
    path = out or records.folder(device) / ("model-quick.json" if quick else "model.json")
    records.save(path, record)
    console.print(f"written to {path}")


@app.command()
def plot(
    folder: Annotated[Path, typer.Argument(help="Folder of a device's records.")],
) -> None:
    """Draw roofline.png, speed.png and context.png from the records in FOLDER."""
    from bench.plot import draw

    for path in draw(folder):
        console.print(str(path))


@app.command()
def compare(old: Path, new: Path) -> None:
    """How many times as fast the new record is, case by case; a change inside the spread of both is none."""
    from bench import compare as comparison

    changes, alone = comparison.compare(records.load(old), records.load(new))
    console.print(comparison.terminal(changes))
    for name in alone:
        console.print(f"in one record only: {name}")


@app.command()
def report() -> None:
    """Write RESULTS.md from all records under bench/results."""
    from bench.report import write

    console.print(str(write()))


def _device(name):
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(name).type not in ("cpu", "cuda"):
        raise SystemExit(f"bench: --device must be cpu, cuda or auto, got {name}")
    return name


def _progress():
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


if __name__ == "__main__":
    app()
