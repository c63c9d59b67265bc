"""The only place where a tolerance stands, and how it is derived.

A result is measured as RMS(error) / RMS(reference) against a float64 reference. The bound for a low-precision result
is twice the error that an eager implementation of the same formula makes in that precision, plus the precision's own
rounding; where no eager result is given, a fixed multiple of the rounding of the accumulation type.
"""

import torch

# Relative RMS error of a kernel that accumulates in this type, over the sums of thousands of terms taken here.
ACCUMULATED = {torch.float64: 1e-10, torch.float32: 2e-6}
MEANINGFUL_RMS = 1e-3
# What bfloat16 promises, however often keys repeat: relative RMS errors of the delta rule's results and gradients.
BFLOAT16 = {
    **dict.fromkeys(("o", "final_state"), 5e-3),
    **dict.fromkeys(("dq", "dk", "dv", "dinitial_state"), 8e-3),
    **dict.fromkeys(("dg", "dbeta"), 1e-2),
}


def rms(x):
    return x.double().square().mean().sqrt().item()


def assert_keeps_promise(name, result, reference):
    """RMS(result - reference) <= BFLOAT16[name] * RMS(reference)."""
    ratio = rms(result.double() - reference) / rms(reference)
    assert ratio <= BFLOAT16[name], f"{name}: RMS error {ratio:.1e} of the reference's RMS"


def assert_accurate_as_pairs(name, result, reference, dtype):
    """RMS(result - reference) <= (eps^2 + what sums in float32 add) * RMS(reference), for the eps of dtype."""
    ratio, bound = rms(result.double() - reference) / rms(reference), torch.finfo(dtype).eps ** 2
    assert ratio <= bound + ACCUMULATED[torch.float32], f"{name}: RMS error {ratio:.1e} of the reference's RMS"


def assert_as_accurate(name, result, other, reference):
    """RMS(result - reference) <= RMS(other - reference) and a tenth, by which equally good orders of a sum differ."""
    error, allowed = rms(result.double() - reference), 1.1 * rms(other.double() - reference)
    assert error <= allowed, f"{name}: RMS error {error:.2e}, at most {allowed:.2e} allowed"


def assert_matches_reference(name, result, reference, eager=None, dtype=None):
    """RMS(result - reference) <= bound * RMS(reference). `dtype`: precision of the inputs; default result.dtype."""
    dtype = result.dtype if dtype is None else dtype
    assert result.shape == reference.shape, f"{name}: shape {list(result.shape)}, expected {list(reference.shape)}"
    if reference.numel() == 0:
        return
    reference, result = reference.double(), result.detach().double()
    size = rms(reference)
    assert size > MEANINGFUL_RMS, f"{name}: the reference is nearly zero (RMS {size:.1e}); the test means nothing"
    error = (result - reference).abs()
    ratio = rms(error) / size
    bound = _bound(dtype, reference, eager, size)
    if not ratio <= bound:
        worst = error.nan_to_num(float("inf")).argmax().item()
        index = [int(i) for i in torch.unravel_index(torch.tensor(worst), reference.shape)]
        raise AssertionError(
            f"{name}: RMS error {ratio:.3e} of the reference's RMS, at most {bound:.3e} allowed; worst at {index}: "
            f"got {result.flatten()[worst]:.8g}, expected {reference.flatten()[worst]:.8g}"
        )


def _bound(dtype, reference, eager, size):
    if eager is not None:
        return 2 * rms(eager.double() - reference) / size + torch.finfo(dtype).eps
    return ACCUMULATED.get(dtype, 2 * torch.finfo(dtype).eps)
