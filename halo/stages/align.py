"""Stage 1: each recurrent mixer learns to map its attention layer's input to that layer's output (HALO, 4.2).

One forward pass of the teacher serves all layers. Each mixer sees the teacher's own activations, so the layers are
independent regressions: a mixer runs forward and backward inside the pass of the teacher, as soon as its layer has run,
so that the activations of one layer are in memory at a time.

Leaves mixers.safetensors, the twins' weights in float32.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from transformers import PreTrainedModel

from halo import files, models
from halo.compute import Compute
from halo.data import Batch
from halo.job import Job
from halo.settings import TrainingSettings
from halo.sharding import shard_mixers, shard_teacher, whole_state
from halo.trainer import Training, backward


class AlignSettings(TrainingSettings):
    """Stage 1: each recurrent layer learns to map its attention layer's input to that layer's output."""

    steps: NonNegativeInt = Field(20_000, le=10**9, description="optimizer steps")
    batch: PositiveInt = Field(32, description="sequences per optimizer step, over all processes")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    clip_scope: Literal["layer", "all"] = Field("layer", description="layers are independent, so clip each on its own")


class Align(Training):
    """Trains the twins of a teacher's attention layers on its activations.

    Args:
        teacher: Frozen; not part of the module.
        mixers: The twin of every layer.
        settings: Hyperparameters.
        isolate_documents: Whether attention and state stay inside documents.
    """

    name: ClassVar[str] = "align"
    # An element's gradient is about 1e-7 at real widths, which AdamW's usual 1e-8 would damp.
    adam_eps: ClassVar[float] = 1e-15
    settings: AlignSettings

    def __init__(
        self, teacher: PreTrainedModel, mixers: nn.ModuleList, settings: AlignSettings, isolate_documents: bool = False
    ) -> None:
        super().__init__()
        self.outside = (teacher.requires_grad_(False).eval(),)
        self.mixers = mixers.requires_grad_(True).train()
        self.settings, self.isolate_documents = settings, isolate_documents

    @property
    def teacher(self) -> PreTrainedModel:
        """The teacher."""
        return self.outside[0]

    def shard(self, compute: Compute) -> None:
        """Shard each mixer on its own, and a large teacher."""
        shard_mixers(self.mixers, compute)
        shard_teacher(self.teacher, compute)

    def units(self, batch: Batch) -> Tensor:
        """Return the number of tokens."""
        return torch.tensor(float(batch.input_ids.numel()), device=batch.input_ids.device)

    def accumulate(self, batch: Batch, count: Tensor, scale: float) -> dict[str, Tensor]:
        """Add the gradients of every layer's squared error; without gradients enabled, only measure."""
        learn = torch.is_grad_enabled()
        if self.settings.clip_scope == "all":
            scale = scale / len(self.mixers)
        cu_seqlens = batch.cu_seqlens() if self.isolate_documents else None
        errors: list[Tensor] = []
        powers: list[Tensor] = []

        def regress(layer: int, call: models.AttentionCall) -> None:
            target_BTD = call.y_BTD.float()
            with torch.set_grad_enabled(learn):
                y_BTD = models.run_mixer(self.mixers[layer], call.x_BTD, call.position_embeddings, cu_seqlens)
                error = (y_BTD.float() - target_BTD).square().sum() / (count * target_BTD.shape[-1])
                backward(error, scale)
            errors.append(error.detach())
            powers.append(target_BTD.square().sum() / (count * target_BTD.shape[-1]))

        with torch.no_grad(), models.observed_attention(self.teacher, regress):
            models.hidden_states(self.teacher, batch, self.isolate_documents)
        return {"errors": torch.stack(errors), "powers": torch.stack(powers)}

    def record(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean error over layers, each layer's, and each relative to the power of its target."""
        errors = sums["errors"]
        return {"loss": errors.mean(), "relative_loss": errors / sums["powers"], "layer_losses": errors}

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Return one group for each layer, or one for all of them."""
        if self.settings.clip_scope == "all":
            return [list(self.mixers.parameters())]
        return [list(mixer.parameters()) for mixer in self.mixers]


def run(job: Job) -> None:
    """Align the twins and save them."""
    twins = job.untrained_mixers()
    training = Align(job.teacher, twins, job.config.align, job.config.data.isolate_documents)
    job.train(training)
    state = whole_state(training.mixers, job.compute)
    if job.compute.main:
        models.save_mixers(state, job.directory("align") / files.MIXERS)
    job.release_teacher()
