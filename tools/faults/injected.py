"""Faults brought about inside a running server: interrupts, no memory, kills, a full disk, models replaced, others.

    nox -s faults -- injected [interrupt memory kill disk replaced two-runs clients leaks]

Each is done to the demo's family on a real server. Afterwards the same prompt must give, pixel for pixel, what a server
gives to which nothing was done, and a training run must end, bit for bit, with the weights of a run that was left
alone. Last line: one JSON object.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from ...common.console import say
from ..tables import parser
from ._drawing import DRAWING, SECOND_WAYS, clients, leaks, lost_drawing, replaced
from ._faults import Faults
from ._training import TRAINING, disk, kills, lost_training, two_runs


def main(argv: list[str]) -> None:
    """Tries them and prints one JSON object. `argv`: the command line without the file's name."""
    kinds: dict[str, Callable[[Faults], None]] = {
        "leaks": leaks, "interrupt": interrupts, "memory": memory, "replaced": replaced, "clients": clients,
        "disk": disk, "kill": kills, "two-runs": two_runs,
    }  # fmt: skip
    parsed = parser("faults", __name__, __doc__)
    parsed.add_argument("kinds", nargs="*", choices=[[], *kinds], metavar="KIND", help="none: all of them")
    wanted = parsed.parse_args(argv).kinds or list(kinds)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        faults = Faults(Path(work))
        for kind in wanted:
            say(f"{kind} ...")
            kinds[kind](faults)
    result = {
        "faults_tried": faults.tried,
        "faults_lost": len(faults.lost),
        "leaks_between_prompts": len(faults.leaks),
        "faults_kinds": faults.kinds,
        "faults_problems": faults.lost + faults.leaks,
        "device": "cpu",
    }
    print(json.dumps(result))


def interrupts(faults: Faults) -> None:
    """The stop button at every phase of a prompt and of a training run."""
    with faults.server() as server:
        client, info = server.client, server.client.object_info()
        for name, (at, call) in DRAWING.items():
            faults.note("interrupt", name, lost_drawing(faults, client, info, at, call, "interrupt"))
        for name, (at, call) in TRAINING.items():
            faults.note("interrupt", f"training, {name}", lost_training(faults, server, at, call, "interrupt"))


def memory(faults: Faults) -> None:
    """No memory at each allocation that matters: the host's and our second way, or an error and then as before."""
    with faults.server() as server:
        client, info = server.client, server.client.object_info()
        for name, (at, call) in DRAWING.items():
            if name not in ("saving", "pooling layers"):
                faults.note("memory", name, lost_drawing(faults, client, info, at, call, "memory"))
        for name, at in SECOND_WAYS.items():
            faults.note("memory", name, lost_drawing(faults, client, info, at, 1, "memory", ends_well=True))
        for name in ("encoding with the MLLM", "encoding with the VAE", "a later step", "validating"):
            at, call = TRAINING[name]
            faults.note("memory", f"training, {name}", lost_training(faults, server, at, call, "memory"))
