"""The student's architecture: one part less at a time, and other recurrences, at equal tokens."""

from bench.experiments import measure, tables
from bench.experiments.arms import SHORT, Arm, Experiment

EXPERIMENT = Experiment(
    name="architecture",
    question="What do the parts of HypeNet contribute, and which recurrence converts best at equal tokens?",
    settings=SHORT,
    tables=tables.quality,
    arms=(
        Arm("lightning", measure.student),
        Arm("no QK-norm in recurrent layers", measure.student, {"architecture.lightning_use_qk_norm": False}),
        Arm("key and value heads shared", measure.student, {"architecture.lightning_nkv": 2}),
        Arm("no gate in recurrent layers", measure.student, {"architecture.lightning_use_output_gate": False}),
        Arm("no gate in attention", measure.student, {"architecture.attn_use_output_gate": False}, base="lightning"),
        Arm("gdn", measure.student, {"mixer": "gdn"}),
        Arm("mamba2", measure.student, {"mixer": "mamba2"}),
    ),
)
