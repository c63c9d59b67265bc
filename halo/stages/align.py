"""Stage 1: each recurrent mixer learns to map its attention layer's input to that layer's output (HALO, 4.2).

One forward pass of the teacher serves all layers. Each mixer sees the teacher's own activations, so the layers are
independent regressions; clipping each layer's gradient on its own keeps them independent.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halo import models
from halo.config import AlignSettings
from halo.data import Batch
from halo.losses import mixer_mse
from hypenet import HypeNetForCausalLM


@dataclass
class Align:
    """Aligns the recurrent mixers of `student` with the attention layers of `teacher`; only the mixers are trained."""

    teacher: PreTrainedModel
    student: HypeNetForCausalLM
    settings: AlignSettings
    isolate_documents: bool = False
    name: ClassVar[str] = "align"

    def build(self) -> nn.Module:
        """Freeze everything but the mixers, which are returned."""
        self.teacher.requires_grad_(False).eval()
        self.student.requires_grad_(False)
        self.mixers = nn.ModuleList(models.mixers(self.student)).requires_grad_(True).train()
        return self.mixers

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed or mean error over layers, and the errors to log."""
        losses, powers = self.layer_losses(batch)
        total = losses.sum() if self.settings.clip_scope == "layer" else losses.mean()
        detached = losses.detach()
        return total, {"loss": detached.mean(), "relative_loss": detached / powers, "layer_losses": detached}

    def layer_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean squared error of every layer [L], and the mean square of its target [L]."""
        with torch.no_grad(), models.recorded_attention(self.teacher) as recorded:
            models.hidden_states(self.teacher, batch, self.isolate_documents)
        cu_seqlens = batch.cu_seqlens() if self.isolate_documents else None
        outputs = [
            models.run_mixer(mixer, call.x_BTD, call.position_embeddings, cu_seqlens)
            for mixer, call in zip(self.mixers, recorded, strict=True)
        ]
        powers = torch.stack([call.y_BTD.float().square().mean() for call in recorded])
        return mixer_mse(outputs, [call.y_BTD for call in recorded]), powers

    def clip_groups(self, module: nn.Module) -> list[list[nn.Parameter]]:
        """Return one group for each layer, or one for all of them."""
        if self.settings.clip_scope == "all":
            return [list(module.parameters())]
        return [list(mixer.parameters()) for mixer in module.children()]
