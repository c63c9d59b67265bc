"""Stage 2: all weights of the hybrid are trained to match the teacher's next-token distribution (HALO, 4.3)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halo import models
from halo.config import DistillSettings
from halo.data import Batch
from halo.losses import kl_divergence
from hypenet import HypeNetForCausalLM


@dataclass
class Distill:
    """Trains `student` on the KL divergence from the distribution of `teacher`."""

    teacher: PreTrainedModel
    student: HypeNetForCausalLM
    settings: DistillSettings
    isolate_documents: bool = False
    name: ClassVar[str] = "distill"

    def build(self) -> nn.Module:
        """Freeze the teacher and return the student."""
        self.teacher.requires_grad_(False).eval()
        if self.settings.checkpoint_activations:
            self.student.activation_checkpointing_enable()
        return self.student.requires_grad_(True).train()

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the divergence on a batch, twice: to differentiate and to log."""
        with torch.no_grad():
            teacher_BTD = models.hidden_states(self.teacher, batch, self.isolate_documents)
        student_BTD = models.hidden_states(self.student, batch, self.isolate_documents)
        loss = kl_divergence(
            student_BTD,
            self.student.get_output_embeddings().weight,
            teacher_BTD,
            self.teacher.get_output_embeddings().weight,
            self.settings.token_chunk,
            self.settings.vocab_chunk,
        )
        return loss, {"loss": loss.detach()}

    def clip_groups(self, module: nn.Module) -> list[list[nn.Parameter]]:
        """Return one group of all parameters."""
        return [list(module.parameters())]
