"""Sweeps over thresholds and strengths: a grid of stage schedules, each with a label."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import isfinite

from .clock import Clock, clock_named
from .stages import PRESETS, Stages, preset

LIMIT = 256  # schedules in one sweep, our choice: a slip of the keyboard should not fill the queue for days
COMBINE = {"grid": "every tau1 with every tau2", "pairs": "the first tau1 with the first tau2, and so on"}


def parse_numbers(text: str, name: str, top: float = 1.0) -> tuple[float, ...]:
    """The numbers of a list such as "0.95, 0.85". Raises ValueError for what is none, or is outside 0 to `top`."""
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


def scaled_preset(
    name: str, clock: str | Clock, tau1: float, tau2: float, context: float = 1.0, reference: float = 1.0
) -> Stages:
    """A preset with its groups at these strengths where they are on; the paper's (0, 0) is the MLLM throughout."""
    found = preset(name, clock, tau1, tau2)
    keyframes = (replace(k, context=k.context * context, reference=k.reference * reference) for k in found.keyframes)
    return Stages(keyframes, found.clock)


def threshold_sweep(
    name: str,
    clock: str | Clock,
    tau1: Sequence[float],
    tau2: Sequence[float],
    context: Sequence[float] = (1.0,),
    reference: Sequence[float] = (1.0,),
    *,
    combine: str = "grid",
    controls: bool = False,
) -> list[tuple[str, Stages]]:
    """(label, schedule) of every combination, in order, each schedule once, with strengths where a group is on.

    A grid leaves out thresholds in the wrong order, pairs refuse them. Controls ("both throughout" and "MLLM only")
    come first. Raises ValueError where nothing is left, for unequal pairs, and for more than LIMIT schedules.
    """
    if combine not in COMBINE:
        raise ValueError(f"combine is {combine!r}, expected one of {', '.join(COMBINE)}.")
    if combine == "pairs" and len(tau1) != len(tau2):
        raise ValueError(
            f"combine is pairs, but tau1 holds {len(tau1)} numbers and tau2 {len(tau2)}, expected as many of each."
        )
    clock = clock_named(clock)
    thresholds = len(PRESETS[name].strengths) - 1 if name in PRESETS else 0  # `preset` refuses another name
    if (count := max(map(len, (tau1, tau2, context, reference)))) > LIMIT:  # before all combinations of them are made
        raise ValueError(f"This sweep has {count} settings, expected {LIMIT} at most. Take out some numbers.")
    pairs = list(zip(tau1, tau2)) if combine == "pairs" else list(product(tau1, tau2))
    if combine == "grid" and thresholds == 2:
        pairs = [(first, second) for first, second in pairs if clock.order(second) >= clock.order(first)]
        if not pairs:
            raise ValueError(
                f"No tau2 of {_list(tau2)} is {clock.later} a tau1 of {_list(tau1)}, as the clock {clock.name} has it:"
                " the MLLM's tokens would go out before the VAE's come in. Swap the two lists, or change the clock."
            )
    count = len(pairs) * len(context) * len(reference)
    if count > LIMIT:
        raise ValueError(f"This sweep has {count} settings, expected {LIMIT} at most. Take out some numbers.")
    found = {}
    if controls:
        found[preset("both", clock)] = "both throughout"
        found[preset("mllm_only", clock)] = "MLLM only"
    for (first, second), m, v in product(pairs, context, reference):
        stages = scaled_preset(name, clock, first, second, m, v)
        parts = [name.replace("_", " ")]
        parts += [f"{tau} {value:g}" for tau, value in zip(("tau1", "tau2")[:thresholds], (first, second))]
        parts += [f"MLLM {m:g}"] * (name != "vae_only" and (len(context) > 1 or m != 1))
        parts += [f"VAE {v:g}"] * (name != "mllm_only" and (len(reference) > 1 or v != 1))
        found.setdefault(stages, ", ".join(parts))
    return [(label, stages) for stages, label in found.items()]


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
