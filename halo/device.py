"""The device that a command names."""

import torch

from halo.errors import HaloError


def find_device(name: str) -> torch.device:
    """Return the device of a name, with its number.

    Args:
        name: "auto" for a GPU if there is one, "cpu", "cuda" or "cuda:N".

    Raises:
        HaloError: If the kernels have no such device, or this machine does not.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise HaloError(f"device: must be auto, cpu, cuda or cuda:N, got {name}")
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(name.partition(":")[2] or 0)  # of which device.index has eight bits only
    if index >= count:
        raise HaloError(f"device: must be one of the {count} CUDA devices of this machine, got {name}")
    return torch.device("cuda", index)
