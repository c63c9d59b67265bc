"""`python -m bench`: measure ops and models, plot, compare two records, write RESULTS.md."""

import sys
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
    out: OutOption = None,
    csv: Annotated[Path | None, typer.Option(help="CSV file to write besides.")] = None,
) -> None:
    """Time every op at model shapes, with its share of the roof and its ratio to each peer that imports."""
    from bench import ops as runner
    from bench import tables

    device = _device(device)
    with _progress() as progress:
        task = progress.add_task("checks and roofs", total=None)

        def on_case(index, count, name):
            progress.update(task, total=count, completed=index, description=name)

        try:
            record = runner.run(names or [], device, quick, on_case)
        except ValueError as error:
            raise SystemExit(str(error)) from None
    console.print(tables.terminal(record))
    _save(record, out, device, "quick" if quick else "ops")
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
    _save(record, out, device, "model-quick" if quick else "model")


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
    """Ratios of two records of ops; a change inside the spread of both is none."""
    from bench.compare import compare as changes_of

    changes, alone = changes_of(records.load(old), records.load(new))
    for change in changes:
        console.print(f"{change.ratio:6.2f} x [{change.low:.2f}, {change.high:.2f}]  {change.verdict:9}  {change.name}")
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


def _save(record, out, device, name):
    path = out or records.folder(device) / f"{name}.json"
    records.save(path, record)
    console.print(f"written to {path}")


if __name__ == "__main__":
    app()
