"""Gives the Auto classes of transformers the classes of HypeNet: `trust_remote_code=True`, or `import hypenet` before.

A copy of this file is in every saved model. The code is that of the installed package: pip install hypenet
"""

from hypenet import (
    HypeNetConfig,
    HypeNetForCausalLM,
    HypeNetForQuestionAnswering,
    HypeNetForSequenceClassification,
    HypeNetForTokenClassification,
    HypeNetModel,
)

__all__ = [
    "HypeNetConfig",
    "HypeNetForCausalLM",
    "HypeNetForQuestionAnswering",
    "HypeNetForSequenceClassification",
    "HypeNetForTokenClassification",
    "HypeNetModel",
]
