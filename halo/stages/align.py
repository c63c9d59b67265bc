"""Stage 1: every recurrent mixer learns to give its attention layer's output from that layer's input (HALO, 4.2).

One teacher forward serves all layers. A mixer sees the teacher's own activations, so the layers are independent
regressions; clipping each layer's gradient on its own keeps them so.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from halo import models
from halo.config import AlignSettings
from halo.data import Batch
from halo.losses import mixer_mse
from hypenet import HypeNetForCausalLM


@dataclass
class Align:
    """`student` has a recurrent mixer in every layer; nothing else of it is used or changed."""

    teacher: Qwen3ForCausalLM
    student: HypeNetForCausalLM
    settings: AlignSettings
    isolate_documents: bool = False
    name: ClassVar[str] = "align"

    def build(self) -> nn.Module:
        self.teacher.requires_grad_(False).eval()
        self.student.requires_grad_(False)
        self.mixers = nn.ModuleList(models.mixers(self.student)).requires_grad_(True).train()
        return self.mixers

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        losses, powers = self.layer_losses(batch)
        total = losses.sum() if self.settings.clip_scope == "layer" else losses.mean()
        detached = losses.detach()
        return total, {"loss": detached.mean(), "relative_loss": detached / powers, "layer_losses": detached}

    def layer_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean squared error of every layer [L], and the mean square of what it should have given [L]."""
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
