"""How FSDP2 divides weights, gradients and optimizer state over the processes.

The root of a sharded model must be the module that is called, so the loss is the forward pass of the root. Embedding
and head may share their weight, so both are in the root. Layers gather their weights in the arithmetic's dtype and
reduce gradients in float32; the root keeps float32, so that the residual stream is as wide as in one process.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from halo.compute import Compute

WIDE = MixedPrecisionPolicy(torch.float32, torch.float32, cast_forward_inputs=False)
# A teacher is copied to every device if it takes less than this share of the device's memory.
REPLICATED_SHARE = 0.2


def shard_student(root: nn.Module, student: PreTrainedModel, compute: Compute) -> None:
    """Shard a module whose forward pass is the loss of `student`, which it contains: each layer, then the rest."""
    if compute.mesh is None:
        return
    for layer in cast(Any, student).model.layers:
        _shard(layer, compute)
    fully_shard(root, mesh=compute.mesh, mp_policy=WIDE)


def shard_mixers(mixers: nn.ModuleList, compute: Compute) -> None:
    """Shard token mixers, each as a root of its own."""
    if compute.mesh is not None:
        for mixer in mixers:
            _shard(mixer, compute)


def shard_teacher(teacher: PreTrainedModel, compute: Compute) -> None:
    """Shard a frozen teacher that is too large to be copied to every device; its embedding and head stay whole."""
    if compute.mesh is None or compute.device.type != "cuda":
        return
    size = sum(parameter.numel() * parameter.element_size() for parameter in teacher.parameters())
    if size < REPLICATED_SHARE * torch.cuda.get_device_properties(compute.device).total_memory:
        return
    ends: list[Any] = [teacher.get_input_embeddings(), teacher.get_output_embeddings()]
    whole: set[nn.Parameter] = {module.weight for module in ends}
    decoder = cast(Any, teacher).model
    for layer in decoder.layers:
        fully_shard(layer, mesh=compute.mesh, reshard_after_forward=True)
    fully_shard(decoder, mesh=compute.mesh, ignored_params=whole)


def synchronise(module: nn.Module, wanted: bool) -> None:
    """Choose whether backward passes from now on reduce gradients over the processes, which the last one must."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(wanted, recurse=False)


def reshard(module: nn.Module) -> None:
    """Divide weights again that a forward pass has gathered, which is left to the backward pass otherwise."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole_tensor(value: Tensor) -> Tensor:
    """Gather a sharded tensor; any other is returned as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_state(module: nn.Module, compute: Compute) -> dict[str, Tensor]:
    """Gather a module's weights to the CPU of the main process, one at a time; the others get an empty dict.

    Names that share a weight share the tensor, by which transformers knows what not to write twice.
    """
    names = {name: id(value) for name, value in module.named_parameters(remove_duplicate=False)}
    gathered: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        key = names.get(name, -1)
        whole = gathered.get(key)
        if whole is None:
            whole = whole_tensor(value.detach())
            whole = whole.cpu() if compute.main else whole.new_empty(0)
            if key != -1:
                gathered[key] = whole
        if compute.main:
            state[name] = whole
    return state


def _shard(module: nn.Module, compute: Compute) -> None:
    policy = MixedPrecisionPolicy(compute.dtype, torch.float32, cast_forward_inputs=False)
    for part in module.modules():
        # The parameters of a decay stay float32: rounded to bfloat16, half-lives change by percents.
        decay = getattr(part, "decay_bias", None)
        if isinstance(decay, nn.Module) and any(True for _ in decay.parameters()):
            fully_shard(decay, mesh=compute.mesh, mp_policy=WIDE)
    fully_shard(module, mesh=compute.mesh, mp_policy=policy)
