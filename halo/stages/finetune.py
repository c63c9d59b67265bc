"""Stage 3: training on next-token loss with longer context, without a teacher (HALO, 4.4)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from halo import models
from halo.config import FinetuneSettings
from halo.data import Batch
from halo.losses import next_token_labels, next_token_loss
from hypenet import HypeNetForCausalLM


@dataclass
class Finetune:
    """Trains `student` on next-token loss."""

    student: HypeNetForCausalLM
    settings: FinetuneSettings
    isolate_documents: bool = False
    name: ClassVar[str] = "finetune"

    def build(self) -> nn.Module:
        """Return the student."""
        if self.settings.checkpoint_activations:
            self.student.activation_checkpointing_enable()
        return self.student.requires_grad_(True).train()

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss on a batch, twice: to differentiate and to log."""
        student_BTD = models.hidden_states(self.student, batch, self.isolate_documents)
        labels = next_token_labels(batch.input_ids, batch.document_ids)
        head = self.student.get_output_embeddings().weight
        loss = next_token_loss(student_BTD, head, labels, self.settings.token_chunk, self.settings.vocab_chunk)
        return loss, {"loss": loss.detach()}

    def clip_groups(self, module: nn.Module) -> list[list[nn.Parameter]]:
        """Return one group of all parameters."""
        return [list(module.parameters())]
