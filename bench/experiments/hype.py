"""HyPE: rotary embedding or none in each kind of layer, and the scale of the attention logits."""

from bench.experiments import measure, tables
from bench.experiments.arms import SHORT, Arm, Experiment, Row
from halo.pipeline import Pipeline

CONSTANTS = (1.1, 1.2)
MULTIPLES = (1, 4, 16, 64)


def with_scales(pipeline: Pipeline) -> Row:
    """Measure the finished model with the chosen scale, with constant ones, and without."""
    job = pipeline.job
    model = job.measured_student("scale")
    chosen = model.config.attn_logits_scaling
    scalings = {"none": None, "chosen": chosen} | {f"constant {value}": value for value in CONSTANTS}
    return {
        "scale": chosen,
        "scalings": {name: measure.at_lengths(job, model, value, name) for name, value in scalings.items()},
    }


def make_tables(rows: list[Row]) -> str:
    """Return a table of positions, and one of scales for the proposed positions."""
    lengths = [str(multiple) for multiple in MULTIPLES]
    positions = tables.by_arm(
        rows, [(f"recall {n} x", tables.at("scalings", "chosen", "recall", n)) for n in lengths], first="positions"
    )
    proposed = [row for row in rows if row["arm"] == PROPOSED]
    by_scale = [
        {"arm": name, "recall": values["recall"], "bits": values["bits_per_byte"]}
        for row in proposed
        for name, values in row["scalings"].items()
    ]
    columns = [(f"recall {n} x", tables.at("recall", n)) for n in lengths]
    columns += [(f"bits per byte {n} x", tables.at("bits", n)) for n in lengths]
    return f"{positions}\n\n{tables.by_arm(by_scale, columns, first='scale of the logits')}"


PROPOSED, NOWHERE = "recurrent only (HyPE)", "nowhere"
NO_RNN_ROPE = {"architecture.lightning_use_rope": False}
EXPERIMENT = Experiment(
    name="hype",
    question="Does a hybrid recall beyond its training length, and what of HyPE is it due to?",
    settings=SHORT
    | {
        "eval.multiples": list(MULTIPLES),
        "eval.recall_tokens": 131_072,
        "eval.recall_samples": 24,
        "eval.text_tokens": 32_768,
        "scale.length": 4096,
    },
    tables=make_tables,
    arms=(
        Arm(PROPOSED, with_scales),
        Arm("everywhere", with_scales, {"architecture.attn_use_rope": True}, base=PROPOSED),
        Arm(NOWHERE, with_scales, NO_RNN_ROPE),
        Arm("attention only", with_scales, NO_RNN_ROPE | {"architecture.attn_use_rope": True}, base=NOWHERE),
    ),
)
