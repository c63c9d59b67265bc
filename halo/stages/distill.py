"""Stage 2: all weights of the hybrid are trained to match the teacher's next-token distribution (HALO, 4.3).

Leaves the student as a folder of transformers, in float32.
"""

from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor
from transformers import PreTrainedModel

from halo import models
from halo.compute import Compute
from halo.data import Batch
from halo.job import Job
from halo.losses import kl_divergence
from halo.settings import HOW, LossSettings
from halo.sharding import shard_student, shard_teacher
from halo.trainer import Training, backward
from hypenet import HypeNetForCausalLM


class DistillSettings(LossSettings):
    """Stage 2: KL divergence from the teacher's next-token distribution; all weights are trained."""

    steps: NonNegativeInt = Field(20_000, le=10**9, description="optimizer steps")
    batch: PositiveInt = Field(96, description="sequences per optimizer step, over all processes")
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    held_out_every: PositiveInt | None = Field(
        500,
        json_schema_extra=HOW,
        description="steps between measurements of the divergence on held-out text; null: none",
    )
    gate_init: Literal["open", "random"] = Field(
        "open",
        description="open: new attention gates start without effect; random (the paper) halves the output at first",
    )


class Distill(Training):
    """Trains `student` on the KL divergence from the distribution of `teacher`.

    Args:
        teacher: Frozen; not part of the module.
        student: Trained in every weight.
        settings: Hyperparameters.
        isolate_documents: Whether attention and state stay inside documents.
    """

    name: ClassVar[str] = "distill"
    settings: DistillSettings

    def __init__(
        self,
        teacher: PreTrainedModel,
        student: HypeNetForCausalLM,
        settings: DistillSettings,
        isolate_documents: bool = False,
    ) -> None:
        super().__init__()
        self.outside = (teacher.requires_grad_(False).eval(),)
        self.student = models.trainable(student, settings)
        self.settings, self.isolate_documents = settings, isolate_documents

    @property
    def teacher(self) -> PreTrainedModel:
        """The teacher."""
        return self.outside[0]

    def shard(self, compute: Compute) -> None:
        """Shard the student with the loss as its root, and a large teacher."""
        shard_student(self, self.student, compute)
        shard_teacher(self.teacher, compute)

    def units(self, batch: Batch) -> Tensor:
        """Return the number of tokens."""
        return torch.tensor(float(batch.input_ids.numel()), device=batch.input_ids.device)

    def forward(self, batch: Batch, teacher_BTD: Tensor, count: Tensor) -> Tensor:
        """Return the sum of the divergence over a micro-batch, divided by `count`."""
        settings = self.settings
        return kl_divergence(
            models.hidden_states(self.student, batch, self.isolate_documents),
            self.student.get_output_embeddings().weight,
            teacher_BTD,
            cast(Any, self.teacher.get_output_embeddings()).weight,
            settings.token_chunk,
            settings.vocab_chunk,
            count,
        )

    def accumulate(self, batch: Batch, count: Tensor, scale: float) -> dict[str, Tensor]:
        """Add the gradient of the divergence; without gradients enabled, only measure."""
        with torch.no_grad():
            teacher_BTD = models.hidden_states(self.teacher, batch, self.isolate_documents)
        loss = self(batch, teacher_BTD, count)
        backward(loss, scale)
        return {"loss": loss.detach()}


def run(job: Job) -> None:
    """Build the student, distil it and save it."""
    config = job.config
    twins = job.load_mixers("align")
    torch.manual_seed(config.seed)
    student = models.make_student(
        job.load_teacher_weights(),
        twins,
        job.softmax_layers(),
        config.mixer,
        config.distill.gate_init,
        **config.architecture,
    )
    del twins
    student.to(job.compute.device)  # type: ignore[arg-type]
    training = Distill(job.teacher, student, config.distill, config.data.isolate_documents)
    job.train(training)
    job.save_student(training.student, "distill")
