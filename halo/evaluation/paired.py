"""Differences between two models on the same samples, whose errors are smaller than those of the two means.

Rows are those of `halo.stages.evaluate`, of one length.
"""

from typing import Any

import numpy as np

from halo.evaluation.needle import mean_and_error
from halo.evaluation.perplexity import ratio_and_error


def recall_difference(row: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Return the difference of two models' recall over the same episodes, and its standard error.

    Raises:
        ValueError: If the rows have different numbers of episodes.
    """
    ours, theirs = _samples("episode_recall", row, other)
    return mean_and_error(ours - theirs)


def bits_ratio(row: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Return the ratio of two models' bits per byte over the same windows of text, and its standard error.

    Raises:
        ValueError: If the rows have different numbers of windows.
    """
    return ratio_and_error(*_samples("window_bits", row, other))


def _samples(name: str, row: dict[str, Any], other: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    ours, theirs = np.array(row[name]), np.array(other[name])
    if len(ours) != len(theirs):
        raise ValueError(f"paired: {name} of both rows must have the same length, got {len(ours)} and {len(theirs)}")
    return ours, theirs
