"""All tolerances of the tests, and how they are derived.

The error of a result is RMS(result - reference) / RMS(reference), with a float64 reference. The bound for a
low-precision result is twice the error of an eager implementation of the same formula in that precision, plus the
epsilon of its dtype. Without an eager result, it is a fixed multiple of the rounding error of the accumulation type.
"""

import torch

# Relative RMS error of a kernel that accumulates in this dtype, for sums of up to thousands of terms.
ACCUMULATED = {torch.float64: 1e-10, torch.float32: 2e-6}
MEANINGFUL_RMS = 1e-3
# Guaranteed relative RMS errors of the delta rule's results and gradients in bfloat16, even for repeated keys.
BFLOAT16 = {
    **dict.fromkeys(("o", "final_state"), 5e-3),
    **dict.fromkeys(("dq", "dk", "dv", "dinitial_state"), 8e-3),
    **dict.fromkeys(("dg", "dbeta"), 1e-2),
}


def rms(x):
    return x.double().square().mean().sqrt().item()


def assert_within_guarantee(name, result, reference):
    """Assert RMS(result - reference) <= BFLOAT16[name] * RMS(reference)."""
    ratio = rms(result.double() - reference) / rms(reference)
    assert ratio <= BFLOAT16[name], f"{name}: RMS error {ratio:.1e} of the reference's RMS"


def assert_accurate_as_hi_lo(name, result, reference, dtype):
    """Assert the accuracy of a hi/lo split in dtype: relative RMS error <= eps^2 + the rounding of float32 sums."""
    ratio, bound = rms(result.double() - reference) / rms(reference), torch.finfo(dtype).eps ** 2
    assert ratio <= bound + ACCUMULATED[torch.float32], f"{name}: RMS error {ratio:.1e} of the reference's RMS"


def assert_as_accurate(name, result, other, reference):
    """RMS(result - reference) <= RMS(other - reference) and a tenth, by which equally good orders of a sum differ."""
    error, allowed = rms(result.double() - reference), 1.1 * rms(other.double() - reference)
    assert error <= allowed, f"{name}: RMS error {error:.2e}, at most {allowed:.2e} allowed"


def assert_matches_reference(name, result, reference, eager=None, dtype=None):
    """Assert RMS(result - reference) <= bound * RMS(reference).

    dtype: precision of the inputs, by default result.dtype. eager: the result of an eager implementation in it.
    """
    dtype = result.dtype if dtype is None else dtype
    assert result.shape == reference.shape, f"{name}: shape {list(result.shape)}, expected {list(reference.shape)}"
    if reference.numel() == 0:
        return
    reference, result = reference.double(), result.detach().double()
    size = rms(reference)
    assert size > MEANINGFUL_RMS, f"{name}: the reference is nearly zero (RMS {size:.1e}): nothing to compare with"
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
