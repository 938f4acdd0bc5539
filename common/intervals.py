"""95 % intervals of means and shares. They take the samples to be independent of each other."""

from collections.abc import Sequence
from math import nan, sqrt

import torch
from scipy.special import ndtri, stdtrit
from torch import Tensor

LEVEL = 0.975  # of the quantiles: 2.5 % lie beyond an interval on either side


def mean_interval(values: Tensor | Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of (N,) values: Student's t interval of the mean.

    No values: three NaN. One value: the mean alone, its interval is unknown (NaN). A NaN among the values makes the
    result NaN: leave such samples out beforehand, and say so.
    """
    values = _values(values)
    count = len(values)
    if count == 0:
        return nan, nan, nan
    mean = float(values.mean())
    half = float(stdtrit(count - 1, LEVEL)) * float(values.std()) / sqrt(count) if count > 1 else nan
    return mean, mean - half, mean + half


def share_interval(values: Tensor | Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of (N,) values from 0 to 1, as hits and misses or their averages are; no values: three NaN.

    Wilson's score interval, which stays in 0..1 and does not shrink to a point when all values are 0 or all are 1.
    Values in between vary less than hits and misses of the same mean do: they count as more samples, by the ratio of
    the variances (our choice; scipy's binomtest takes whole numbers of samples alone).
    """
    values = _values(values)
    count = len(values)
    if count == 0:
        return nan, nan, nan
    mean, variance = float(values.mean()), float(values.var(correction=0))
    size = count * max(1.0, mean * (1 - mean) / variance) if variance > 1e-12 else count
    z = float(ndtri(LEVEL))
    middle = (mean + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z * sqrt(mean * (1 - mean) / size + (z / (2 * size)) ** 2) / (1 + z**2 / size)
    return mean, min(max(0.0, middle - half), mean), max(min(1.0, middle + half), mean)


def _values(values) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.ndim != 1:
        raise ValueError(
            f"An interval is asked for values of shape {tuple(values.shape)}, expected (N,): flatten them."
        )
    return values
