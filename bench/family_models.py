"""Build random models of the families that `patch_transformers` reaches, of any size."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Size:
    """The dimensions that all families have. Every fourth layer is attention, the others are recurrent."""

    layers: int = 4
    hidden: int = 64
    head_dim: int = 16
    heads: int = 4
    key_heads: int = 2
    value_heads: int = 4
    key_dim: int = 16
    intermediate: int = 64
    vocabulary: int = 96
    chunk: int = 16

    @property
    def value_dim(self) -> int:
        return 2 * self.hidden // self.value_heads

    @property
    def layer_types(self) -> list[str]:
        return ["linear_attention" if (i + 1) % 4 else "full_attention" for i in range(self.layers)]


TINY = Size()


def gated_delta(size: Size) -> dict[str, Any]:
    return {
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads // 2,
        "head_dim": size.head_dim,
        "intermediate_size": size.intermediate,
        "vocab_size": size.vocabulary,
        "linear_num_key_heads": size.key_heads,
        "linear_num_value_heads": size.value_heads,
        "linear_key_head_dim": size.key_dim,
        "linear_value_head_dim": size.value_dim,
        "layer_types": size.layer_types,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def experts(size: Size) -> dict[str, Any]:
    return {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": size.intermediate // 2,
        "shared_expert_intermediate_size": size.intermediate // 2,
    }


def mamba2(size: Size) -> dict[str, Any]:
    return {
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads // 2,
        "intermediate_size": size.intermediate,
        "vocab_size": size.vocabulary,
        "mamba_n_heads": size.value_heads,
        "mamba_n_groups": size.key_heads,
        "mamba_d_state": size.key_dim,
        "mamba_expand": 2,
        "mamba_chunk_size": size.chunk,
    }


def nemotron_h(size: Size) -> dict[str, Any]:
    arguments = mamba2(size) | {
        "layer_types": ["linear_attention", "mlp", "full_attention", "linear_attention", "moe"],
        "head_dim": size.head_dim,
        "ssm_state_size": size.key_dim,
        "mamba_num_heads": size.value_heads,
        "mamba_head_dim": size.value_dim,
        "n_groups": size.key_heads,
        "chunk_size": size.chunk,
        "n_routed_experts": 4,
        "moe_intermediate_size": size.intermediate // 2,
        "moe_shared_expert_intermediate_size": size.intermediate // 2,
    }
    return {name: value for name, value in arguments.items() if name not in ("num_hidden_layers", "mamba_d_state")}


FAMILIES: dict[str, Callable[[Size], dict[str, Any]]] = {
    "qwen3_next": lambda size: gated_delta(size) | experts(size),
    "qwen3_5_text": gated_delta,
    "qwen3_5_moe_text": lambda size: gated_delta(size) | experts(size),
    "olmo_hybrid": gated_delta,
    "qwen4_exp_text": lambda size: (
        gated_delta(size)
        | experts(size)
        | {
            "hc_count": 2,
            "hc_lowrank": 16,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": size.head_dim,
            "indexer_budget": 4096,
            "indexer_compress_ratio": 4,
        }
    ),
    "bamba": lambda size: mamba2(size) | {"attn_layer_indices": [2]},
    "falcon_h1": lambda size: mamba2(size) | {"mamba_d_ssm": 2 * size.hidden, "head_dim": size.head_dim},
    "granitemoehybrid": lambda size: (
        mamba2(size)
        | {
            "layer_types": size.layer_types,
            "num_local_experts": 4,
            "shared_intermediate_size": size.intermediate,
            "pad_token_id": 0,
        }
    ),
    "mamba2": lambda size: {
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "vocab_size": size.vocabulary,
        "num_heads": size.value_heads,
        "head_dim": size.value_dim,
        "n_groups": size.key_heads,
        "state_size": size.key_dim,
        "chunk_size": size.chunk,
        "initializer_range": 0.02,
    },
    "nemotron_h": nemotron_h,
    "zamba2": lambda size: {
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": size.intermediate,
        "vocab_size": size.vocabulary,
        "mamba_d_state": size.key_dim,
        "mamba_ngroups": size.key_heads,
        "n_mamba_heads": size.value_heads,
        "chunk_size": size.chunk,
        "layers_block_type": [kind.replace("full_attention", "hybrid") for kind in size.layer_types],
        "use_mem_rope": True,
        "adapter_rank": 8,
    },
}


def build(family: str, size: Size = TINY, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """Return a model of `family` (a model type of transformers) with random weights, in evaluation mode."""
    config = AutoConfig.for_model(family, **FAMILIES[family](size) | overrides)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):  # the initial decays forget everything within a few tokens
                parameter.copy_(torch.linspace(0.01, 0.3, parameter.numel()).log())
    return model
