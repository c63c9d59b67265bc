"""HypeNet in vLLM: hypenet's own layers, with their states and their keys and values in vLLM's paged cache.

vLLM holds one state [H, D, D] per sequence and recurrent layer in the blocks of its hybrid cache, and keys and values
in blocks of the same size. A batch is one row of T tokens: first the sequences that decode, one token each, then whole
or partial prompts. The recurrences read and update vLLM's blocks in place (`state_indices`); softmax layers scale the
query by HyPE's s_t, call vLLM's attention, and apply their output gate.

Not supported: tensor and pipeline parallelism, speculative decoding, LoRA. torch.compile is not used; decode steps can
be recorded as full CUDA graphs.

What has run: vLLM 0.32.0 on the CPU in float32 (tests/test_vllm.py). What has not: any GPU, and with it CUDA graphs and
the attention backends of GPUs; quantized weights.

C hidden size, H heads, HK key-value heads, D head dimension, T tokens.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import LlamaConfig
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.v1.attention.backends.linear_attn import LinearAttentionBackend, LinearAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor, split_decodes_and_prefills

from hypenet.cache_layers import Recurrence
from hypenet.configuration_hypenet import SOFTMAX, HypeNetConfig
from hypenet.context import MixerContext
from hypenet.mixers import MIXERS, HypeNetResidualRMSNorm, HypeNetRMSNorm, SoftmaxAttention
from hypenet.modeling_hypenet import HypeNetMLP, rotary_embedding

NULL_BLOCK = 0  # vLLM never gives this block to a sequence; tables are padded with it
STATE_DTYPE = torch.float32


@dataclass
class StateMetadata:
    """Where the recurrent layers of one group find the states of a batch.

    Attributes:
        num_decodes: Sequences with one token, which come first.
        decode_slots: int32 [num_decodes], their blocks; -1 for rows of padding, which are skipped.
        prefill_start: The first token of the others.
        prefill_slots: int32 [N], the blocks of the N others.
        cu_seqlens: int32 [N + 1], their bounds, from `prefill_start` on.
        new_blocks: int64 [N], the blocks of those that begin, in which vLLM leaves what was there; for the rest of the
            N the null block. None if none begins.
    """

    num_decodes: int
    decode_slots: torch.Tensor
    prefill_start: int
    prefill_slots: torch.Tensor
    cu_seqlens: torch.Tensor
    new_blocks: torch.Tensor | None


class StateMetadataBuilder(LinearAttentionMetadataBuilder):
    """Builds the metadata of a batch, once for all layers of a group.

    Args:
        kv_cache_spec, layer_names, vllm_config, device: As vLLM passes them.
    """

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # CUDA graphs read the slots of decode steps at this address.
        largest = vllm_config.scheduler_config.max_num_seqs
        self.decode_slots = torch.full((largest,), -1, dtype=torch.int32, device=device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> StateMetadata:
        """Return the metadata of a batch, without waiting for the device."""
        batch = common_attn_metadata
        lengths = batch.query_start_loc_cpu.diff()
        # A prompt's first token counts as a prefill even if it comes alone: a decode step would read an old state.
        begins = (lengths > 0) & (batch.seq_lens_cpu_upper_bound <= lengths)
        if batch.is_prefilling is not None:
            begins &= batch.is_prefilling
        num_decodes, num_prefills, prefill_start, _ = split_decodes_and_prefills(
            batch.replace(is_prefilling=begins), decode_threshold=1, treat_short_extends_as_decodes=False
        )
        mode = self.vllm_config.cache_config.mamba_cache_mode
        table = mamba_get_block_table_tensor(batch.block_table_tensor, batch.seq_lens, self.kv_cache_spec, mode)
        blocks = table[:, 0]
        slots = torch.where((blocks != NULL_BLOCK) & (batch.seq_lens > 0), blocks, -1)
        decode_slots = slots[:num_decodes]
        if num_decodes <= len(self.decode_slots):
            decode_slots = self.decode_slots[:num_decodes].copy_(decode_slots)
        new_blocks = None
        if num_prefills > 0 and bool(begins.any()):
            is_new = batch.seq_lens <= batch.query_start_loc.diff()
            new_blocks = torch.where(is_new, blocks, NULL_BLOCK)[num_decodes:].long()
        return StateMetadata(
            num_decodes=min(num_decodes, prefill_start),
            decode_slots=decode_slots[:prefill_start],
            prefill_start=prefill_start,
            prefill_slots=slots[num_decodes:],
            cu_seqlens=batch.query_start_loc[num_decodes:] - prefill_start,
            new_blocks=new_blocks,
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> StateMetadata:
        """Return the metadata of a batch to be recorded, whose lengths are made up: all of it decodes."""
        continues = torch.zeros(common_attn_metadata.num_reqs, dtype=torch.bool)
        return self.build(0, common_attn_metadata.replace(is_prefilling=continues))


class StateBackend(LinearAttentionBackend):
    """Tells vLLM who builds the metadata of the recurrent layers."""

    @staticmethod
    def get_name() -> str:
        """Return the name that vLLM logs."""
        return "HYPENET_STATE"

    @staticmethod
    def get_builder_cls() -> type[StateMetadataBuilder]:
        """Return the class of the builder."""
        return StateMetadataBuilder


class PagedState(MambaBase):
    """The states of one recurrent layer, in the blocks of vLLM's cache.

    Args:
        shape: H, D, D.
        vllm_config: vLLM's configuration, in which the layer is entered.
        prefix: The layer's name.

    Raises:
        ValueError: If there is a layer of this name.
    """

    def __init__(self, shape: tuple[int, int, int], vllm_config: VllmConfig, prefix: str) -> None:
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"PagedState: prefix must be new, got {prefix!r} again")
        layers[prefix] = self
        self.shape, self.prefix = shape, prefix
        self.kv_cache: tuple[torch.Tensor, ...] = ()

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """Return the kind of cache."""
        return MambaAttentionBackendEnum.LINEAR

    def get_state_shape(self) -> tuple[tuple[int, int, int]]:
        """Return the shapes of what is stored for each sequence."""
        return (self.shape,)

    def get_state_dtype(self) -> tuple[torch.dtype]:
        """Return the dtypes of what is stored for each sequence."""
        return (STATE_DTYPE,)

    def get_attn_backend(self) -> type[StateBackend]:
        """Return the backend."""
        return StateBackend

    def recur(self, run: Recurrence) -> torch.Tensor:
        """Run a recurrence over the tokens [1, T, ...] of a batch and return its output [1, T, H, D].

        The states of the batch's sequences are read and updated. Tokens of padding, and all tokens while vLLM measures
        memory, when there is no cache, give 0.
        """
        metadata = get_forward_context().attn_metadata
        batch: StateMetadata | None = None if metadata is None else metadata.get(self.prefix)
        if batch is None:
            return torch.zeros_like(run.inputs[2])
        (pool,) = self.kv_cache
        decodes, start = batch.num_decodes, batch.prefill_start
        parts = []
        if decodes > 0:
            inputs = (x[0, :decodes, None] for x in run.inputs)
            parts.append(run.step(*inputs, state=pool, state_indices=batch.decode_slots).transpose(0, 1))
        if len(batch.prefill_slots) > 0:
            if batch.new_blocks is not None:
                pool.index_fill_(0, batch.new_blocks, 0)
            inputs = (x[:, start:] for x in run.inputs)
            where: dict[str, Any] = {"state_indices": batch.prefill_slots, "cu_seqlens": batch.cu_seqlens}
            parts.append(run.chunk(*inputs, initial_state=pool, output_final_state=True, **where)[0])
        done = sum(x.shape[1] for x in parts)
        if done < run.tokens:
            parts.append(torch.zeros_like(run.inputs[2][:, done:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@dataclass
class PagedContext(MixerContext):
    """What mixers receive in vLLM.

    Attributes:
        states: The states of recurrent layers by the layer's index.
        logit_scale: s_t of HyPE, float32 [1, T, 1, 1]; None: no scale.
    """

    states: dict[int, PagedState] = field(default_factory=dict)
    logit_scale: torch.Tensor | None = None

    def recur(self, layer_idx: int, run: Recurrence) -> torch.Tensor:
        """Run the recurrence of layer `layer_idx` on vLLM's states and return its output [1, T, H, D]."""
        return self.states[layer_idx].recur(run)


class PagedSoftmaxAttention(SoftmaxAttention):
    """Softmax attention whose keys and values are in vLLM's cache.

    Args:
        config: The model's configuration.
        layer_idx: Index of the layer.
        vllm_config: vLLM's configuration.
        prefix: The layer's name.
    """

    def __init__(self, config: HypeNetConfig, layer_idx: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(config, layer_idx)
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5 * config.logit_scale_constant,
            num_kv_heads=self.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
        )

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor | None, context: MixerContext
    ) -> torch.Tensor:
        """Store k and v [1, T, HK, D] in vLLM's cache, and return the gated output [1, T, H, D]."""
        scale = cast(PagedContext, context).logit_scale
        if scale is not None:
            q = (q * scale).to(q.dtype)
        o: torch.Tensor = self.attn(*(x[0].flatten(1) for x in (q, k, v))).view_as(q)
        return o if gate is None else o * gate.sigmoid()


class HypeNetLayer(nn.Module):
    """One pre-norm layer: H = X + Mixer(RMSNorm(X)); Y = H + MLP(RMSNorm(H)).

    Args:
        config: The model's configuration.
        layer_idx: Index of the layer.
        vllm_config: vLLM's configuration.
        prefix: The layer's name.

    Attributes:
        state: The states of a recurrent layer; None in a softmax layer.
    """

    def __init__(self, config: HypeNetConfig, layer_idx: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        mixer, name = config.mixers[layer_idx], f"{prefix}.self_attn"
        self.state: PagedState | None = None
        if mixer == SOFTMAX:
            self.self_attn: nn.Module = PagedSoftmaxAttention(config, layer_idx, vllm_config, name)
        else:
            self.self_attn = MIXERS[mixer](config, layer_idx)
            self.state = PagedState(state_shape(config, mixer), vllm_config, name)
        self.mlp = HypeNetMLP(cast(LlamaConfig, config))
        self.input_layernorm = HypeNetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = HypeNetResidualRMSNorm(config.hidden_size, config.rms_norm_eps)
        use_vllm_linears(self, vllm_config, prefix)

    def forward(self, x_BTC: torch.Tensor, context: PagedContext) -> torch.Tensor:
        """Apply mixer and MLP to x [1, T, C]."""
        mixed_BTC = self.self_attn(self.input_layernorm(x_BTC), context)
        x_BTC, y_BTC = self.post_attention_layernorm(mixed_BTC, x_BTC)
        y_BTC = self.mlp(y_BTC)
        return x_BTC + y_BTC


class HypeNetModel(nn.Module):
    """The decoder without the language-model head.

    Args:
        config: The model's configuration.
        vllm_config: vLLM's configuration.
        prefix: The name of this module.
    """

    def __init__(self, config: HypeNetConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.logit_scale_base = config.logit_scale_base
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            HypeNetLayer(config, i, vllm_config, f"{prefix}.layers.{i}") for i in range(config.num_hidden_layers)
        )
        self.norm = HypeNetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = rotary_embedding(config)
        layers = cast(Iterable[HypeNetLayer], self.layers)
        self.states = {i: layer.state for i, layer in enumerate(layers) if layer.state is not None}

    def forward(self, x_TC: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the hidden states [T, C] after the final norm, of embedded tokens x [T, C] at positions int64 [T]."""
        x_BTC = x_TC[None]
        context = PagedContext(self.rotary_emb(x_BTC, positions[None]), states=self.states)
        if (base := self.logit_scale_base) is not None:
            scale = torch.log(positions.float() + base) / torch.log(torch.tensor(base, dtype=torch.float32))
            context.logit_scale = scale.view(1, -1, 1, 1)
        for layer in self.layers:
            x_BTC = layer(x_BTC, context)
        hidden_BTC: torch.Tensor = self.norm(x_BTC)
        return hidden_BTC[0]


class HypeNetForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """The decoder with a language-model head, as vLLM runs it.

    Args:
        vllm_config: vLLM's configuration; the model's is in it.
        prefix: The name of this module.

    Raises:
        ValueError: If vLLM is configured for something that this model does not support.
    """

    # Files have the decay's parameters in the mixer itself.
    weight_names: ClassVar[dict[str, str]] = {
        f".self_attn.{name}": f".self_attn.decay_bias.{name}" for name in ("A_log", "dt_bias")
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        check_support(vllm_config)
        config: HypeNetConfig = vllm_config.model_config.hf_config
        self.config, self.quant_config = config, vllm_config.quant_config
        self.model = HypeNetModel(config, vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [T, C] of input_ids int64 [T]."""
        return cast(torch.Tensor, self.model.embed_tokens(input_ids))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the hidden states [T, C] of the tokens of a batch.

        Args:
            input_ids: int64 [T], in the order of vLLM's batch.
            positions: int64 [T], counted in each sequence.
            intermediate_tensors: None, since all layers are in one process.
            inputs_embeds: [T, C], in place of input_ids.
            kwargs: Ignored.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(cast(torch.Tensor, input_ids))
        return cast(torch.Tensor, self.model(inputs_embeds, positions))

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return the logits [N, vocabulary] of hidden states [N, C]."""
        return cast("torch.Tensor | None", self.logits_processor(self.lm_head, hidden_states))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load weights by their names in hypenet's files or in published ones, and return the names of those here."""
        decays = {name: x for name, x in self.named_buffers() if name.endswith(".log_decay")}

        def parameters() -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in weights:
                if name in decays:  # a buffer, which vLLM's loader does not load
                    decays[name].copy_(weight)
                else:
                    yield name, weight

        names = WeightsMapper(orig_to_new_substr=self.weight_names)
        loaded: set[str] = AutoWeightsLoader(self).load_weights(parameters(), mapper=names)
        return loaded | set(decays)  # published files have no decays: they mean the default

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, int, int]]:
        """Return the shape of the largest state, for which vLLM sizes its blocks."""
        config: HypeNetConfig = vllm_config.model_config.hf_config
        shapes = [state_shape(config, mixer) for mixer in config.mixers if mixer != SOFTMAX]
        return (max(shapes, key=lambda shape: shape[0] * shape[1] * shape[2]),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype]:
        """Return the dtype of a state."""
        return (STATE_DTYPE,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """Return how vLLM copies a state from block to block, for its prefix cache."""
        return cast(tuple[Any, ...], MambaStateCopyFuncCalculator.linear_attention_state_copy_func())


def state_shape(config: HypeNetConfig, mixer: str) -> tuple[int, int, int]:
    """Return the shape H, D, D of one sequence's state in the recurrent layers of kind `mixer`."""
    heads, _, head_dim = config.head_sizes(mixer)
    return heads, head_dim, head_dim


def use_vllm_linears(module: nn.Module, vllm_config: VllmConfig, prefix: str) -> None:
    """Replace the linear layers inside `module` by vLLM's, which know its quantization; names stay as they are."""
    for name, child in list(module.named_children()):
        path = f"{prefix}.{name}"
        if type(child) is nn.Linear:
            options: dict[str, Any] = {"quant_config": vllm_config.quant_config, "prefix": path, "return_bias": False}
            linear = ReplicatedLinear(child.in_features, child.out_features, bias=child.bias is not None, **options)
            setattr(module, name, linear)
        else:
            use_vllm_linears(child, vllm_config, path)


def check_support(vllm_config: VllmConfig) -> None:
    """Raise ValueError if vLLM is configured for something that HypeNet does not support."""
    config: HypeNetConfig = vllm_config.model_config.hf_config
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    rules = [
        ("tensor_parallel_size", "be 1", parallel.tensor_parallel_size, parallel.tensor_parallel_size == 1),
        ("pipeline_parallel_size", "be 1", parallel.pipeline_parallel_size, parallel.pipeline_parallel_size == 1),
        ("speculative_config", "be None", vllm_config.speculative_config, vllm_config.speculative_config is None),
        ("mixer_types", f"have a layer of {SOFTMAX!r}", config.mixers, bool(config.softmax_layers)),
    ]
    for name in ("mamba_cache_dtype", "mamba_ssm_cache_dtype"):
        value = getattr(cache, name)
        rules.append((name, "be 'auto' or 'float32'", value, value in ("auto", "float32")))
    for name, rule, value, holds in rules:
        if not holds:
            raise ValueError(f"HypeNetForCausalLM (vLLM): {name} must {rule}, got {value!r}")
