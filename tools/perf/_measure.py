"""What the benchmarks share: the device, timed rounds of several forms side by side, ratios."""

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from ...common.bootstrap import start_host


def start(full: bool = False, options: Sequence[str] = (), host: bool = True) -> Any:
    """Starts the host on this machine's device and returns the `torch.device`.

    Args:
        full: Sizes that need an accelerator; without one the process ends with a message.
        options: The host's command line.
        host: Whether ComfyUI is started.
    """
    import torch

    found = torch.cuda.is_available()
    if full and not found:
        sys.exit("--full needs an accelerator that PyTorch sees (torch.cuda.is_available() is False here).")
    if host:
        start_host(os.environ["COMFYUI_PATH"], options, cpu=not found)
    return torch.device("cuda" if found else "cpu")


def device_name(device: Any) -> str:
    """Name of a device as results show it, e.g. "NVIDIA H100 80GB HBM3"; "cpu" for the processor."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class Timed(NamedTuple):
    """What the rounds measured, by form."""

    seconds: dict[str, list[float]]  # one for each round
    peak: dict[str, int]  # bytes that PyTorch had allocated on an accelerator; empty on a CPU

    def median(self, form: str) -> float:
        """Median of a form's seconds."""
        return statistics.median(self.seconds[form])

    def ratio(self, form: str, baseline: str, digits: int = 4) -> float:
        """Median over the rounds of a form's time over the baseline's of the same round."""
        return round(statistics.median(self._ratios(form, baseline)), digits)

    def spread(self, form: str, baseline: str, digits: int = 4) -> list[float]:
        """First and third quartile of the same."""
        low, _, high = statistics.quantiles(self._ratios(form, baseline), n=4)
        return [round(low, digits), round(high, digits)]

    def _ratios(self, form: str, baseline: str) -> list[float]:
        return [ours / theirs for ours, theirs in zip(self.seconds[form], self.seconds[baseline], strict=True)]


def time_rounds(forms: Mapping[str, Callable[[], Any]], rounds: int, device: Any) -> Timed:
    """Runs the forms in turn, `rounds` times in alternating order, after one round that warms up.

    On a CPU a form's seconds are those that this process computes in, of all its threads: other work on the machine
    does not count. On an accelerator they are the clock's.

    Args:
        forms: By name, what is measured.
        rounds: Timed ones.
        device: `torch.device`; an accelerator is synchronised around each form.
    """
    import torch

    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    peak: dict[str, int] = {}
    for number in range(rounds + 1):
        for name in list(forms)[:: 1 if number % 2 else -1]:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = clock()
            forms[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
                peak[name] = torch.cuda.max_memory_allocated()
            if number:
                seconds[name].append(clock() - started)
    return Timed(seconds, peak)


def operations(work: Callable[[], Any]) -> int:
    """Floating-point operations of linear maps, convolutions and attention, also of grouped-query attention.

    PyTorch before 2.13 refuses to count attention with fewer heads of keys than of queries, and none counts the CPU's.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        """Of shapes (b, h, n, d); each key and value head serves several of the queries'."""
        return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])

    kernels = ("efficient_attention", "flash_attention", "cudnn_attention", "flash_attention_for_cpu")
    counted = {getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}"): attention for kernel in kernels}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        work()
    return counter.get_total_flops()


def cpu_peak(work: Callable[[], Any]) -> int:
    """Bytes that PyTorch allocates on the CPU at most beyond those there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        work()
    now = most = 0
    events = [event for event in log.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
