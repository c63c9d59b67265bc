"""Which stages matter: transfer, alignment, distillation and fine-tuning left out in turn."""

import torch
from torch import nn

from bench.experiments import measure, tables
from bench.experiments.arms import SHORT, Arm, Experiment
from halo import files, models
from halo.pipeline import Pipeline

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def randomise(pipeline: Pipeline) -> None:
    """Replace what the recurrent layers have from the teacher by random weights, as before any training."""
    job = pipeline.job
    twins = job.load_mixers("transfer")
    torch.manual_seed(job.config.seed)
    for name, parameter in twins.named_parameters():
        kind = name.split(".")[1]
        if kind in PROJECTIONS:
            nn.init.normal_(parameter, std=job.teacher_config.initializer_range)
        elif kind in ("q_norm", "k_norm"):
            nn.init.ones_(parameter)
    models.save_mixers(twins.state_dict(), job.directory("transfer") / files.MIXERS)


EXPERIMENT = Experiment(
    name="stages",
    question="What does each stage of HALO contribute?",
    settings=SHORT,
    tables=tables.quality,
    arms=(
        Arm("all stages", measure.student),
        Arm("no transfer", measure.student, alter=randomise),
        Arm("no alignment", measure.student, {"align.steps": 0}),
        Arm("no distillation", measure.student, {"distill.steps": 0}, base="all stages"),
        Arm("no fine-tuning", measure.student, {"finetune.steps": 0}, base="all stages"),
        Arm("teacher", measure.teacher, last="transfer"),
    ),
)
