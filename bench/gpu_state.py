"""Clocks, power and throttling of the GPU, from nvidia-smi, which every driver brings."""

import subprocess
from typing import TypedDict

import torch

QUERY = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "watts": "power.draw", "celsius": "temperature.gpu"}
THROTTLED = "clocks_throttle_reasons.active"  # a bit mask: 0x1 idle, 0x4 power cap, 0x20 and 0x40 heat
SECONDS = 5


class State(TypedDict, total=False):
    """MHz, watts, degrees and NVML's throttle reasons; without what the GPU does not tell."""

    sm_mhz: float
    memory_mhz: float
    watts: float
    celsius: float
    throttled: str


def read() -> State | None:
    """Return the state of the current GPU, None if nvidia-smi is not there or fails."""
    command = ["nvidia-smi", f"--query-gpu={','.join((*QUERY.values(), THROTTLED))}", "--format=csv,noheader,nounits"]
    uuid = getattr(torch.cuda.get_device_properties(), "uuid", None) if torch.cuda.is_available() else None
    if uuid is not None:
        command.append(f"--id=GPU-{uuid}")
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return parse(text)


def parse(text: str) -> State | None:
    """Return the state that a line of nvidia-smi's CSV holds; fields such as "[N/A]" are left out."""
    *numbers, throttled = [cell.strip() for cell in text.strip().split(",")]
    if len(numbers) != len(QUERY):
        return None
    state: State = {}
    for name, number in zip(QUERY, numbers, strict=True):
        try:
            state[name] = float(number)  # type: ignore[literal-required]
        except ValueError:
            continue
    if throttled.startswith("0x"):
        state["throttled"] = throttled
    return state
