"""HypeNet for transformers: a pre-norm decoder whose token mixers are softmax attention or a linear recurrence.

Source: "Hybrid Linear Attention Done Right", arXiv 2601.22156, section 3 and appendix A. Where the paper and its code
differ, this follows the code, so that published checkpoints give the same results. B batch, T tokens, C hidden size.
"""

from typing import Any, NoReturn, cast

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
from hypenet.cache_layers import RECORDED_TOKENS
from hypenet.configuration_hypenet import HypeNetConfig
from hypenet.context import MixerContext
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
from hypenet.plan import ForwardPlan
from hypenet.prefill import prefill
from hypenet_kernels import swiglu

logger = logging.get_logger(__name__)

ASSISTANT_TOKENS = 512  # that a model which drafts for another can go back
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

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing, as `HypeNetConfig.register_for_auto_class`."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, but refuse tensor parallelism, whose empty plan would divide nothing."""
        config = kwargs.get("distributed_config")
        for name in ("tp_plan", "tp_size"):
            value = kwargs.get(name) or getattr(config, name, None)
            if value not in (None, 1):
                rule = "be None (there is no plan for tensor parallelism; shard with FSDP2)"
                raise ValueError(f"{cls.__name__}: {name} must {rule}, got {value!r}")
        return super().from_pretrained(*args, **kwargs)

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
        past_key_values = self._given_cache(past_key_values, kwargs.get("cache"))
        cu_seqlens = kwargs.get("cu_seq_lens_q") if cu_seqlens is None else cu_seqlens
        if cu_seqlens is None:
            cache = self._cache(past_key_values, use_cache)
            cache_is_wanted = cache is not None and (past_key_values is not None or bool(use_cache))
            plan = ForwardPlan.of_batch(x_BTC, attention_mask, position_ids, cache, cache_is_wanted)
        elif attention_mask is not None or past_key_values is not None or use_cache:
            raise ValueError("HypeNetModel: cu_seqlens must come without attention_mask and without a cache")
        else:
            plan = ForwardPlan.of_documents(x_BTC, cu_seqlens, position_ids)
        context = plan.context
        context.position_embeddings = self.rotary_emb(x_BTC, plan.position_ids)
        x_BTC = plan.pack(x_BTC)

        trace = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and context.past == 0):
            for layer in self.layers:
                if output_hidden_states:
                    trace.append(plan.restore(x_BTC))
                x_BTC = layer(x_BTC, context)
            x_BTC = plan.restore(self.norm(x_BTC))
        plan.finish()
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
        prefill_chunk: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the next-token loss if labels are given.

        Args:
            labels: int64 [B, T], -100 where a token does not count. They are shifted here, not by the caller.
            logits_to_keep: Number of last tokens to compute logits for, 0 for all; or a 1-D tensor of indices.
            prefill_chunk: Run the layers on so many tokens of each sequence at a time, with a cache, which bounds the
                memory for activations. Without gradients, and not with labels, `cu_seqlens` or hidden states.
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, kwargs: As for
                `HypeNetModel.forward`.

        Returns:
            loss (None without labels); logits [B, kept tokens, vocabulary]; past_key_values; hidden_states.

        Raises:
            ValueError, TypeError, NotImplementedError: As `HypeNetModel.forward`.
        """
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "position_ids": position_ids}
        options = {"attention_mask": attention_mask, "past_key_values": past_key_values, "use_cache": use_cache}
        if prefill_chunk is None:
            outputs = self.model(**inputs, **options, return_dict=True, **kwargs)
        elif labels is None:
            outputs = prefill(self.model, prefill_chunk, logits_to_keep, inputs, options | kwargs)
        else:
            raise ValueError("HypeNetForCausalLM: prefill_chunk must come without labels")
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
            if generation_config.is_assistant:  # its drafts grow as long as they are accepted
                model_kwargs[CACHE].activate_past_recording(ASSISTANT_TOKENS)
            elif generation_mode == GenerationMode.ASSISTED_GENERATION:
                drafts = generation_config.prompt_lookup_num_tokens, generation_config.num_assistant_tokens
                model_kwargs[CACHE].activate_past_recording(max(RECORDED_TOKENS, *(x or 0 for x in drafts)))
            return True
        return super()._prepare_cache_for_generation(  # type: ignore[misc]  # its `self` is a protocol
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse continuous batching."""
        raise NotImplementedError(
            f"{type(self).__name__}: continuous batching must be off (its paged cache has no recurrent states)"
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
