"""The installed version, and one way to say which extra installs a missing package. Standard library only."""

import importlib
import importlib.metadata
import importlib.util
import os
import time
from collections.abc import MutableMapping

# Packages that each extra installs beside torch and numpy, by their import names.
MODEL = ("transformers", "typer", "rich", "safetensors")
HALO = (*MODEL, "datasets", "pydantic", "yaml", "matplotlib")
PACKAGES = {
    "model": MODEL,
    "halo": HALO,
    "gguf": (*HALO, "gguf", "accelerate"),
    "eval": (*HALO, "lm_eval"),
}

# How long OpenMP's threads wait awake where other processes work, in turns of a loop (GNU OpenMP's own: 300,000), and
# the variables by which a user decides it.
SPIN_COUNT = "1000"
BUSY_SECONDS = 0.1  # for which the other processes are watched
WAITING = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"}


def version() -> str:
    """Return the version of the installed distribution, or "not installed" for a source tree that is not."""
    try:
        return importlib.metadata.version("hypenet")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def require(user: str, extra: str, *packages: str) -> None:
    """Check that packages can be imported, without importing them.

    Args:
        user: The package or command that needs them, to begin the message with.
        extra: The extra of this distribution that installs them.
        packages: Names as in an `import` statement; by default everything that the extra installs.

    Raises:
        ModuleNotFoundError: If any of them is missing; the message is one line that says how to install them.
    """
    missing = [name for name in packages or PACKAGES[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f'{user}: needs {", ".join(missing)}; install with: pip install "hypenet[{extra}]"', name=missing[0]
        )


def bound_spinning(environment: MutableMapping[str, str]) -> None:
    """Let threads that wait for others sleep soon if other processes use the cores, unless the user chose otherwise.

    GNU OpenMP's threads spin at the end of every parallel loop. On an idle machine that is best: on two cores the
    demo's distillation loses a fifth of its speed if they sleep soon. Where another process needs the cores, spinning
    threads hold up the ones that they wait for: beside one busy process it loses 40% of its speed if they do not.
    """
    if not WAITING.intersection(environment) and busy_cores() > 0.5:
        environment["GOMP_SPINCOUNT"] = SPIN_COUNT


def busy_cores(seconds: float = BUSY_SECONDS) -> float:
    """Return how many of this process' cores others use, over the next moment; 0 where the system does not say."""
    try:
        cores = {f"cpu{n}" for n in os.sched_getaffinity(0)}
        before = _idle_seconds(cores)
        time.sleep(seconds)
        return max(0.0, len(cores) - (_idle_seconds(cores) - before) / seconds)
    except (AttributeError, OSError, ValueError):
        return 0.0


def _idle_seconds(cores: set[str]) -> float:
    """Return how long these cores have been idle since the system started, summed (Linux: proc_stat(5))."""
    with open("/proc/stat") as file:
        rows = [line.split() for line in file]
    idle = sum(int(row[4]) + int(row[5]) for row in rows if row[0] in cores)
    return idle / float(os.sysconf("SC_CLK_TCK"))


def start(command: str, extra: str, module: str) -> None:
    """Run the Typer app of `module`, or exit with one line if a package that the command needs is missing."""
    bound_spinning(os.environ)
    try:
        require(command, extra)
    except ModuleNotFoundError as error:
        raise SystemExit(str(error)) from None
    importlib.import_module(module).app()
