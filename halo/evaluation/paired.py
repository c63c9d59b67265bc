"""Differences between two models on the same samples, whose errors are smaller than those of the two means."""

import math
from typing import Any

import numpy as np

from halo.evaluation.needle import mean_and_error


def recall_difference(row: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Return the difference of two models' recall over the same episodes, and its standard error.

    Args:
        row, other: Rows of `halo.stages.evaluate`, of one length.

    Raises:
        ValueError: If they are not of the same episodes.
    """
    ours, theirs = (np.array(each["episode_recall"]) for each in (row, other))
    _check_same("recall_difference", len(ours), len(theirs))
    return mean_and_error(ours - theirs)


def bits_ratio(row: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Return the ratio of two models' bits per byte over the same windows of text, and its standard error.

    Args:
        row, other: Rows of `halo.stages.evaluate`, of one length.

    Raises:
        ValueError: If they are not of the same windows.
    """
    ours, theirs = (np.array(each["window_bits"]) for each in (row, other))
    _check_same("bits_ratio", len(ours), len(theirs))
    ratio, count = float(ours.sum() / theirs.sum()), len(ours)
    if count == 1:
        return ratio, math.nan
    residual = ours - ratio * theirs
    return ratio, float(math.sqrt(count / (count - 1) * np.square(residual).sum()) / theirs.sum())


def _check_same(name: str, count: int, other: int) -> None:
    if count != other:
        raise ValueError(f"{name}: both rows must have the same samples, got {count} and {other}")
