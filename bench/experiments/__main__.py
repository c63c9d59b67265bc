"""`python -m bench.experiments`: run experiments, and put their tables into README.md."""

import re
from pathlib import Path
from typing import Annotated

import typer

from bench import records
from bench.experiments import architecture, calibration, hype, runner, selection, smollm2, stages
from bench.experiments.arms import Experiment

PAGE = Path(__file__).with_name("README.md")
RESULTS = records.RESULTS / "experiments"
EXPERIMENTS = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (stages, hype, architecture, selection, calibration, smollm2)
}

app = typer.Typer(
    help="Experiments on the claims of the papers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
WorkOption = Annotated[Path, typer.Option(help="Directory of the runs; a stopped experiment continues from there.")]


@app.command()
def run(
    name: str,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds, 0 to N - 1; default: the experiment's.")] = None,
    jobs: Annotated[int, typer.Option(help="Conversions at a time.")] = 2,
    work: WorkOption = Path("runs/experiments"),
    out: Annotated[Path | None, typer.Option(help="JSON file; default: bench/results/experiments/NAME.json.")] = None,
) -> None:
    """Run an experiment, write its rows as they come, and print its tables."""
    experiment, path = _find(name), out or RESULTS / f"{name}.json"
    chosen = range(seeds or experiment.seeds)

    def ended(line: str) -> None:
        print(line, flush=True)
        records.save(path, runner.collect(experiment, chosen, work))

    runner.run(experiment, chosen, work, jobs, ended)
    record = runner.collect(experiment, chosen, work)
    records.save(path, record)
    print(experiment.tables(record["rows"]))


@app.command()
def arm(name: str, arm: str, seed: int = 0, work: WorkOption = Path("runs/experiments")) -> None:
    """Run one arm of an experiment in this process, as `run` does for each."""
    experiment = _find(name)
    if arm not in [each.name for each in experiment.arms]:
        raise SystemExit(f"arm: must be one of {', '.join(each.name for each in experiment.arms)}, got {arm}")
    runner.run_arm(experiment, experiment.arm(arm), seed, work)


@app.command()
def tables() -> None:
    """Put the tables of all recorded experiments into README.md."""
    text = PAGE.read_text()
    for name, experiment in EXPERIMENTS.items():
        path = RESULTS / f"{name}.json"
        if path.is_file():
            made = experiment.tables(records.load(path)["rows"])
            mark = f"<!-- {name} -->"
            text = re.sub(f"{mark}.*?{mark}", lambda _: f"{mark}\n{made}\n{mark}", text, flags=re.DOTALL)  # noqa: B023
    PAGE.write_text(text)


@app.command("list")
def list_experiments() -> None:
    """Print the experiments."""
    for experiment in EXPERIMENTS.values():
        print(f"{experiment.name:14} {len(experiment.arms):3} arms x {experiment.seeds} seeds: {experiment.question}")


def _find(name: str) -> Experiment:
    if name not in EXPERIMENTS:
        raise SystemExit(f"experiment: must be one of {', '.join(EXPERIMENTS)}, got {name}")
    return EXPERIMENTS[name]


if __name__ == "__main__":
    app()
