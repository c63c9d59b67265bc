"""The base of the `halo` and the `hypenet` command: start, errors, and the options that both have."""

import os
import sys
from enum import StrEnum
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from halo.errors import HaloError
from halo.extras import version


class Precision(StrEnum):
    """Data types that a model can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class OneLineErrors(TyperGroup):
    """Prints a user's mistake as one line on standard error, with exit code 2 and no traceback; 130 after Ctrl-C."""

    interrupted = "interrupted"

    def invoke(self, ctx: Any) -> Any:
        """Run a command and report a HaloError or an interruption."""
        try:
            return super().invoke(ctx)
        except HaloError as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"{self.name}: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print(f"{self.name}: {self.interrupted}", file=sys.stderr)
            sys.exit(130)


def application(name: str, description: str, group: type[OneLineErrors] = OneLineErrors) -> typer.Typer:
    """Return the Typer application of a command, with the option `--version`."""
    app = typer.Typer(
        name=name,
        cls=group,
        help=description,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def print_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"{name} {version()}")
            raise typer.Exit

    @app.callback()
    def main(
        show_version: Annotated[
            bool, typer.Option("--version", help="Print the version and exit.", callback=print_version, is_eager=True)
        ] = False,
    ) -> None:
        """Define the options that precede a command; what they do is in their callbacks."""

    return app
