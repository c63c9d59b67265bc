"""Layer selection: every policy against the truth, which is all 28 pairs of layers after training."""

import itertools
from typing import Any, get_args

import numpy as np

from bench.experiments import measure, tables
from bench.experiments.arms import SHORT, Arm, Experiment, Row
from halo.pipeline import Pipeline
from halo.selection.settings import PolicyName

LAYERS, KEEP = 8, 2
POLICIES = [policy for policy in get_args(PolicyName) if policy != "given"]
TWINS = "twins"
PAIRS = list(itertools.combinations(range(LAYERS), KEEP))


def nothing(pipeline: Pipeline) -> Row:
    """Measure nothing."""
    return {}


def make_tables(rows: list[Row]) -> str:
    """Return the table of policies and one of the best and worst pairs."""
    seeds = sorted({row["seed"] for row in rows})
    truth = {seed: _truth([row for row in rows if row["seed"] == seed]) for seed in seeds}
    lines: list[Row] = []
    for row in rows:
        if "selection" not in row:
            continue
        kl, recall = truth[row["seed"]]
        pair = tuple(row["selection"]["layers"])
        best = min(kl.values())
        lines.append(
            {
                "arm": row["arm"],
                "layers": str(list(pair)),
                "regret": kl[pair] - best,
                "place": 1 + sum(value < kl[pair] for value in kl.values()),
                "recall": recall[pair],
                "rank": _rank_correlation(row["selection"], kl),
                "seconds": row["seconds"].get("select"),
            }
        )
    columns: list[tables.Column] = [
        ("regret (KL)", tables.at("regret")),
        ("place of 28", tables.at("place")),
        ("recall 4 x", tables.at("recall")),
        ("rank correlation", tables.at("rank")),
        ("seconds", tables.at("seconds")),
    ]
    policies = tables.by_arm(lines, columns, first="policy")
    choices = "\n".join(
        f"- {arm}: {', '.join(line['layers'] for line in lines if line['arm'] == arm)}"
        for arm in dict.fromkeys(line["arm"] for line in lines)
    )
    mean = {pair: float(np.mean([truth[seed][0][pair] for seed in seeds])) for pair in truth[seeds[0]][0]}
    order = sorted(mean, key=lambda pair: mean[pair])
    ranked = [f"| {list(pair)} | {mean[pair]:.3f} |" for pair in order[:5] + order[-3:]]
    pairs = "\n".join(["| pair | KL after training |", "|---|---|", *ranked])
    return f"{policies}\n\n{choices}\n\n{pairs}"


def _truth(rows: list[Row]) -> tuple[dict[tuple[int, ...], float], dict[tuple[int, ...], float]]:
    """Return KL after training and recall at 4 x, of every two layers."""
    trained = {tuple(row["layers"]): row for row in rows if "divergence" in row}
    kl = {layers: float(np.mean(list(row["divergence"].values()))) for layers, row in trained.items()}
    return kl, {layers: row["recall"]["4"] for layers, row in trained.items()}


def _rank_correlation(selection: dict[str, Any], kl: dict[tuple[int, ...], float]) -> float | None:
    """Return Spearman's correlation between the sum of a pair's scores and minus its divergence after training."""
    scores = [row.get("score") for row in selection.get("table", [])]
    if not scores or any(score is None for score in scores):
        return None
    choices = sorted(kl)
    predicted = [sum(scores[layer] for layer in choice) for choice in choices]
    ranks = [np.argsort(np.argsort(values)) for values in (predicted, [-kl[choice] for choice in choices])]
    return float(np.corrcoef(*ranks)[0, 1])


EXPERIMENT = Experiment(
    name="selection",
    question="Which policy finds the layers that are best after training?",
    settings=SHORT
    | {"select.joint_steps": 100, "select.joint_batch": 16, "select.joint_length": 256}
    | {"distill.steps": 80, "distill.batch": 8, "finetune.steps": 0, "scale.grid": [None]}
    | {"eval.multiples": [1, 4], "eval.text_tokens": 8192},
    tables=make_tables,
    arms=(
        Arm(TWINS, nothing, last="align"),
        *(
            Arm(
                f"policy {policy}",
                measure.selection,
                {"select.policy": policy, "select.layers": None, "select.exchange": None},
                base=TWINS,
                last="select",
            )
            for policy in POLICIES
        ),
        *(Arm(f"pair {a} {b}", measure.student, {"select.layers": [a, b]}, base=TWINS) for a, b in PAIRS),
    ),
)
