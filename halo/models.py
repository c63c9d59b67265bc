"""Everything the conversion does to models: load, build twins and hybrids, record and swap layers, set the scale.

B sequences, T tokens, D hidden size. A teacher is transformers' Qwen3ForCausalLM; a twin model is a HypeNet that is
recurrent in every layer; a student is a HypeNet with some softmax layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3ForCausalLM,
)

from halo.config import HaloError
from halo.data import Batch
from hypenet import HypeNetForCausalLM, MixerContext, from_qwen3
from hypenet.configuration_hypenet import hype_logits_scaling
from hypenet.conversion import check_teacher
from hypenet.mixers import Mixer


@dataclass
class AttentionCall:
    """One attention layer's input and output [B, T, D] in a forward pass, and the cos and sin it got."""

    x_BTD: Tensor
    y_BTD: Tensor
    position_embeddings: tuple[Tensor, Tensor]


def load_teacher(name: str, device: torch.device) -> Qwen3ForCausalLM:
    """The Qwen3ForCausalLM in fp32 of a directory, a Hugging Face name, or "demo": the one that ships."""
    with _teacher_errors(name):
        check_teacher(_qwen3_config(name))
        teacher = Qwen3ForCausalLM.from_pretrained(_teacher_path(name), dtype=torch.float32)
    teacher.to(device)  # type: ignore[arg-type]  # transformers wraps Module.to without its types
    return teacher


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a teacher."""
    with _teacher_errors(name):
        vocabulary = _qwen3_config(name).vocab_size
        tokenizer = AutoTokenizer.from_pretrained(_teacher_path(name))
    if not 256 <= len(tokenizer) <= vocabulary:
        raise HaloError(
            f"teacher: must come with its tokenizer of at most {vocabulary} tokens, got {len(tokenizer)} in {name}"
        )
    return tokenizer


def load_hypenet(directory: Path, device: torch.device) -> HypeNetForCausalLM:
    """A HypeNet of an earlier stage, in fp32."""
    model = HypeNetForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.to(device)  # type: ignore[arg-type]
    return model


def make_twins(teacher: Qwen3ForCausalLM, mixer: str) -> HypeNetForCausalLM:
    """The weight transfer (HALO, 4.1): a HypeNet whose every layer is the recurrent twin of the teacher's."""
    return from_qwen3(teacher, keep_layers=[], mixer=mixer)


def make_student(
    teacher: Qwen3ForCausalLM, twins: HypeNetForCausalLM, layers: list[int], mixer: str, gate_init: str
) -> HypeNetForCausalLM:
    """The hybrid of stage 2: attention (no position encoding, gated) in `layers`, the twins' own mixers elsewhere."""
    aligned = {layer: twin for layer, twin in enumerate(mixers(twins)) if layer not in layers}
    return from_qwen3(teacher, keep_layers=layers, mixer=mixer, mixers=aligned, gate_init=gate_init)


def mixers(model: HypeNetForCausalLM) -> list[Mixer]:
    """The token mixer of every layer of a HypeNet."""
    return [cast(Mixer, layer.self_attn) for layer in model.model.layers]


def run_mixer(
    mixer: nn.Module,
    x_BTD: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A mixer of a HypeNet on its own."""
    return mixer(x_BTD, MixerContext(position_embeddings=position_embeddings, cu_seqlens=cu_seqlens))


def hidden_states(model: PreTrainedModel, batch: Batch, isolate_documents: bool = False) -> Tensor:
    """The last hidden states, after the final norm [B, T, D].

    Isolated documents run as one packed sequence whose positions restart with every document; both model classes keep
    such documents apart.
    """
    ids = batch.input_ids
    options: dict[str, Tensor] = {}
    if isolate_documents:
        ids = ids.view(1, -1)
        options["position_ids"] = document_positions(batch)
    hidden = model.base_model(input_ids=ids, use_cache=False, **options).last_hidden_state
    return hidden.view(*batch.input_ids.shape, -1)


def document_positions(batch: Batch) -> Tensor:
    """Each token's place in its document, of the flattened batch, int64 [1, B * T]."""
    cu_seqlens = batch.cu_seqlens().long()
    total = batch.input_ids.numel()
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=total)
    return (torch.arange(total, device=starts.device) - starts)[None]


@contextmanager
def recorded_attention(teacher: Qwen3ForCausalLM) -> Iterator[list[AttentionCall]]:
    """Inside, a forward of the teacher leaves one AttentionCall a layer in the list."""
    calls: list[AttentionCall] = []

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        calls.append(AttentionCall(x, output[0], kwargs["position_embeddings"]))

    handles = [layer.self_attn.register_forward_hook(record, with_kwargs=True) for layer in teacher.model.layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def swapped(teacher: Qwen3ForCausalLM, twins: HypeNetForCausalLM, layer: int) -> Iterator[None]:
    """Inside, layer `layer` of the teacher runs on its recurrent twin; nothing is copied."""
    block = teacher.model.layers[layer]
    original = block.self_attn
    block.self_attn = _TwinAttention(mixers(twins)[layer])
    try:
        yield
    finally:
        block.self_attn = original


def set_logit_scale_base(model: PreTrainedModel, base: float | None) -> None:
    """The `a` of the HyPE scale of a HypeNet's softmax layers; None for no scale."""
    model.config.attn_logits_scaling = hype_logits_scaling(base)


class _TwinAttention(nn.Module):
    """A recurrent mixer in the calling convention of Qwen3Attention, for a forward without cache or padding."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if past_key_values is not None:
            raise NotImplementedError("swapped: the cache must be off, got past_key_values")
        return run_mixer(self.mixer, hidden_states, position_embeddings), None


def _teacher_path(name: str) -> str:
    return str(resources.files("halo") / "demo" / "teacher") if name == "demo" else name


def _qwen3_config(name: str) -> PreTrainedConfig:
    is_path = name.startswith((".", "/")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise HaloError(f"teacher: must be an existing directory or a Hugging Face name, got {name}")
    config = AutoConfig.from_pretrained(_teacher_path(name))
    if config.model_type != "qwen3":
        raise HaloError(f"teacher: must be a Qwen3 model (model_type qwen3), got {config.model_type} in {name}")
    return config


@contextmanager
def _teacher_errors(name: str) -> Iterator[None]:
    """What transformers raises for a model that cannot be loaded, as one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise HaloError(f"teacher: must be a loadable Qwen3 model with its tokenizer, got {name} ({reason})") from None
