"""HypeNet for transformers: a pre-norm decoder whose token mixers are softmax attention or a linear recurrence.

Source: "Hybrid Linear Attention Done Right", arXiv 2601.22156, section 3 and appendix A. Where the paper and its code
differ, this follows the code, so that published checkpoints give the same results. B batch, T tokens, C hidden size.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, LlamaConfig, PreTrainedModel
from transformers import initialization as init
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple, logging

from hypenet.cache import HypeNetCache
from hypenet.configuration_hypenet import HypeNetConfig
from hypenet.context import MAX_STEP_TOKENS, MixerContext
from hypenet.mixers import (
    MIXERS,
    HypeNetResidualRMSNorm,
    HypeNetRMSNorm,
    LightningAttention,
    LogDecay,
    Mixer,
    alibi_log_decay,
    cast_once,
    initial_decay,
)
from hypenet.packing import Packing, find_documents, packed_positions, read_mask, tracing
from hypenet_kernels import swiglu

logger = logging.get_logger(__name__)

# transformers 5.24 renamed the argument and the output past_key_values; calls may use either name.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class HypeNetMLP(LlamaMLP):
    """Llama's MLP, (act(x Wg) * x Wu) Wd, with one pass for activation and product if it is SiLU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the MLP to x [B, T, C]."""
        if self.config.hidden_act != "silu":
            return super().forward(x)
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class HypeNetDecoderLayer(GradientCheckpointingLayer):
    """One pre-norm layer: H = X + Mixer(RMSNorm(X)); Y = H + MLP(RMSNorm(H))."""

    def __init__(self, config: HypeNetConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn: Mixer = MIXERS[config.mixers[layer_idx]](config, layer_idx)
        self.mlp = HypeNetMLP(cast(LlamaConfig, config))
        self.input_layernorm = HypeNetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = HypeNetResidualRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTC: torch.Tensor, context: MixerContext) -> torch.Tensor:
        """Apply mixer and MLP to x [B, T, C]."""
        mixed_BTC = self.self_attn(self.input_layernorm(x_BTC), context)
        x_BTC, y_BTC = self.post_attention_layernorm(mixed_BTC, x_BTC)
        return x_BTC + self.mlp(cast_once(y_BTC))


class HypeNetPreTrainedModel(PreTrainedModel):
    """Base of the HypeNet models: what transformers needs to initialise, load and place them."""

    config: HypeNetConfig
    config_class = HypeNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HypeNetDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "log_decay"]
    _keys_to_ignore_on_load_missing = [r"\.log_decay$"]  # published checkpoints have none: they mean the default
    # Assisted generation would have to roll recurrent states back.
    _is_stateful = True

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing, as `HypeNetConfig.register_for_auto_class`."""

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """Accept the names that transformers and its hub of kernels have, and say that they change nothing."""
        name = attn_implementation
        if name is None or name == "eager":
            return "eager"
        if name not in ALL_ATTENTION_FUNCTIONS.valid_keys() and "/" not in name:
            raise ValueError(
                f"{type(self).__name__}: attn_implementation must be None or a name that transformers has, got {name!r}"
            )
        logger.warning_once(
            f"{type(self).__name__}: attn_implementation={name!r} has no effect: softmax layers have a position scale "
            "and an output gate, and always run on hypenet_kernels.hype_attention"
        )
        return "eager"

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LightningAttention):
            init.copy_(module.log_decay, alibi_log_decay(module.num_heads))
        elif isinstance(module, LogDecay):
            A_log, dt_bias = initial_decay(len(module.A_log), module.smallest)
            init.copy_(module.A_log, A_log)
            init.copy_(module.dt_bias, dt_bias)


class HypeNetModel(HypeNetPreTrainedModel):
    """The decoder without the language-model head.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: HypeNetConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(HypeNetDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = HypeNetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = rotary_embedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: HypeNetCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states after the final norm.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T] or [B, tokens in the cache + T], 0 where a token is padding, on any side, and 1 at
                real tokens, or integers that number the packed documents of a row. Padding does not change the
                results of the real tokens, and is computed only where the model is compiled or exported.
            position_ids: [B, T] for the rotary embedding; by default the real tokens of each sequence are counted.
                Positions that restart within a row separate packed documents, which cannot have a cache. Compiling
                breaks the graph to look at them, so that `fullgraph=True` and `torch.export` need `cu_seqlens`.
            past_key_values: Cache of the earlier tokens, also under transformers' newer name `cache`. A call that
                continues a cache computes no gradients.
            inputs_embeds: [B, T, C], in place of `input_ids`.
            use_cache: Whether to create and return a cache if none is given. Default `config.use_cache`, but False in
                training mode and in `torch.export`. A given cache is always used.
            cu_seqlens: int32 [N + 1] with B = 1: boundaries of N packed documents that do not see each other.
                transformers' name for it, `cu_seq_lens_q`, is accepted too.
            output_hidden_states: Whether to return the input of every layer and the output.
            output_attentions: Must not be True.
            kwargs: Ignored, except `cu_seq_lens_q` and `cache`.

        Returns:
            last_hidden_state [B, T, C], zero at padding; past_key_values (`cache` from transformers 5.24 on);
            hidden_states if requested.

        Raises:
            ValueError: If arguments contradict each other, or have the wrong shape or values.
            TypeError: If `past_key_values` is not a `HypeNetCache`.
            NotImplementedError: If `output_attentions` is True.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("HypeNetModel: exactly one of input_ids and inputs_embeds must be given")
        if output_attentions:
            raise NotImplementedError(
                "HypeNetModel: output_attentions must be False (the kernels never store the weights), got True"
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x_BTC = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, T = x_BTC.shape[:2]
        past_key_values = self._given_cache(past_key_values, kwargs.get("cache"))
        cu_seqlens = kwargs.get("cu_seq_lens_q") if cu_seqlens is None else cu_seqlens
        if cu_seqlens is None:
            context, packing = self._plan(x_BTC, attention_mask, position_ids, past_key_values, use_cache)
        else:
            if attention_mask is not None or past_key_values is not None or use_cache:
                raise ValueError("HypeNetModel: cu_seqlens must come without attention_mask and without a cache")
            context, packing = self._plan_documents(x_BTC, position_ids, cu_seqlens), None
        restore = self._restore(B, T, context, packing)
        x_BTC = x_BTC if packing is None else packing.pack(x_BTC)

        trace = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and context.past == 0):
            for layer in self.layers:
                if output_hidden_states:
                    trace.append(restore(x_BTC))
                x_BTC = layer(x_BTC, context)
            x_BTC = restore(self.norm(x_BTC))
        self._advance(context, T, packing)
        named: dict[str, Any] = {CACHE: context.cache}
        return BaseModelOutputWithPast(
            last_hidden_state=x_BTC,
            hidden_states=(*trace, x_BTC) if output_hidden_states else None,
            **named,
        )

    def swap_mixer(self, layer_idx: int, mixer: Mixer) -> Mixer:
        """Replace the mixer of one layer and update the configuration.

        Args:
            layer_idx: Index of the layer.
            mixer: The new mixer.

        Returns:
            The former mixer.

        Raises:
            ValueError: If `mixer` was built for another layer.
        """
        if mixer.layer_idx != layer_idx:
            raise ValueError(f"swap_mixer: mixer must be for layer {layer_idx}, got one for layer {mixer.layer_idx}")
        layer = cast(HypeNetDecoderLayer, self.layers[layer_idx])
        former, layer.self_attn = layer.self_attn, mixer
        mixers = list(self.config.mixers)
        mixers[layer_idx] = mixer.mixer_type
        self.config.set_mixer_types(mixers)
        return former

    @staticmethod
    def _given_cache(past_key_values: HypeNetCache | None, cache: HypeNetCache | None) -> HypeNetCache | None:
        """Return the cache that was given under either of its two names."""
        if cache is not None and past_key_values is not None and cache is not past_key_values:
            raise ValueError("HypeNetModel: cache must be left out with past_key_values (both name one argument)")
        return past_key_values if cache is None else cache

    def _cache(self, past_key_values: HypeNetCache | None, use_cache: bool | None) -> HypeNetCache | None:
        """Return the cache to use: the one given, a new one, or None."""
        if past_key_values is not None and not isinstance(past_key_values, HypeNetCache):
            raise TypeError(
                f"HypeNetModel: past_key_values must be a HypeNetCache, got {type(past_key_values).__name__}"
            )
        checkpointing = self.gradient_checkpointing and self.training
        if past_key_values is not None and (past_key_values.get_seq_length() > 0 or not checkpointing):
            return past_key_values
        if use_cache is None:  # an exported graph returns tensors only
            use_cache = self.config.use_cache and not self.training and not torch.compiler.is_exporting()
        # Activation checkpointing recomputes layers in the backward pass, which would update the cache twice.
        return HypeNetCache(self.config) if use_cache and not checkpointing else None

    def _plan_documents(
        self, x_BTC: torch.Tensor, position_ids: torch.Tensor | None, cu_seqlens: torch.Tensor
    ) -> MixerContext:
        """Return the context of packed documents."""
        if x_BTC.shape[0] != 1:
            raise ValueError(f"HypeNetModel: input_ids must have a batch of 1 with cu_seqlens, got {x_BTC.shape[0]}")
        if position_ids is None:
            position_ids = packed_positions(cu_seqlens, x_BTC.shape[1])
        return MixerContext(self.rotary_emb(x_BTC, position_ids), cu_seqlens)

    def _plan(
        self,
        x_BTC: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: HypeNetCache | None,
        use_cache: bool | None,
    ) -> tuple[MixerContext, Packing | None]:
        """Choose how the layers run: on the [B, T] batch, as an in-place step, or on a packed row."""
        B, T = x_BTC.shape[:2]
        cache = self._cache(past_key_values, use_cache)
        past = 0 if cache is None else cache.get_seq_length()
        mask, numbers = read_mask(attention_mask, B, T, past)
        documents = self._documents(mask, position_ids, numbers, (B, T))
        several = documents is not None or (numbers is not None and past > 0)
        if several and cache is not None and (past_key_values is not None or use_cache):
            raise ValueError(
                f"HypeNetModel: {'position_ids' if numbers is None else 'attention_mask'} must have one document in "
                "every row with a cache (use_cache=True or past_key_values), got several"
            )
        if documents is not None:
            return self._context(x_BTC, position_ids, documents), documents
        if cache is not None:
            cache.prepare(B, x_BTC.device)
        step = past > 0 and 0 < T <= MAX_STEP_TOKENS and (mask is None or T == 1)
        packing = None
        if not step and (mask is not None or (cache is not None and past > 0 and cache.ragged)):
            mask = x_BTC.new_ones(B, T, dtype=torch.bool) if mask is None else mask
            packing = Packing.of_rows_and_padding(mask) if tracing() and past == 0 else Packing.of_rows(mask)
        context = self._context(x_BTC, position_ids, packing, mask, cache)
        context.step, context.keep = step, mask if step else None
        return context, packing

    @staticmethod
    def _documents(
        mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        numbers: torch.Tensor | None,
        shape: tuple[int, int],
    ) -> Packing | None:
        """Return the packing of documents that share a row, or None if none do."""
        if position_ids is not None and tuple(position_ids.shape) not in (shape, (1, shape[1])):
            raise ValueError(
                f"HypeNetModel: position_ids must have shape {list(shape)}, got {list(position_ids.shape)}"
            )
        if shape[1] <= 1 or (position_ids is None and numbers is None):
            return None
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise ValueError(
                "HypeNetModel: position_ids must come with cu_seqlens in torch.export, since where they restart is "
                "not known while the model is traced"
            )
        return find_documents(mask, None if position_ids is None else position_ids.expand(shape), numbers)

    def _context(
        self,
        x_BTC: torch.Tensor,
        position_ids: torch.Tensor | None,
        packing: Packing | None,
        mask: torch.Tensor | None = None,
        cache: HypeNetCache | None = None,
    ) -> MixerContext:
        """Return the context of the tokens x [B, T, C]: their positions, and their slots in the cache."""
        T = x_BTC.shape[1]
        past = 0 if cache is None else cache.get_seq_length()
        context = MixerContext(cache=cache, past=past, longest=T)
        lengths = None if cache is None or past == 0 else cache.lengths
        if packing is not None:
            context.cu_seqlens = packing.cu_seqlens
            if cache is not None:
                self._plan_packed_cache(context, packing, cast(torch.Tensor, cache.lengths))
        if position_ids is not None:
            position_ids = position_ids if packing is None else packing.pack(position_ids)
        elif packing is not None:
            position_ids = (packing.order if lengths is None else packing.order + lengths[packing.rows])[None]
        else:
            order = torch.arange(T, device=x_BTC.device)[None] if mask is None else mask.cumsum(1).sub_(1).clamp_(min=0)
            position_ids = order if lengths is None else order + lengths[:, None]
        context.position_embeddings = self.rotary_emb(x_BTC, position_ids)
        return context

    @staticmethod
    def _restore(
        B: int, T: int, context: MixerContext, packing: Packing | None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the function that turns a layer's output into [B, T, C], with zeros at padding."""
        if packing is not None:
            return packing.unpack
        if context.keep is not None:
            keep_BT1 = context.keep[..., None]
            return lambda x: x * keep_BT1.to(x.dtype)
        return lambda x: x.view(B, T, x.shape[-1])

    @staticmethod
    def _advance(context: MixerContext, columns: int, packing: Packing | None) -> None:
        """Count the new tokens in the cache, if there is one."""
        if context.cache is None:
            return
        tokens: torch.Tensor | int = columns if packing is None else packing.counts
        if context.keep is not None:
            tokens = context.keep[:, 0].to(torch.int32)
        ragged = packing is not None or context.keep is not None
        context.cache.advance(columns, tokens, context.longest, ragged)

    @staticmethod
    def _plan_packed_cache(context: MixerContext, packing: Packing, lengths: torch.Tensor) -> None:
        """Set where packed tokens are stored in the cache, and each sequence's span."""
        context.slots = (packing.rows, packing.order + lengths[packing.rows])
        if not tracing():
            context.longest = int(packing.counts.max())
        if context.past > 0:
            bounds = packing.cu_seqlens.tolist()
            context.spans = list(zip(bounds, bounds[1:], lengths.tolist(), strict=False))


class HypeNetForCausalLM(HypeNetPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head, for training and `generate`.

    Args:
        config: The model's configuration.

    Example:
        >>> import torch
        >>> from hypenet import HypeNetConfig, HypeNetForCausalLM
        >>> config = HypeNetConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=8,
        ...                        num_attention_heads=2, num_key_value_heads=1)
        >>> model = HypeNetForCausalLM(config)
        >>> ids = torch.tensor([[3, 1, 4, 1, 5]])
        >>> model(input_ids=ids, labels=ids).logits.shape
        torch.Size([1, 5, 64])
        >>> model.eval().generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0).shape
        torch.Size([1, 8])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HypeNetConfig) -> None:
        super().__init__(config)
        self.model = HypeNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: HypeNetCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the next-token loss if labels are given.

        Args:
            labels: int64 [B, T], -100 where a token does not count. They are shifted here, not by the caller.
            logits_to_keep: Number of last tokens to compute logits for, 0 for all; or a 1-D tensor of indices.
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, kwargs: As for
                `HypeNetModel.forward`.

        Returns:
            loss (None without labels); logits [B, kept tokens, vocabulary]; past_key_values; hidden_states.

        Raises:
            ValueError, TypeError, NotImplementedError: As `HypeNetModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: outputs.get(CACHE)},
        )

    def swap_mixer(self, layer_idx: int, mixer: Mixer) -> Mixer:
        """Replace the mixer of one layer; see `HypeNetModel.swap_mixer`."""
        return self.model.swap_mixer(layer_idx, mixer)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        """Give `generate` a HypeNetCache, unless the caller passed a cache or switched caching off."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                "HypeNetForCausalLM.generate: cache_implementation must be None, "
                f"got {generation_config.cache_implementation!r}"
            )
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = HypeNetCache(self.config, capacity=max_cache_length)
            return True
        return super()._prepare_cache_for_generation(  # type: ignore[misc]  # its `self` is a protocol
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )


class HypeNetForSequenceClassification(GenericForSequenceClassification, HypeNetPreTrainedModel):
    """The decoder with a linear layer on the last token that is not padding, by `config.pad_token_id`."""


class HypeNetForTokenClassification(GenericForTokenClassification, HypeNetPreTrainedModel):
    """The decoder with a linear layer on every token."""


class HypeNetForQuestionAnswering(GenericForQuestionAnswering, HypeNetPreTrainedModel):
    """The decoder with the scores of each token to begin and to end an answer."""


def rotary_embedding(config: HypeNetConfig) -> LlamaRotaryEmbedding:
    """Return Llama's rotary embedding; it reads only fields that both configurations have."""
    return LlamaRotaryEmbedding(cast(LlamaConfig, config))
