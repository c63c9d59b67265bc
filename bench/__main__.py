"""`python -m bench`: measure ops and models, plot, compare two records, write RESULTS.md."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from hypenet_kernels import _native

app = typer.Typer(
    help="Measure the kernels and the model, against roofs and peers of the same run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(width=None if sys.stdout.isatty() else 160)

DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")]
QuickOption = Annotated[bool, typer.Option("--quick", help="Only a selection that runs in under a minute.")]
OutOption = Annotated[Path | None, typer.Option(help="JSON file to write; default: bench/results/<device>/.")]


@app.command()
def ops(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME ...]", help="Ops to measure; default: all.")
    ] = None,
    device: DeviceOption = "auto",
    quick: QuickOption = False,
    dtype: Annotated[str | None, typer.Option(help="Only cases of this dtype: float32, bfloat16.")] = None,
    out: OutOption = None,
    csv: Annotated[Path | None, typer.Option(help="Also write the rows to this CSV file.")] = None,
) -> None:
    """Time every op at model shapes, with its fraction of the roof and its ratio to each installed peer."""
    from bench import ops as runner
    from bench import tables

    device = _device(device)
    path = out or records.folder(device) / ("quick.json" if quick else "ops.json")
    with _progress("checks and roofs") as on_case:
        try:
            # Saved after every change: a run that is stopped keeps what it has measured.
            save, seconds = partial(records.save, path), runner.QUICK_SECONDS if quick else runner.SECONDS
            record = runner.run(names or [], device, quick, dtype, seconds, on_case, save)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        except runner.DeviceLost as error:
            raise SystemExit(
                f"bench: {error}\nto measure the rest: python -m bench.supervise {device} {path}"
            ) from None
    rows = [tables.op_cells(row) for row in record["rows"]]
    left = (tables.OPS_HEADER[0], tables.OPS_HEADER[-1])
    console.print(tables.terminal(tables.OPS_HEADER, rows, left, record["stamp"]["device"]))
    console.print(f"written to {path}")
    if csv is not None:
        records.save_csv(csv, record["rows"])
    if any(row["failure"] for row in record["rows"]):
        raise SystemExit("bench: an op is wrong or failed, see the table")


@app.command()
def model(
    device: DeviceOption = "auto",
    quick: QuickOption = False,
    layers: Annotated[int | None, typer.Option(min=4, help="Number of layers; default: 28, with --quick 4.")] = None,
    out: OutOption = None,
) -> None:
    """Time prefill and decode of HypeNet and its Qwen3 teacher against context length, with random weights."""
    from bench import model as runner
    from bench import tables

    device = _device(device)
    with _progress("weights") as on_case:
        record = runner.run(device, quick, layers, on_case)
    rows = [tables.model_cells(row) for row in record["rows"]]
    title = f"{record['stamp']['device']}, {record['layers']} layers"
    console.print(tables.terminal(tables.MODEL_HEADER, rows, tables.MODEL_HEADER[:1], title))
    path = out or records.folder(device) / ("model-quick.json" if quick else "model.json")
    records.save(path, record)
    console.print(f"written to {path}")


@app.command()
def families(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME ...]", help="Model types; default all.")] = None,
    device: DeviceOption = "auto",
    quick: QuickOption = False,
    seconds: Annotated[float, typer.Option(help="For each pair of timings.")] = 4.0,
    out: OutOption = None,
) -> None:
    """Time transformers' models with and without patch_transformers: prefill and decode, model and recurrence."""
    from bench import families as runner
    from bench import tables

    device = _device(device)
    with _progress("weights") as on_case:
        try:
            record = runner.run(device, names or [], quick, 0.5 if quick else seconds, on_case)
        except ValueError as error:
            raise SystemExit(str(error)) from None
    rows = [tables.family_cells(row) for row in record["rows"]]
    console.print(tables.terminal(tables.FAMILY_HEADER, rows, tables.FAMILY_HEADER[:4], record["stamp"]["device"]))
    path = out or records.folder(device) / ("families-quick.json" if quick else "families.json")
    records.save(path, record)
    console.print(f"written to {path}")
    if any("failure" in row for row in record["rows"]):
        raise SystemExit("bench: a patched model is wrong, see the table")


@app.command()
def losses(
    device: DeviceOption = "auto",
    tokens: Annotated[int, typer.Option(help="Tokens of the batch.")] = 8192,
    vocabulary: Annotated[int, typer.Option(help="Entries of the vocabulary.")] = 151_936,
    hidden: Annotated[int, typer.Option(help="Hidden size.")] = 2048,
    chunk: Annotated[int, typer.Option(help="Tokens whose logits are in memory at a time.")] = 512,
    seconds: Annotated[float, typer.Option(help="For each timing; 0 traces the memory and times nothing.")] = 0.0,
) -> None:
    """Trace the memory of the losses over the vocabulary, beyond inputs and the gradient of the weights."""
    from bench import losses as runner
    from bench import tables

    rows = [runner.cells(row) for row in runner.run(_device(device), tokens, vocabulary, hidden, chunk, seconds)]
    console.print(tables.terminal(runner.HEADER, rows, runner.HEADER[:1], f"V = {vocabulary:,}, D = {hidden:,}"))


@app.command()
def conversion(
    config: Annotated[str, typer.Option(help="YAML file, or the name of a shipped configuration.")],
    work: Annotated[Path, typer.Option(help="Output directory of the conversion.")],
    kill: Annotated[bool, typer.Option("--kill", help="Kill the process once in every stage.")] = False,
    out: OutOption = None,
) -> None:
    """Run a whole conversion, if wanted with a kill in every stage, and record times, losses and measurements."""
    from bench import conversion as runner

    work.mkdir(parents=True, exist_ok=True)
    record = runner.run(config, work, kill, work / "conversion.log")
    path = out or records.RESULTS / "conversions" / f"{Path(config).stem}.json"
    records.save(path, record)
    console.print(f"written to {path}")


@app.command()
def sass(
    out: Annotated[Path | None, typer.Option(help="JSON file to write; default: bench/results/sass.json.")] = None,
) -> None:
    """Predict the CUDA kernels' cycles and times from their machine code, by a model: needs NVRTC, but no GPU."""
    from bench import tables
    from bench.sass import predict

    with _progress("kernels") as on_case:
        try:
            record = predict.run(on_case)
        except (NotImplementedError, RuntimeError) as error:
            raise SystemExit(str(error)) from None
    for header, rows, title in (
        (tables.KERNEL_HEADER, [tables.kernel_cells(row) for row in record["kernels"]], "predicted cycles"),
        (tables.PREDICTED_HEADER, [tables.predicted_cells(row) for row in record["cases"]], "predicted times"),
    ):
        console.print(tables.terminal(header, rows, (header[0], header[-1]), f"{title}: a model, no hardware"))
    tflops = record["tflops"]
    console.print(
        f"HyPE forward: {tflops['predicted']:.0f} TFLOP/s predicted; FlashAttention-2, the same design: "
        f"{tflops['measured']:.0f} measured"
    )
    path = out or predict.RECORD
    records.save(path, record)
    console.print(f"written to {path}")


@app.command()
def plot(
    folder: Annotated[Path, typer.Argument(help="Folder with the records of one device.")],
) -> None:
    """Draw roofline.png, speed.png and context.png from the records in FOLDER."""
    from bench.plot import draw

    for path in draw(folder):
        console.print(str(path))


@app.command()
def ab(
    other: Annotated[Path, typer.Argument(help="Another checkout, built in place.")],
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME ...]", help="Ops to measure; default: all.")
    ] = None,
    device: DeviceOption = "auto",
    quick: QuickOption = False,
) -> None:
    """Time the kernels of two builds in one process, in turns, and say whether their results are the same bits."""
    from bench import ab as runner
    from bench import tables

    device = _device(device)
    with _progress("builds") as on_case:
        try:
            rows = [row.cells() for row in runner.run(other, names or [], device, quick, on_case=on_case)]
        except ValueError as error:
            raise SystemExit(str(error)) from None
    console.print(tables.terminal(runner.HEADER, rows, runner.HEADER[:1], records.device_name(device)))


@app.command()
def compare(old: Path, new: Path) -> None:
    """Print the speedup from OLD to NEW for each case; a change within the spread of both counts as no change."""
    from bench import compare as comparison
    from bench import tables

    changes, alone = comparison.compare(records.load(old), records.load(new))
    console.print(tables.terminal(comparison.HEADER, comparison.cells(changes), comparison.HEADER[:1]))
    for name in alone:
        console.print(f"only in one record: {name}")


@app.command()
def report() -> None:
    """Write RESULTS.md from all records under bench/results."""
    from bench.report import write

    console.print(str(write()))


def _device(name: str) -> str:
    """Return "cpu" or "cuda"; exit where nothing is built, before minutes are spent on roofs."""
    try:
        _native.cpu()
    except ImportError as error:
        raise SystemExit(str(error)) from None
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(name).type not in ("cpu", "cuda"):
        raise SystemExit(f"bench: --device must be cpu, cuda or auto, got {name}")
    return name


@contextmanager
def _progress(begin: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a progress bar (in a log, a line a case), and yield on_case(index, count, name), which moves it on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(begin, total=None)

        def on_case(index: int, count: int, name: str) -> None:
            progress.update(task, total=count, completed=index, description=name)
            if not console.is_terminal:
                console.print(f"{index}/{count} {name}")

        yield on_case


if __name__ == "__main__":
    app()
