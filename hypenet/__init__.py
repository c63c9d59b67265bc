"""HypeNet: hybrids of softmax attention and linear recurrences, as transformers models.

Importing this package registers the model type "hypenet" with transformers' Auto classes.
"""

import importlib.util

if missing := [name for name in ("transformers", "safetensors") if importlib.util.find_spec(name) is None]:
    message = f'hypenet: needs {", ".join(missing)}; install with: pip install "hypenet[model]"'
    raise ModuleNotFoundError(message, name=missing[0])

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from hypenet.cache import HypeNetCache
from hypenet.configuration_hypenet import HybridConfig, HypeNetConfig
from hypenet.context import MixerContext
from hypenet.conversion import config_from_teacher, from_teacher
from hypenet.graphs import DecodeGraph
from hypenet.layers import GatedDeltaLayer, HypeAttentionLayer, LightningLayer, Mamba2Layer
from hypenet.mixers import GatedDeltaNet, LightningAttention, Mamba2, SoftmaxAttention
from hypenet.modeling_hypenet import (
    HypeNetForCausalLM,
    HypeNetForQuestionAnswering,
    HypeNetForSequenceClassification,
    HypeNetForTokenClassification,
    HypeNetModel,
    HypeNetPreTrainedModel,
)
from hypenet.registration import register_architectures
from hypenet.session import load_cache, save_cache
from hypenet_kernels import __version__

for config_class in (HypeNetConfig, HybridConfig):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
AutoModel.register(HypeNetConfig, HypeNetModel, exist_ok=True)
AutoModelForCausalLM.register(HypeNetConfig, HypeNetForCausalLM, exist_ok=True)
AutoModelForQuestionAnswering.register(HypeNetConfig, HypeNetForQuestionAnswering, exist_ok=True)
AutoModelForSequenceClassification.register(HypeNetConfig, HypeNetForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(HypeNetConfig, HypeNetForTokenClassification, exist_ok=True)
register_architectures(
    HypeNetForCausalLM,
    HypeNetForQuestionAnswering,
    HypeNetForSequenceClassification,
    HypeNetForTokenClassification,
    HypeNetModel,
)
# Files keep the published names of the decay's parameters; they are a module only to be sharded apart.
register_checkpoint_conversion_mapping(
    "hypenet",
    [WeightRenaming(rf"self_attn\.{name}", f"self_attn.decay_bias.{name}") for name in ("A_log", "dt_bias")],
    overwrite=True,
)

__all__ = [
    "DecodeGraph",
    "GatedDeltaLayer",
    "GatedDeltaNet",
    "HypeAttentionLayer",
    "HypeNetCache",
    "HypeNetConfig",
    "HypeNetForCausalLM",
    "HypeNetForQuestionAnswering",
    "HypeNetForSequenceClassification",
    "HypeNetForTokenClassification",
    "HypeNetModel",
    "HypeNetPreTrainedModel",
    "LightningAttention",
    "LightningLayer",
    "Mamba2",
    "Mamba2Layer",
    "MixerContext",
    "SoftmaxAttention",
    "__version__",
    "config_from_teacher",
    "from_teacher",
    "load_cache",
    "save_cache",
]
