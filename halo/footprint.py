"""Memory per process and disk of a conversion, computed from sizes; nothing is measured or loaded.

Memory is what weights, gradients, optimizer state, saved activations and the loss need at the same time. It follows how
the stages work: float32 masters, forward passes in the arithmetic's dtype, FSDP2 within a node (halo/sharding.py), the
losses' workspaces (halo/losses.py), and what each layer's operations save for the backward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from transformers import PreTrainedConfig

from halo.calibration.settings import CalibrateSettings
from halo.flops import CHUNK, LayerSize, ModelSize, model_size, student_size
from halo.hardware import Machine
from halo.losses import BLOCK
from halo.settings import LossSettings, TrainingSettings
from halo.sharding import REPLICATED_SHARE
from hypenet.configuration_hypenet import GDN, LIGHTNING, MAMBA2, SOFTMAX

WIDE = 4  # bytes of a float32
DOUBLE = 8  # of a float64
ADAM = 2 * WIDE  # bytes of the two moments of a parameter
# Two are kept while the next is written; each has weights and moments.
CHECKPOINTS_ON_DISK = 3


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the peak of a stage.

    Attributes:
        weights: Of all models, with the copies that forward passes use.
        gradients, optimizer: Of the trained weights.
        activations: Saved for the backward pass, and temporary.
        loss: Workspaces of the loss.
        sync_every_micro_batch: Whether every micro-batch reduces gradients, so that no process keeps all of them.
    """

    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    loss: float = 0.0
    sync_every_micro_batch: bool = False

    @property
    def total(self) -> float:
        """The sum."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


@dataclass(frozen=True)
class Sizes:
    """The models of a conversion.

    Attributes:
        teacher: As it is.
        twins: A student without softmax layers, whose mixers are trained in stage 1.
        student: The hybrid of stages 2 and 3.
    """

    teacher: ModelSize
    twins: ModelSize
    student: ModelSize

    @classmethod
    def of(cls, teacher: PreTrainedConfig, mixer: str, softmax_layers: Sequence[int], **architecture: Any) -> Self:
        """Measure the models of a conversion, with softmax attention in some layers of the student.

        Raises:
            HaloError: If the other fields of the student's configuration, `architecture`, do not fit the teacher.
        """
        twins, student = (student_size(teacher, mixer, layers, **architecture) for layers in ((), softmax_layers))
        return cls(model_size(teacher), twins, student)

    @property
    def mixers(self) -> int:
        """The parameters of the twins' mixers."""
        return sum(layer.mixer_parameters for layer in self.twins.layers)


def training_memory(stage: str, sizes: Sizes, settings: TrainingSettings, machine: Machine) -> Memory:
    """Return the memory of a training stage, "align", "distill" or "finetune"."""
    if stage == "align":
        return align_memory(sizes.teacher, sizes.twins, settings, machine)
    assert isinstance(settings, LossSettings)
    return language_memory(sizes.teacher if stage == "distill" else None, sizes.student, settings, machine)


def micro_batches(settings: TrainingSettings, machine: Machine) -> tuple[int, int]:
    """Return the sequences of a forward pass, and the forward passes of a step, of one process."""
    share = -(-settings.batch // machine.processes)
    micro = min(settings.micro_batch or share, share)
    return micro, -(-share // micro)


def calibrate_memory(teacher: ModelSize, twins: ModelSize, settings: CalibrateSettings, machine: Machine) -> Memory:
    """Return the memory of the calibration: the teacher on all sequences at once, and one twin at a time."""
    mixers = [layer.mixer_parameters for layer in twins.layers]
    largest = max(twins.layers, key=lambda layer: layer.mixer_parameters)
    one_sequence = mixer_bytes(largest, twins.hidden, machine) + 2 * DOUBLE * (twins.hidden + largest.width)
    probabilities = 3 * WIDE * largest.heads * settings.block * settings.length
    equations = 3 * DOUBLE * max(twins.hidden, largest.width) ** 2
    tokens = (settings.samples + settings.held_samples) * settings.length
    return Memory(
        weights=machine.width * teacher.parameters + 2 * WIDE * max(mixers),
        # The hidden states, the layer's input, output and context, and the temporaries of its MLP.
        activations=tokens * (_transient(teacher, machine) + machine.width * (3 * teacher.hidden + largest.width)),
        loss=settings.length * one_sequence + probabilities + equations,
    )


def align_memory(teacher: ModelSize, twins: ModelSize, settings: TrainingSettings, machine: Machine) -> Memory:
    """Return the memory of stage 1, whose layers are trained one after the other in the pass of the teacher."""
    micro, _ = micro_batches(settings, machine)
    mixers = [layer.mixer_parameters for layer in twins.layers]
    largest = max(twins.layers, key=lambda layer: layer.mixer_parameters)
    per_token = mixer_bytes(largest, twins.hidden, machine) + _transient(teacher, machine)
    per_token += 2 * 2 * WIDE * twins.hidden  # output and target in float32, and the gradient of the error
    rest = Memory(
        weights=_teacher(teacher, machine) + _trained(sum(mixers), max(mixers), 0, machine),
        optimizer=ADAM * sum(mixers) / machine.shards,
        activations=micro * settings.length * per_token,
    )
    return _with_gradients(rest, sum(mixers), max(mixers), 0, settings, machine)


def language_memory(teacher: ModelSize | None, student: ModelSize, settings: LossSettings, machine: Machine) -> Memory:
    """Return the memory of a stage that trains the whole student: stage 2 with a teacher, stage 3 without."""
    micro, _ = micro_batches(settings, machine)
    largest = max(layer.parameters for layer in student.layers)
    saved = [layer_bytes(layer, student.hidden, student.intermediate, machine) for layer in student.layers]
    per_token = max(saved) + len(saved) * WIDE * student.hidden if settings.checkpoint_activations else sum(saved)
    # The output of the decoder, the hidden states that the loss takes, and their gradient.
    per_token += _transient(student, machine) + 3 * WIDE * student.hidden
    rest = Memory(
        weights=(_teacher(teacher, machine) if teacher else 0.0)
        + _trained(student.parameters, largest, student.outside, machine),
        optimizer=ADAM * student.parameters / machine.shards,
        activations=micro * settings.length * per_token,
        loss=_loss(student, settings, 2 if teacher else 1, machine),
    )
    return _with_gradients(rest, student.parameters, largest, student.outside, settings, machine)


def inference_memory(weights: float, model: ModelSize, tokens: int, machine: Machine, chunk: int = 512) -> Memory:
    """Return the memory of forward passes without gradients, whose logits are computed `chunk` tokens at a time."""
    return Memory(
        weights=weights,
        activations=tokens * (_transient(model, machine) + 2 * WIDE * model.hidden),
        loss=min(chunk, tokens) * model.vocab * WIDE + 3 * WIDE * BLOCK,
    )


def gate_memory(
    weights: float, teacher: ModelSize, twins: ModelSize, settings: TrainingSettings, machine: Machine
) -> Memory:
    """Return the memory of training one gate a layer, with attention and twin of all layers in one graph."""
    micro, _ = micro_batches(settings, machine)
    per_token = _transient(teacher, machine) + 3 * WIDE * teacher.hidden
    for attention, twin in zip(teacher.layers, twins.layers, strict=True):
        per_token += layer_bytes(twin, teacher.hidden, teacher.intermediate, machine)
        per_token += mixer_bytes(attention, teacher.hidden, machine)
    chunk = min(512, micro * settings.length)
    return Memory(
        weights=weights,
        activations=micro * settings.length * per_token,
        loss=2 * chunk * teacher.vocab * WIDE + 3 * WIDE * BLOCK,
    )


def layer_bytes(layer: LayerSize, hidden: int, intermediate: int, machine: Machine) -> float:
    """Return the bytes per token that a decoder layer of a HypeNet saves for the backward pass.

    Two inputs of norms in float32, the mixer, the MLP's input and three tensors of its width.
    """
    norms = 2 * WIDE * hidden
    return norms + mixer_bytes(layer, hidden, machine) + _casts(2, hidden, machine) + 3 * machine.width * intermediate


def mixer_bytes(layer: LayerSize, hidden: int, machine: Machine) -> float:
    """Return the bytes per token that a mixer saves for the backward pass, its input included."""
    width, keys, size = layer.width, layer.kv_heads * layer.head_dim, machine.width
    found: float = size * (2 * width + 3 * keys)  # q and k before and after norm and rotation; v
    found += 3 * size * width  # the output before norm or gate, its gate, and their product
    if layer.kind == SOFTMAX:
        return found + _casts(4, hidden, machine) + WIDE * layer.heads
    if machine.cuda:  # the state before every chunk
        found += size * width * layer.head_dim / CHUNK
    if layer.kind == LIGHTNING:
        return found + _casts(4, hidden, machine)
    if layer.kind == MAMBA2:  # the step size before and after softplus, the decay, k before the step size's factor
        return found + 3 * WIDE * layer.heads + _casts(5, hidden, machine) + size * width
    assert layer.kind == GDN
    # q and k before their L2 norm, decay and beta, and the inverse of each chunk.
    found += 2 * size * width + 5 * WIDE * layer.heads + (size * CHUNK * layer.heads if machine.cuda else 0)
    return found + _casts(6, hidden, machine)


def _casts(linear_layers: int, hidden: int, machine: Machine) -> float:
    """Return the bytes of a float32 tensor as the input of linear layers, each of which casts it to a 16-bit dtype."""
    return linear_layers * machine.width * hidden if machine.width < WIDE else WIDE * hidden


def _transient(model: ModelSize, machine: Machine) -> float:
    """Return the bytes per token of temporaries at the peak of one layer."""
    width = max(layer.width for layer in model.layers)
    return 3 * WIDE * model.hidden + machine.width * max(3 * model.intermediate, 8 * width)


def _teacher(teacher: ModelSize, machine: Machine) -> float:
    """Return the bytes of the teacher: a copy for each GPU if it is small, else its layers are sharded."""
    size = machine.width * teacher.parameters
    if not machine.cuda or machine.shards == 1 or size < REPLICATED_SHARE * machine.memory:
        return size
    layers = [layer.parameters for layer in teacher.layers]
    return machine.width * (teacher.outside + sum(layers) / machine.shards + 2 * max(layers))


def _trained(parameters: int, largest: int, outside: int, machine: Machine) -> float:
    """Return the bytes of trained weights: masters, and what forward passes use.

    Args:
        parameters: All of them.
        largest: Of the largest unit that is gathered at a time; the next one is gathered meanwhile.
        outside: Of the root, which is gathered in float32 for the whole step.
        machine: Of the run.
    """
    masters = WIDE * parameters / machine.shards
    if machine.processes == 1:  # autocast keeps the 16-bit copies for the step
        return masters + (machine.width * parameters if machine.width < WIDE else 0)
    return masters + 2 * machine.width * largest + WIDE * outside


def _with_gradients(
    rest: Memory, parameters: int, largest: int, outside: int, settings: TrainingSettings, machine: Machine
) -> Memory:
    """Add the bytes of gradients, and choose when they are reduced over the processes.

    Reduced once a step, every process keeps all of them until the last micro-batch; reduced after every micro-batch, it
    keeps its share and the units in reduction, and sends more. "auto" is the first where that fits.
    """
    _, steps = micro_batches(settings, machine)
    if machine.processes == 1:
        return replace(rest, gradients=WIDE * parameters)
    shares = replace(rest, gradients=WIDE * (parameters / machine.shards + outside + 2 * largest))
    if steps == 1:
        return shares
    whole = replace(rest, gradients=WIDE * parameters + WIDE * parameters / machine.shards)
    wanted = settings.sync_every_micro_batch
    if wanted is True or (wanted == "auto" and whole.total > machine.available):
        return replace(shares, sync_every_micro_batch=True)
    return whole


def _loss(student: ModelSize, settings: LossSettings, heads: int, machine: Machine) -> float:
    """Return the bytes of the logits of each head, the temporaries, the head's gradient and its 16-bit copy."""
    columns = min(settings.vocab_chunk or student.vocab, student.vocab)
    copy = machine.width if machine.width < WIDE else 0
    return (
        heads * settings.token_chunk * columns * WIDE
        + 3 * WIDE * BLOCK
        + (WIDE + copy) * student.vocab * student.hidden
    )


def host_bytes(sizes: Sizes, stored: int, kept: int, machine: Machine) -> float:
    """Return the bytes of a node's main memory while its processes build the student, each of them the whole.

    Args:
        sizes: Of the models.
        stored: Bytes of a weight in the teacher's files, in whose dtype it is loaded to copy from.
        kept: How many layers stay softmax attention; their twins are loaded with the others.
        machine: Of the run.
    """
    twins = sizes.mixers * kept / len(sizes.twins.layers)
    return machine.shards * (stored * sizes.teacher.parameters + WIDE * (sizes.student.parameters + twins))


def checkpoint_bytes(trained: int) -> int:
    """Return the bytes of a checkpoint of so many trained parameters."""
    return (WIDE + ADAM) * trained


def model_bytes(parameters: int) -> int:
    """Return the bytes of a saved result, in float32."""
    return WIDE * parameters
