"""Operations on models: build twins and hybrids, save and load them, observe and replace layers.

B sequences, T tokens, D hidden size. The twins are the recurrent mixers of all layers, made from the attention layers
of the teacher; the student is a HypeNet with some softmax layers and the twins in all others.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from halo import files
from halo.data import Batch
from halo.saved import check_loading
from halo.settings import LossSettings
from hypenet import HypeNetConfig, HypeNetForCausalLM, MixerContext, from_teacher
from hypenet.configuration_hypenet import hype_logits_scaling
from hypenet.conversion import empty_twins, recurrent_twins
from hypenet.mixers import Mixer
from hypenet.packing import packed_positions


@dataclass
class AttentionCall:
    """Input and output [B, T, D] of one attention layer in a forward pass, and its rotary cos and sin."""

    x_BTD: Tensor
    y_BTD: Tensor
    position_embeddings: tuple[Tensor, Tensor]


def make_twins(teacher: PreTrainedModel, mixer: str, **architecture: Any) -> nn.ModuleList:
    """Build the recurrent twin of every attention layer, in float32 on the CPU (weight transfer, HALO 4.1)."""
    return recurrent_twins(teacher, mixer, **architecture).float().cpu()


def save_mixers(state: dict[str, Tensor], path: Path) -> None:
    """Write the weights of twins as one safetensors file."""
    whole = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    files.write_file(path, lambda partial: save_file(whole, partial))


def load_mixers(path: Path, teacher: PreTrainedConfig, mixer: str, remedy: str, **architecture: Any) -> nn.ModuleList:
    """Load the twins that a stage saved, in float32 on the CPU.

    Args:
        path: The safetensors file.
        teacher: The configuration of the model that they are twins of.
        mixer: Their kind.
        remedy: What to do if the file is missing or damaged, to end the message with.
        architecture: Other fields of the student's configuration.

    Raises:
        HaloError: If the file is missing or damaged, or belongs to another model.
    """
    twins = empty_twins(teacher, mixer, **architecture)
    with files.reading(path, remedy):
        twins.load_state_dict(load_file(path), assign=True)
    return twins


def load_hypenet(
    directory: Path,
    device: torch.device,
    remedy: str = "run its stage again",
    dtype: torch.dtype = torch.float32,
) -> HypeNetForCausalLM:
    """Load a HypeNet that an earlier stage saved; the parameters of its decays are float32 in every dtype.

    Raises:
        HaloError: If it is missing or damaged, or lacks weights.
    """
    with files.reading(directory, remedy):
        options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # all is told below
        loaded: Any = HypeNetForCausalLM.from_pretrained(directory, dtype=dtype, **options)
    model, report = loaded
    check_loading(directory, report, remedy)
    model.to(device)
    return model


def raise_context_length(folder: Path, length: int) -> None:
    """Let a saved model and its tokenizer promise other programs a context of at least `length` tokens.

    A HypeNet has no limit; programs such as lm-evaluation-harness cut what is longer than these fields say.
    """
    fields = (
        ("config.json", "max_position_embeddings", HypeNetConfig.max_position_embeddings),
        ("tokenizer_config.json", "model_max_length", length),
    )
    for file, field, default in fields:
        path = folder / file
        record = files.read_json(path, "run `halo scale` again")
        if record.get(field, default) < length:
            files.write_json(path, record | {field: length})


def make_student(
    teacher: PreTrainedModel,
    twins: nn.ModuleList,
    layers: list[int],
    mixer: str,
    gate_init: str,
    **architecture: Any,
) -> HypeNetForCausalLM:
    """Build the hybrid of stage 2 in float32, with softmax attention in `layers` and the twins in all others.

    Args:
        teacher: Provides all other weights.
        twins: The recurrent mixers; the modules themselves are used.
        layers: Indices of the softmax attention layers, which have an output gate and no position encoding.
        mixer: Kind of the recurrent layers, "lightning", "gdn" or "mamba2".
        gate_init: Initialisation of the new output gates, "open" or "random".
        architecture: Other fields of the student's configuration.
    """
    aligned = {layer: cast(Mixer, twin) for layer, twin in enumerate(twins) if layer not in layers}
    student = from_teacher(
        teacher, keep_layers=layers, mixer=mixer, mixers=aligned, gate_init=gate_init, **architecture
    )
    return student.float()


def trainable(student: HypeNetForCausalLM, settings: LossSettings) -> HypeNetForCausalLM:
    """Prepare a student for training in all its weights."""
    if settings.checkpoint_activations:
        student.activation_checkpointing_enable()
    if settings.compile_layers:
        for layer in student.model.layers:
            layer.compile()
    return student.requires_grad_(True).train()


def mixers(model: HypeNetForCausalLM) -> list[Mixer]:
    """Return the token mixer of every layer."""
    return [cast(Mixer, layer.self_attn) for layer in model.model.layers]


def run_mixer(
    mixer: nn.Module,
    x_BTD: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Run one mixer of a HypeNet on hidden states [B, T, D]."""
    return mixer(x_BTD, MixerContext(position_embeddings=position_embeddings, cu_seqlens=cu_seqlens))


def hidden_states(model: PreTrainedModel, batch: Batch, isolate_documents: bool = False) -> Tensor:
    """Compute the hidden states after the final norm, [B, T, D].

    Isolated documents run as one packed sequence whose positions restart at each document; both model classes
    separate documents by that.
    """
    ids = batch.input_ids
    options: dict[str, Tensor] = {}
    if isolate_documents:
        ids = ids.view(1, -1)
        options["position_ids"] = packed_positions(batch.cu_seqlens(), ids.numel())
    hidden = model.base_model(input_ids=ids, use_cache=False, **options).last_hidden_state
    return hidden.view(*batch.input_ids.shape, -1)


@contextmanager
def observed_attention(teacher: PreTrainedModel, observe: Callable[[int, AttentionCall], None]) -> Iterator[None]:
    """Inside the context, call `observe(layer, call)` after each attention layer of the teacher has run."""

    def hook_of(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            observe(layer, AttentionCall(x, output[0], kwargs["position_embeddings"]))

        return hook

    layers = cast(Any, teacher).model.layers
    handles = [
        block.self_attn.register_forward_hook(hook_of(layer), with_kwargs=True) for layer, block in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(teacher: PreTrainedModel, attention: Mapping[int, nn.Module]) -> Iterator[None]:
    """Replace the attention of some layers of the teacher inside the context, without copying weights.

    Args:
        teacher: A model of transformers; its own modules are put back.
        attention: By layer, modules that are called as the teacher's attention is.
    """
    layers = cast(Any, teacher).model.layers
    originals = {layer: layers[layer].self_attn for layer in attention}
    try:
        for layer, module in attention.items():
            layers[layer].self_attn = module
        yield
    finally:
        for layer, module in originals.items():
            layers[layer].self_attn = module


def set_logit_scale_base(model: PreTrainedModel, base: float | None) -> None:
    """Set the base `a` of the HyPE scale of a HypeNet's softmax layers; None for no scale."""
    model.config.attn_logits_scaling = hype_logits_scaling(base)


def set_saved_scale_base(folder: Path, base: float | None) -> None:
    """Set the base of a HypeNet that is saved in a folder."""
    config = HypeNetConfig.from_pretrained(folder)
    config.attn_logits_scaling = hype_logits_scaling(base)
    config.save_pretrained(folder)
