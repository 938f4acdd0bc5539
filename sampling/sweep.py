"""Sweeps over thresholds and strengths: a grid of stage schedules, each with a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import isfinite

from .stages import Stages, preset

LIMIT = 256  # schedules in one sweep, our choice: a slip of the keyboard should not fill the queue for days
TAUS = {"paper": 2, "semantics_first": 1, "two_stage": 1}  # how many thresholds a preset reads
COMBINE = {"grid": "every tau1 with every tau2", "pairs": "the first tau1 with the first tau2, and so on"}


def parse_numbers(text: str, name: str, top: float = 1.0) -> tuple[float, ...]:
    """The numbers of a list such as "0.95, 0.85", in their order. Raises ValueError naming what is none, or
    lies outside 0..`top`."""
    found = []
    for part in (part.strip() for part in text.replace(";", ",").split(",") if part.strip()):
        try:
            value = float(part)
        except ValueError:
            value = float("nan")
        if not (isfinite(value) and 0 <= value <= top):
            raise ValueError(
                f'{name} holds {part!r}, expected numbers from 0 to {top:g} with commas between, such as "0.95, 0.85".'
            )
        found.append(value)
    if not found:
        raise ValueError(f'{name} is empty, expected at least one number, such as "0.95".')
    return tuple(found)


def staged(name: str, clock: str, tau1: float, tau2: float, mllm: float = 1.0, vae: float = 1.0) -> Stages:
    """A preset with its groups at these strengths where they are on. Where tau1 = tau2, "paper" has no middle stage,
    so that the paper's (0, 0) is the MLLM throughout. Raises ValueError for thresholds out of order."""
    if name == "paper" and tau1 == tau2:
        name = "two_stage"
    found = preset(name, clock, tau1, tau2)
    return replace(
        found, keyframes=tuple(replace(key, mllm=key.mllm * mllm, vae=key.vae * vae) for key in found.keyframes)
    )


def threshold_sweep(
    name: str,
    clock: str,
    tau1: Sequence[float],
    tau2: Sequence[float],
    mllm: Sequence[float] = (1.0,),
    vae: Sequence[float] = (1.0,),
    *,
    combine: str = "grid",
    controls: bool = False,
) -> list[tuple[str, Stages]]:
    """(label, schedule) of every combination, in order, each schedule once.

    combine "grid" leaves out thresholds in the wrong order, "pairs" refuses them. controls: both throughout and MLLM
    only come first. Thresholds and strengths that a preset does not read change nothing, so they give no schedule more.
    Raises ValueError where nothing is left, for pairs of unequal number, and for more than LIMIT schedules.
    """
    if combine not in COMBINE:
        raise ValueError(f"combine is {combine!r}, expected one of {', '.join(COMBINE)}.")
    if combine == "pairs" and len(tau1) != len(tau2):
        raise ValueError(
            f"combine is pairs, but tau1 holds {len(tau1)} numbers and tau2 {len(tau2)}, expected as many of each."
        )
    pairs = list(zip(tau1, tau2)) if combine == "pairs" else list(product(tau1, tau2))
    if combine == "grid" and name == "paper":
        pairs = [
            (first, second) for first, second in pairs if (second >= first if clock == "steps" else second <= first)
        ]
        if not pairs:
            raise ValueError(
                f"No tau2 of {_list(tau2)} lies {'above' if clock == 'steps' else 'below'} a tau1 of {_list(tau1)},"
                f" as the clock {clock} has it: the MLLM's tokens would go out before the VAE's come in. Swap the two"
                " lists, or change the clock."
            )
    count = len(pairs) * len(mllm) * len(vae)
    if count > LIMIT:
        raise ValueError(f"This sweep has {count} settings, expected {LIMIT} at most. Take out some numbers.")
    found = {}
    if controls:
        found[preset("both", clock)] = "both throughout"
        found[preset("mllm_only", clock)] = "MLLM only"
    for (first, second), m, v in product(pairs, mllm, vae):
        stages = staged(name, clock, first, second, m, v)
        parts = [name.replace("_", " ")]
        parts += [f"{tau} {value:g}" for tau, value in zip(("tau1", "tau2")[: TAUS.get(name, 0)], (first, second))]
        parts += [f"MLLM {m:g}"] * (name != "vae_only" and (len(mllm) > 1 or m != 1))
        parts += [f"VAE {v:g}"] * (name != "mllm_only" and (len(vae) > 1 or v != 1))
        found.setdefault(stages, ", ".join(parts))
    return [(label, stages) for stages, label in found.items()]


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
