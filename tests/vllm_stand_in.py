"""A stand-in for the parts of vLLM that hypenet.integrations.vllm uses, after the interfaces of vLLM 0.32 and 0.33.

It has the names, the signatures and the layout of memory; nothing else. Attention is torch's, in float64, so that a
test sees the errors of the plugin alone.
"""

import re
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from enum import Enum
from math import prod
from types import ModuleType, SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

FORWARD_CONTEXT = SimpleNamespace(attn_metadata=None)
VOCABULARY_PADDING = 64


@dataclass
class CommonAttentionMetadata:
    query_start_loc: torch.Tensor  # int32 [N + 1]
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor  # int32 [N], with the tokens of this batch
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    block_table_tensor: torch.Tensor  # int32 [N, blocks of a sequence]
    is_prefilling: torch.Tensor | None = None
    seq_lens_cpu_upper_bound: torch.Tensor | None = None

    def replace(self, **fields):
        return replace(self, **fields)


class MambaBase(ABC):
    @abstractmethod
    def get_state_shape(self): ...

    @abstractmethod
    def get_state_dtype(self): ...

    @property
    @abstractmethod
    def mamba_type(self): ...

    def bind_kv_cache(self, kv_cache):
        """Divide int8 pages [blocks, 1, 1, bytes] into the states of the layer, which start each page."""
        pages, offset, states = kv_cache.squeeze((1, 2)), 0, []
        for shape, dtype in zip(self.get_state_shape(), self.get_state_dtype(), strict=True):
            size = prod(shape) * dtype.itemsize
            states.append(pages[:, offset : offset + size].view(dtype).view(-1, *shape))
            offset += size
        self.kv_cache = tuple(states)


class MambaAttentionBackendEnum(Enum):
    LINEAR = "linear"


class LinearAttentionBackend:
    pass


class LinearAttentionMetadataBuilder:
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.kv_cache_spec, self.layer_names, self.vllm_config, self.device = (
            kv_cache_spec,
            layer_names,
            vllm_config,
            device,
        )


def mamba_get_block_table_tensor(block_table, seq_lens, kv_cache_spec, mamba_cache_mode):
    """Return the blocks of the states: the table itself, or in mode "align" the column of the last token."""
    if mamba_cache_mode == "none":
        return block_table
    column = ((seq_lens - 1) // kv_cache_spec.block_size).clamp(min=0)
    return block_table.gather(1, column[:, None].long())


def split_decodes_and_prefills(batch, decode_threshold=1, require_uniform=False, treat_short_extends_as_decodes=True):
    """Return (decodes, prefills, tokens of decodes, tokens of prefills) of a batch whose decodes come first."""
    assert not require_uniform and not treat_short_extends_as_decodes
    prefill = (batch.query_start_loc_cpu.diff() > decode_threshold) | batch.is_prefilling
    decodes = int(prefill.int().argmax()) if prefill.any() else batch.num_reqs
    start = int(batch.query_start_loc_cpu[decodes]) if prefill.any() else batch.num_actual_tokens
    return decodes, batch.num_reqs - decodes, start, batch.num_actual_tokens - start


class Attention(nn.Module):
    def __init__(
        self, num_heads, head_size, scale, num_kv_heads=None, *, cache_config=None, quant_config=None, prefix=""
    ):
        super().__init__()
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_kv_heads
        self.prefix = prefix
        VLLM_CONFIG.compilation_config.static_forward_context[prefix] = self

    def forward(self, query, key, value):
        """Attend to the keys in kv_cache [blocks, tokens, 2, HK, D], of which a sequence has one block."""
        batch = FORWARD_CONTEXT.attn_metadata[self.prefix]
        q, kv = query.view(-1, self.num_heads, self.head_size), torch.stack((key, value), 1)
        kv, output = kv.view(-1, 2, self.num_kv_heads, self.head_size), torch.zeros_like(query)
        bounds = batch.query_start_loc_cpu.tolist()
        for start, stop, length, block in zip(
            bounds[:-1], bounds[1:], batch.seq_lens.tolist(), batch.block_table_tensor[:, 0].tolist(), strict=True
        ):
            past = length - (stop - start)
            self.kv_cache[block, past:length] = kv[start:stop]
            keys, values = self.kv_cache[block, :length].unbind(1)
            mask = torch.ones(stop - start, length, dtype=torch.bool).tril(past)
            o = F.scaled_dot_product_attention(
                *(x.double().transpose(0, 1) for x in (q[start:stop], keys, values)),
                attn_mask=mask,
                scale=self.scale,
                enable_gqa=True,
            )
            output[start:stop] = o.transpose(0, 1).flatten(1)
        return output


class ReplicatedLinear(nn.Linear):
    def __init__(self, input_size, output_size, bias=True, *, quant_config=None, prefix="", return_bias=True):
        super().__init__(input_size, output_size, bias)
        assert not return_bias
        self.prefix = prefix


class VocabParallelEmbedding(nn.Module):
    def __init__(self, num_embeddings, embedding_dim, *, quant_config=None, prefix=""):
        super().__init__()
        self.rows = num_embeddings
        padded = -(-num_embeddings // VOCABULARY_PADDING) * VOCABULARY_PADDING
        self.weight = nn.Parameter(torch.full((padded, embedding_dim), torch.nan), requires_grad=False)
        self.weight.weight_loader = self.load

    def load(self, parameter, loaded):
        assert loaded.shape[0] == self.rows
        parameter.data[: self.rows] = loaded
        parameter.data[self.rows :] = 0

    def forward(self, ids):
        return F.embedding(ids, self.weight)


class ParallelLMHead(VocabParallelEmbedding):
    def tie_weights(self, embed_tokens):
        self.weight = embed_tokens.weight
        return self


class LogitsProcessor(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, lm_head, hidden_states):
        return F.linear(hidden_states, lm_head.weight)[:, : self.vocab_size]


@dataclass
class WeightsMapper:
    orig_to_new_substr: dict

    def map_name(self, name):
        for old, new in self.orig_to_new_substr.items():
            name = name.replace(old, new)
        return name


class AutoWeightsLoader:
    def __init__(self, module):
        self.module = module

    def load_weights(self, weights, *, mapper=None):
        """Load by name, once where two names share a parameter, and return the names."""
        parameters, loaded = dict(self.module.named_parameters()), set()
        shared = dict(self.module.named_parameters(remove_duplicate=False)).keys() - parameters.keys()
        for name, weight in weights:
            name = name if mapper is None else mapper.map_name(name)
            if name in shared:
                continue
            if name not in parameters:
                raise ValueError(f"There is no module or parameter named {name!r}")
            parameter = parameters[name]
            loader = getattr(parameter, "weight_loader", lambda parameter, loaded: parameter.data.copy_(loaded))
            loader(parameter, weight)
            loaded.add(name)
        return loaded


class ModelRegistry:
    models: dict = {}  # noqa: RUF012

    @classmethod
    def register_model(cls, model_arch, model_cls):
        cls.models[model_arch] = model_cls


def copy_state(state, block_ids, cur_block_idx, num_accepted_tokens):
    """Stand for the function that says which memory of a state is copied."""


MODULES = {
    "": {"ModelRegistry": ModelRegistry},
    "config": {"VllmConfig": SimpleNamespace},
    "forward_context": {"get_forward_context": lambda: FORWARD_CONTEXT},
    "model_executor.layers.attention": {"Attention": Attention},
    "model_executor.layers.linear": {"ReplicatedLinear": ReplicatedLinear},
    "model_executor.layers.logits_processor": {"LogitsProcessor": LogitsProcessor},
    "model_executor.layers.mamba.abstract": {"MambaBase": MambaBase},
    "model_executor.layers.mamba.mamba_utils": {
        "MambaStateCopyFuncCalculator": SimpleNamespace(linear_attention_state_copy_func=lambda: (copy_state,))
    },
    "model_executor.layers.vocab_parallel_embedding": {
        "ParallelLMHead": ParallelLMHead,
        "VocabParallelEmbedding": VocabParallelEmbedding,
    },
    "model_executor.models.interfaces": {"HasInnerState": type("HasInnerState", (), {}), "IsHybrid": type("I", (), {})},
    "model_executor.models.utils": {
        "AutoWeightsLoader": AutoWeightsLoader,
        "WeightsMapper": WeightsMapper,
        "maybe_prefix": lambda prefix, name: f"{prefix}.{name}" if prefix else name,
    },
    "v1.attention.backends.linear_attn": {
        "LinearAttentionBackend": LinearAttentionBackend,
        "LinearAttentionMetadataBuilder": LinearAttentionMetadataBuilder,
    },
    "v1.attention.backends.registry": {"MambaAttentionBackendEnum": MambaAttentionBackendEnum},
    "v1.attention.backends.utils": {
        "mamba_get_block_table_tensor": mamba_get_block_table_tensor,
        "split_decodes_and_prefills": split_decodes_and_prefills,
    },
}


def vllm_config(config, mode="none", **fields):
    """Return the fields of vLLM's configuration that the model reads, and make them the current ones."""
    global VLLM_CONFIG
    VLLM_CONFIG = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config),
        cache_config=SimpleNamespace(
            mamba_cache_mode=mode, mamba_cache_dtype="auto", mamba_ssm_cache_dtype="auto", block_size=16
        ),
        compilation_config=SimpleNamespace(static_forward_context={}),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        quant_config=None,
        speculative_config=None,
    )
    for name, value in fields.items():
        owner, _, field = name.rpartition("__")
        setattr(getattr(VLLM_CONFIG, owner) if owner else VLLM_CONFIG, field, value)
    return VLLM_CONFIG


def install(monkeypatch):
    """Make `import vllm` find the stand-in, and forget a plugin that was imported with another."""
    for name, contents in MODULES.items():
        parts = name.split(".") if name else []
        for depth in range(len(parts) + 1):
            path = ".".join(["vllm", *parts[:depth]])
            if not isinstance(sys.modules.get(path), StandIn):
                monkeypatch.setitem(sys.modules, path, StandIn(path))
        vars(sys.modules[path]).update(contents)
    for name in [name for name in sys.modules if re.fullmatch(r"hypenet\.integrations\.vllm", name)]:
        monkeypatch.delitem(sys.modules, name)


class StandIn(ModuleType):
    __path__: list = []  # noqa: RUF012 a package
