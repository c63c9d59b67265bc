"""Stage 3: training on next-token loss with longer context, without a teacher (HALO, 4.4).

Leaves the student as a folder of transformers, in float32.
"""

from typing import ClassVar

from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from halo import models
from halo.compute import Compute
from halo.data import Batch
from halo.job import Job
from halo.losses import IGNORE, next_token_labels, next_token_loss
from halo.settings import HOW, LossSettings
from halo.sharding import shard_student
from halo.trainer import Training, backward
from hypenet import HypeNetForCausalLM


class FinetuneSettings(LossSettings):
    """Stage 3: next-token loss on longer context, without a teacher."""

    steps: NonNegativeInt = Field(500, le=10**9, description="optimizer steps")
    batch: PositiveInt = Field(128, description="sequences per optimizer step, over all processes")
    micro_batch: PositiveInt | None = Field(
        1, json_schema_extra=HOW, description="sequences per forward pass of a process; null: its whole share"
    )
    length: PositiveInt = Field(16_384, ge=2, description="tokens per sequence")
    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate")


class Finetune(Training):
    """Trains `student` on next-token loss.

    Args:
        student: Trained in every weight.
        settings: Hyperparameters.
        isolate_documents: Whether attention and state stay inside documents.
    """

    name: ClassVar[str] = "finetune"
    settings: FinetuneSettings

    def __init__(
        self, student: HypeNetForCausalLM, settings: FinetuneSettings, isolate_documents: bool = False
    ) -> None:
        super().__init__()
        self.student = models.trainable(student, settings)
        self.settings, self.isolate_documents = settings, isolate_documents

    def shard(self, compute: Compute) -> None:
        """Shard the student with the loss as its root."""
        shard_student(self, self.student, compute)

    def units(self, batch: Batch) -> Tensor:
        """Return the number of labels that count."""
        return (next_token_labels(batch.input_ids, batch.document_ids) != IGNORE).sum().float()

    def forward(self, batch: Batch, count: Tensor) -> Tensor:
        """Return the sum of the loss over a micro-batch, divided by `count`."""
        settings = self.settings
        return next_token_loss(
            models.hidden_states(self.student, batch, self.isolate_documents),
            self.student.get_output_embeddings().weight,
            next_token_labels(batch.input_ids, batch.document_ids),
            settings.token_chunk,
            settings.vocab_chunk,
            count,
        )

    def accumulate(self, batch: Batch, count: Tensor, scale: float) -> dict[str, Tensor]:
        """Add the gradient of the loss; without gradients enabled, only measure."""
        loss = self(batch, count)
        backward(loss, scale)
        return {"loss": loss.detach()}


def run(job: Job) -> None:
    """Train the student of the stage before and save it."""
    job.release_teacher()
    student = job.load_student("distill")
    training = Finetune(student, job.config.finetune, job.config.data.isolate_documents)
    job.train(training)
    job.save_student(training.student, "finetune")
