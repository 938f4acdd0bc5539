"""95 % intervals of means and shares. They take the samples to be independent of each other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import atan, cos, nan, pi, sin, sqrt

import torch
from torch import Tensor

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


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
    half = t_quantile(count - 1) * float(values.std()) / sqrt(count) if count > 1 else nan
    return mean, mean - half, mean + half


def share_interval(values: Tensor | Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of (N,) values between 0 and 1, as hits and misses or their averages are.

    Wilson's score interval, which stays in 0..1 and does not shrink to a point when all values are 0 or all are 1.
    Values in between vary less than hits and misses of the same mean do: they count as more samples, by the ratio of
    the variances (an effective sample size, our choice). No values: three NaN.
    """
    values = _values(values)
    count = len(values)
    if count == 0:
        return nan, nan, nan
    mean, variance = float(values.mean()), float(values.var(correction=0))
    size = count * max(1.0, mean * (1 - mean) / variance) if variance > 1e-12 else count
    middle = (mean + Z**2 / (2 * size)) / (1 + Z**2 / size)
    half = Z * sqrt(mean * (1 - mean) / size + (Z / (2 * size)) ** 2) / (1 + Z**2 / size)
    return mean, min(max(0.0, middle - half), mean), max(min(1.0, middle + half), mean)


@lru_cache
def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t distribution with a whole number of degrees of freedom, at least 1."""
    low, high = 0.0, 13.0  # 12.706 at one degree of freedom is the largest
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, freedom) < 0.95 else (low, middle)
    return high


def _central(t: float, freedom: int) -> float:
    """Probability that Student's t lies between -t and t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = atan(t / sqrt(freedom))
    odd = freedom % 2
    term, total = (cos(angle), cos(angle) * (freedom > 1)) if odd else (1.0, 1.0)
    for k in range(2 + odd, freedom - 1, 2):
        term *= cos(angle) ** 2 * (k - 1) / k
        total += term
    return 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total


def _values(values) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.ndim != 1:
        raise ValueError(
            f"An interval is asked for values of shape {tuple(values.shape)}, expected (N,): flatten them."
        )
    return values
