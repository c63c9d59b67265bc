"""Use HypeNet inside other programs."""

ARCHITECTURES = ("HypeNetForCausalLM", "HybridForCausalLM")  # the second: of the first published checkpoints


def register_vllm() -> None:
    """Register HypeNet with vLLM, which calls this in all of its processes: the entry point of `vllm.general_plugins`.

    The import of hypenet has registered the configuration with transformers, from which vLLM reads it. The model is
    registered by name: importing it here would choose vLLM's platform before vLLM does.
    """
    from vllm import ModelRegistry

    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, "hypenet.integrations.vllm:HypeNetForCausalLM")
