"""One gate a layer between twin and attention, all trained together: which layers need attention, given the others.

    layer i:   y_i = g_i * kept_i(x) + (1 - g_i) * twin_i(x),   g_i = sigmoid(logit_i)
    loss:      KL(teacher || model) + price(t) * mean_i g_i,   price(t) rising linearly from 0 to its value

Both branches are frozen, and kept_i is the teacher's attention as a kept layer has it, which in HyPE is without rotary
embedding. The text is that of training, with generated recall episodes of one to eight keys. Source of the idea:
FlashMorph, arXiv 2606.30562.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halo import models
from halo.compute import Compute
from halo.data import Batch
from halo.job import Job
from halo.losses import kl_divergence
from halo.selection.cost import gate_flops
from halo.selection.settings import gate_settings
from halo.selection.variants import TwinAttention, kept_attention
from halo.settings import TrainingSettings
from halo.stages import SAMPLE_ORDERS
from halo.trainer import BatchSource, Run, Training, train

GATES = "joint-"  # directories of the trainings, by seed


class GateTraining(Training):
    """Trains the gates of all layers on the divergence from the teacher and the price of attention.

    Args:
        teacher: Frozen; not part of the module.
        twins: The aligned recurrent mixers, frozen.
        settings: Hyperparameters.
        price: Of attention in all layers, in nats, at the last step.
        isolate_documents: Whether attention and state stay inside documents.
        rotary: Whether kept layers keep their rotary embedding.
    """

    name: ClassVar[str] = "select"
    settings: TrainingSettings

    def __init__(
        self,
        teacher: PreTrainedModel,
        twins: nn.ModuleList,
        settings: TrainingSettings,
        price: float,
        isolate_documents: bool = False,
        rotary: bool = False,
    ) -> None:
        super().__init__()
        teacher.requires_grad_(False).eval()
        self.outside = (teacher, twins.requires_grad_(False).eval())
        self.gates = nn.Parameter(torch.zeros(len(twins), device=teacher.device))
        self.settings, self.price, self.isolate_documents = settings, price, isolate_documents
        self.rotary = rotary
        self.step = 0
        self.compute: Compute | None = None

    def at_step(self, source: BatchSource) -> BatchSource:
        """Return the same batches, and note the number of the step with each."""

        def counted(start: int) -> Iterator[Batch]:
            for self.step, batch in enumerate(source(start), start):
                yield batch

        return counted

    def shard(self, compute: Compute) -> None:
        """Keep the few gates whole; their gradients are added up over the processes."""
        self.compute = compute

    def units(self, batch: Batch) -> Tensor:
        """Return the number of tokens."""
        return torch.tensor(float(batch.input_ids.numel()), device=batch.input_ids.device)

    def record(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Log the gates too."""
        return sums | {"gates": self.gates.detach().sigmoid()}

    def accumulate(self, batch: Batch, count: Tensor, scale: float) -> dict[str, Tensor]:
        """Add the gradient of a micro-batch; `scale` is for gradients that are averaged, which these are not."""
        teacher, _ = self.outside
        head = cast(Any, teacher.get_output_embeddings()).weight
        with torch.no_grad():
            teacher_BTD = models.hidden_states(teacher, batch, self.isolate_documents)
        with models.replaced(teacher, self.gated_layers(batch)):
            hidden_BTD = models.hidden_states(teacher, batch, self.isolate_documents)
        divergence = kl_divergence(hidden_BTD, head, teacher_BTD, head, count=count)
        price = self.price * (self.step + 1) / self.settings.steps
        attention = self.gates.sigmoid().mean() * (self.units(batch) / count)
        loss = divergence + price * attention
        if torch.is_grad_enabled():
            with torch.autocast(loss.device.type, enabled=False):
                (gradient,) = torch.autograd.grad(loss, self.gates)
            total = gradient if self.compute is None else self.compute.sum(gradient)
            self.gates.grad = total if self.gates.grad is None else self.gates.grad + total
        return {"loss": loss.detach(), "divergence": divergence.detach(), "attention": attention.detach()}

    def gated_layers(self, batch: Batch) -> dict[int, nn.Module]:
        """Return what to replace the teacher's attention by for a batch, by layer."""
        teacher, twins = self.outside
        layers = cast(Any, teacher).model.layers
        cu_seqlens = batch.cu_seqlens() if self.isolate_documents else None
        return {
            i: GatedAttention(kept_attention(layers[i].self_attn, self.rotary), TwinAttention(twin, cu_seqlens), gate)
            for i, (twin, gate) in enumerate(zip(twins, self.gates.sigmoid(), strict=True))
        }


class GatedAttention(nn.Module):
    """Mixes an attention layer and its twin: gate * attention + (1 - gate) * twin."""

    def __init__(self, attention: nn.Module, twin: TwinAttention, gate: Tensor) -> None:
        super().__init__()
        self.attention, self.twin, self.gate = attention, twin, gate

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the mixture [B, T, D], and None for attention weights."""
        attention = self.attention(hidden_states=hidden_states, **kwargs)[0]
        twin = self.twin(hidden_states=hidden_states, **kwargs)[0]
        return torch.lerp(twin, attention.to(twin.dtype), self.gate.to(twin.dtype)), None


def train_gates(job: Job, twins: nn.ModuleList, seed: int) -> np.ndarray:
    """Train the gates in <out>/select/joint-<seed>-<settings>, from its last checkpoint on if there is one.

    Args:
        job: The conversion.
        twins: The aligned mixers, on the device.
        seed: Of the order of the samples.

    Returns:
        The gates [L], float64, 0 for the twin and 1 for attention.
    """
    config, settings = job.config, gate_settings(job.config.select)
    training = GateTraining(
        job.teacher,
        twins,
        settings,
        config.select.joint_price,
        config.data.isolate_documents,
        config.attention_has_positions,
    )
    # Seeds of this run are neighbours, and the stages have the smallest numbers.
    order = SAMPLE_ORDERS["select"] + (1 + max(SAMPLE_ORDERS.values())) * (1 + seed - config.seed)
    sizes = job.sizes(())
    flops = gate_flops(sizes.teacher, sizes.twins, settings.length)
    source = training.at_step(job.batch_source(settings, order))
    identity = job.identity("select") | {"gates_seed": seed}
    run = Run(source, [], identity, flops, config.tensorboard)
    # Of other settings the stage starts anew; their checkpoints stay where they are.
    settings_hash = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    train(training, run, job.directory("select") / f"{GATES}{seed}-{settings_hash}", job.compute)
    return training.gates.detach().double().sigmoid().cpu().numpy()
