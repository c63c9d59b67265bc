"""The `halo` command: each stage on its own, all stages, the report, and the demo."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from halo.command import OneLineErrors, Precision, application
from halo.errors import HaloError
from halo.stages import STAGE_HELP

if TYPE_CHECKING:
    from halo.pipeline import Pipeline


class Resumable(OneLineErrors):
    """Says after Ctrl-C that nothing is lost."""

    interrupted = "interrupted; the same command continues after what is finished"

    def invoke(self, ctx: Any) -> Any:
        """Run a command, and then take leave of the other processes, if any."""
        try:
            return super().invoke(ctx)
        finally:
            if "halo.compute" in sys.modules:
                sys.modules["halo.compute"].Compute.leave()


app = application(
    "halo",
    "Convert a Qwen3, Qwen2 or Llama into a HypeNet, which replaces most attention layers by linear recurrences.",
    Resumable,
)

ConfigOption = Annotated[str, typer.Option("--config", help="YAML file, or the name of a shipped configuration.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Output directory; overrides `out` of the file.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override one key, such as distill.steps=100.")]


@app.command()
def convert(config: ConfigOption, out: OutOption = None, changes: SetOption = None) -> None:
    """Run all stages that are not finished, then write the report. Several processes: torchrun -m halo convert ..."""
    pipeline = _pipeline(config, out, changes)
    pipeline.run()
    if pipeline.compute.main:
        _report(pipeline.out)


@app.command()
def plan(
    config: ConfigOption,
    gpus: Annotated[str, typer.Option(help="Such as 8xH100, A100, H200, cpu (measured), or cpu@TFLOPS.")],
    teacher_config: Annotated[
        Path | None, typer.Option(help="config.json of the teacher, or its directory, if `teacher` is not at hand.")
    ] = None,
    changes: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes, hours and operations.")] = False,
) -> None:
    """Compute what a conversion takes: tokens, FLOPs, hours, memory per GPU and disk of each stage, without weights."""
    from halo import estimate
    from halo.config import load_config
    from halo.plan import find_teacher, print_plan

    checked = load_config(config, tuple(changes or ()))
    planned = estimate.plan(checked, gpus, find_teacher(checked.teacher, teacher_config))
    if as_json:
        typer.echo(json.dumps(estimate.as_record(planned), indent=1))
    else:
        print_plan(planned, checked)


@app.command("config")
def show_config(
    config: Annotated[
        str | None, typer.Option("--config", help="YAML file, or the name of a shipped configuration.")
    ] = None,
    changes: SetOption = None,
) -> None:
    """Print every key with its value, default, source and meaning; without --config, the defaults."""
    from halo.explain import explain, lines

    for line in lines(explain(config, tuple(changes or ()))):
        typer.echo(line)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Output directories of conversions, finished or not.")],
) -> None:
    """Print what differs between conversions: settings, layers, losses, scale, evaluation, tokens and seconds."""
    from halo.compare import lines

    for line in lines(runs):
        typer.echo(line)


@app.command()
def report(out: Annotated[Path, typer.Argument(help="Output directory of a conversion or of the demo.")]) -> None:
    """Write report.md and its plots from the results of a conversion so far."""
    _report(out)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Output directory of a finished conversion.")],
    to: Annotated[Path | None, typer.Option("--to", help="Folder to write, new or empty; default RUN/export.")] = None,
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Data type of the weights.")] = "bf16",
    layout: Annotated[
        Literal["hypenet", "published"], typer.Option(help="published: fields and names of the published checkpoints.")
    ] = "hypenet",
    max_position_embeddings: Annotated[
        int | None, typer.Option(min=1, help="Context length of the configuration; default: the longest in eval.")
    ] = None,
    license_name: Annotated[str, typer.Option("--license", help="License of the model card, such as mit.")] = "unknown",
    push_to_hub: Annotated[str | None, typer.Option(help="Upload it to the Hugging Face Hub under this name.")] = None,
) -> None:
    """Write the finished model as a folder of transformers, with tokenizer and model card."""
    from halo import export
    from halo.progress import say

    _silence_loading()
    options: dict[str, Any] = {"dtype": dtype, "layout": layout, "max_position_embeddings": max_position_embeddings}
    folder = export.export(run, to, **options, license_name=license_name, repository=push_to_hub)
    say(f"export     {folder}")
    if push_to_hub:
        say(f"upload     {export.push_to_hub(folder, push_to_hub)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Output directory.")] = Path("demo-output"),
    config: ConfigOption = "demo",
    changes: SetOption = None,
) -> None:
    """Convert the small teacher that ships with the package and compare the result with it, in about ten minutes."""
    from halo.config import load_config
    from halo.demo.demo import run_demo

    _silence_loading()
    run_demo(load_config(config, (*(changes or ()), f"out={out}")))


@app.command("eval", help=STAGE_HELP["eval"])
def evaluate(
    config: Annotated[
        str | None, typer.Option("--config", help="YAML file, or the name of a shipped configuration.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Output directory; with --model, a JSON file.")] = None,
    changes: SetOption = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Measure this model instead: a directory, or a teacher's name.")
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="recall, bits, RULER's s1, s2, s3, multikey, multikey2, multikey3, and any of lm-evaluation-harness."
        ),
    ] = "recall,bits,s1,s2,s3,multikey",
    lengths: Annotated[str, typer.Option(help="Tokens of context, separated by commas.")] = "4096",
    haystack: Annotated[
        str | None, typer.Option(help="File, directory or dataset with the text; default: Python's standard library.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Prompts per task and length.")] = 50,
    text_tokens: Annotated[int, typer.Option(min=1, help="Tokens of text for bits per byte, per length.")] = 65_536,
    digits: Annotated[int, typer.Option(min=1, max=15, help="Digits of a number in RULER's tasks.")] = 7,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per forward pass, at least one sample.")] = 8192,
    limit: Annotated[int | None, typer.Option(min=1, help="lm-evaluation-harness: samples per task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="lm-evaluation-harness: examples in a prompt.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[Precision, typer.Option(help="Data type of the weights; auto: as saved.")] = Precision.auto,
) -> None:
    """Run the stage of a conversion, or measure one model."""
    if (config is None) == (model is None):
        raise HaloError("eval: must be given one of --config and --model")
    if config is not None:
        _pipeline(config, out, changes).run_stage("eval")
        return
    numbers = [part.strip() for part in lengths.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) for part in numbers):
        raise HaloError(f"eval: --lengths must be positive numbers separated by commas, got {lengths}")
    if changes:
        raise HaloError("eval: --set must come with --config, got --model")
    from halo.evaluation.standalone import Request, evaluate_model
    from halo.progress import say

    _silence_loading()
    request = Request(
        model=str(model),
        tasks=tuple(part.strip() for part in tasks.split(",") if part.strip()),
        lengths=tuple(sorted({int(part) for part in numbers})),
        haystack=haystack,
        samples=samples,
        text_tokens=text_tokens,
        digits=digits,
        batch_tokens=batch_tokens,
        limit=limit,
        num_fewshot=num_fewshot,
        device=device,
        dtype=dtype.value,
    )
    for row in evaluate_model(request, out):
        error = "" if row["error"] is None else f" +- {row['error']:.4f}"
        length = "" if row["length"] is None else f"{row['length']:,} tokens"
        say(f"{row['task']:24} {length:16} {row['metric']:32} {row['value']:.4f}{error}")


@app.command("select", help=STAGE_HELP["select"])
def select(
    config: Annotated[
        str | None, typer.Option("--config", help="YAML file, or the name of a shipped configuration.")
    ] = None,
    out: OutOption = None,
    changes: SetOption = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            help="Print the choice from a sweep measured elsewhere, instead of running the stage: a CSV file with the "
            "columns layer, recall, language, or a JSON list of objects with these keys; each layer once, values from "
            "0 to 1. select.policy is halo, the published score, or difference."
        ),
    ] = None,
) -> None:
    """Run the stage of a conversion, or replay a sweep."""
    if replay is None:
        if config is None:
            raise HaloError("select: must be given --config or --replay")
        _pipeline(config, out, changes).run_stage("select")
        return
    if out is not None:
        raise HaloError("select: --out must come without --replay, which writes nothing")
    from halo.config import default_config, load_config
    from halo.replay import lines
    from halo.replay import replay as choose

    overrides = tuple(changes or ())
    chosen = load_config(config, overrides) if config is not None else default_config(overrides)
    for line in lines(choose(replay, chosen.select)):
        typer.echo(line)


def _add_stage(name: str) -> None:
    def command(config: ConfigOption, out: OutOption = None, changes: SetOption = None) -> None:
        _pipeline(config, out, changes).run_stage(name)

    app.command(name, help=STAGE_HELP[name])(command)


for _name in STAGE_HELP:
    if _name not in ("select", "eval"):
        _add_stage(_name)


def _pipeline(config: str, out: Path | None, changes: list[str] | None) -> "Pipeline":
    # Imported here so that `halo --help` does not wait for torch.
    from halo.config import load_config
    from halo.pipeline import Pipeline

    overrides = [*(changes or ()), *([f"out={out}"] if out else ())]
    checked = load_config(config, tuple(overrides))
    _silence_loading()
    return Pipeline(checked)


def _silence_loading() -> None:
    """Switch off transformers' progress bars for reading and writing files."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _report(out: Path) -> None:
    from halo.demo.demo import RESULTS, write_demo_report
    from halo.progress import say
    from halo.report import write_report

    write = write_demo_report if (out / RESULTS).is_file() else write_report
    say(f"report     {write(out)}")
