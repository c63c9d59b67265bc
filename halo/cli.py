"""The `halo` command: every stage on its own, all of them, the report, and the demo."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from halo import __version__
from halo.config import STAGE_HELP, HaloError, load_config

if TYPE_CHECKING:
    from halo.conversion import Conversion


class OneLineErrors(TyperGroup):
    """A mistake of the user's is one line on standard error and exit code 2, not a traceback."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            return super().main(*args, **options)
        except HaloError as error:
            print(f"halo: {error}", file=sys.stderr)
            sys.exit(2)


app = typer.Typer(
    name="halo",
    cls=OneLineErrors,
    help="Convert a Qwen3 Transformer into a HypeNet: most attention layers become linear recurrences.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[str, typer.Option("--config", help="a YAML file, or the name of a shipped one")]
OutOption = Annotated[Path | None, typer.Option("--out", help="directory of the results, in place of the file's")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="change one key, such as distill.steps=100")]


def print_version(wanted: bool) -> None:
    """Print the version and exit, if `--version` was given."""
    if wanted:
        typer.echo(f"halo {__version__}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Define the options that precede a command; what they do is in their callbacks."""


@app.command()
def convert(config: ConfigOption, out: OutOption = None, changes: SetOption = None) -> None:
    """Run all stages that are not done yet, then write the report."""
    conversion = _conversion(config, out, changes)
    conversion.run()
    _report(conversion.out)


@app.command()
def report(out: Annotated[Path, typer.Argument(help="directory of a conversion or of the demo")]) -> None:
    """Write report.md and its plots from what a conversion has measured so far."""
    _report(out)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="directory of the results")] = Path("demo-output"),
    config: ConfigOption = "demo",
    changes: SetOption = None,
) -> None:
    """Convert the small teacher that ships with the package, and compare: about ten minutes on two cores."""
    from halo.demo.demo import run_demo

    _silence_loading()
    run_demo(load_config(config, (*(changes or ()), f"out={out}")))


def _add_stage(name: str) -> None:
    def command(config: ConfigOption, out: OutOption = None, changes: SetOption = None) -> None:
        _conversion(config, out, changes).run_stage(name)

    app.command(name, help=STAGE_HELP[name])(command)


for _name in STAGE_HELP:
    _add_stage(_name)


def _conversion(config: str, out: Path | None, changes: list[str] | None) -> "Conversion":
    overrides = [*(changes or ()), *([f"out={out}"] if out else ())]
    checked = load_config(config, tuple(overrides))
    # Imported late: `halo --help` and a mistake in the file should not wait for torch.
    from halo.conversion import Conversion

    _silence_loading()
    return Conversion(checked)


def _silence_loading() -> None:
    """No bars of transformers for reading and writing files between those of the stages."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _report(out: Path) -> None:
    from halo.demo.demo import RESULTS, write_demo_report
    from halo.progress import say
    from halo.report import write_report

    write = write_demo_report if (out / RESULTS).is_file() else write_report
    say(f"report     {write(out)}")
