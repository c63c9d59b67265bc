"""Every test runs from the same seed, with fresh memory poisoned so that reading what nobody wrote shows up as NaN."""

import pytest
import torch
from emulation import device  # noqa: F401, a fixture


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
