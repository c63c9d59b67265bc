"""The token mixers of a HypeNet, one file each: softmax attention, Lightning attention, gated DeltaNet, Mamba2.

Each is called as mixer(x_BTC, context) -> y_BTC and can be built from a teacher's attention layer with
`from_attention`.
B batch, T tokens, C hidden size.
"""

from hypenet.mixers.decay import LogDecay, initial_decay
from hypenet.mixers.gated_delta import GatedDeltaNet
from hypenet.mixers.lightning import LightningAttention, alibi_log_decay
from hypenet.mixers.mamba2 import Mamba2
from hypenet.mixers.mixer import HypeNetResidualRMSNorm, HypeNetRMSNorm, Mixer, cast_once
from hypenet.mixers.softmax import SoftmaxAttention

MIXERS: dict[str, type[SoftmaxAttention | LightningAttention | GatedDeltaNet | Mamba2]] = {
    mixer.mixer_type: mixer for mixer in (SoftmaxAttention, LightningAttention, GatedDeltaNet, Mamba2)
}

__all__ = [
    "MIXERS",
    "GatedDeltaNet",
    "HypeNetRMSNorm",
    "HypeNetResidualRMSNorm",
    "LightningAttention",
    "LogDecay",
    "Mamba2",
    "Mixer",
    "SoftmaxAttention",
    "alibi_log_decay",
    "cast_once",
    "initial_decay",
]
