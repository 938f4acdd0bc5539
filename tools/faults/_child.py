"""Tries one case in a process of its own, with limits of time and memory, and judges what became of it.

The process is a fork of this one, so that whatever was imported before need not be imported again: import and start the
host first, and let PyTorch compute with one thread (`torch.set_num_threads(1)`), or a fork may wait for threads that it
does not have. POSIX alone.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ...common.console import say
from ..tables import parser

SECONDS, BYTES = 30.0, 2 * 2**30  # of a case: more is a fault
# Errors that say nothing to the person who chose the file, whatever their text.
BARE = (
    "KeyError", "IndexError", "RecursionError", "JSONDecodeError", "UnicodeDecodeError", "AttributeError", "TypeError",
    "ZeroDivisionError", "OverflowError", "MemoryError", "AssertionError", "NotImplementedError", "StopIteration",
    "UnboundLocalError", "SafetensorError", "UnpicklingError", "error", "BadZipFile",
)  # fmt: skip
# Python's audit events of code that was run or fetched; loading a file has no need of them.
EVENTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen", "socket.connect")


class Case(NamedTuple):
    """One thing to try.

    Attributes:
        name: For the report.
        file: The damaged file; an error has to hold its name, or that of one of `names`.
        work: What is tried; its result is not used.
        may_pass: Whether it may succeed too, because the damage changes nothing that counts.
        names: Further texts that an error may hold in place of the file's name, such as a folder's.
    """

    name: str
    file: Path
    work: Callable[[], Any]
    may_pass: bool = False
    names: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """What became of a case.

    Attributes:
        end: "passed", "error", "time" (killed at the limit) or "died" (ended by a signal).
        kind: The error's class.
        text: Its text.
        trace: Its traceback.
        ran: Audit events of code that was run or fetched.
        seconds: Time that it took.
        bytes: Memory beyond what it began with at most.
    """

    end: str
    kind: str = ""
    text: str = ""
    trace: str = ""
    ran: tuple[str, ...] = ()
    seconds: float = 0.0
    bytes: int = 0


def run(work: Callable[[], Any], seconds: float = SECONDS, memory: int = BYTES) -> Outcome:
    """Runs `work` in a fork of this process.

    Args:
        work: What is tried.
        seconds: After these it is killed.
        memory: Bytes that it may take beyond what this process has; an allocation beyond twice that fails in it.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _work(work, writer, memory)
    os.close(writer)
    said, ended = b"", False
    try:
        while not ended and (left := started + seconds - time.monotonic()) > 0:
            if select.select([reader], [], [], left)[0]:
                part = os.read(reader, 65536)
                said, ended = said + part, not part
    finally:
        os.close(reader)
        if not ended:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
    took = time.monotonic() - started
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if not ended:
        return Outcome("time", seconds=took, bytes=peak)
    try:
        found = json.loads(said)
    except ValueError:
        return Outcome("died", text=f"status {status}", seconds=took, bytes=peak)
    return Outcome(**found | {"bytes": max(0, peak - found["bytes"])}, seconds=took)


def _resident() -> int:
    """Bytes of this process's memory now; elsewhere than on Linux at most so far."""
    import resource

    if sys.platform.startswith("linux"):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _work(work: Callable[[], Any], writer: int, memory: int) -> None:
    """The fork's part: it ends the process."""
    import resource

    ran: list[str] = []
    began = _resident()  # less than the parent's, whose mapped files are not copied
    sys.addaudithook(lambda event, _: ran.append(event) if event in EVENTS else None)
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(silence, stream)
    try:
        if sys.platform.startswith("linux"):  # elsewhere address space has no useful limit
            has = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (has + 2 * memory, resource.RLIM_INFINITY))
        work()
        found = {"end": "passed"}
    except BaseException as error:
        # The limit is for the work alone; MemoryError's traceback needs memory too.
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        trace = traceback.format_exc(limit=-8)[-4000:]
        found = {"end": "error", "kind": type(error).__name__, "text": str(error)[:4000], "trace": trace}
    with suppress(BrokenPipeError), os.fdopen(writer, "wb") as pipe:
        pipe.write(json.dumps({**found, "ran": sorted(set(ran)), "bytes": began}).encode())
    os._exit(0)


def unclear(case: Case, outcome: Outcome, seconds: float = SECONDS, memory: int = BYTES) -> str:
    """Why a case's end is not clear to the person who chose the file; "" where it is."""
    if outcome.ran:
        return f"ran {', '.join(outcome.ran)}"
    if outcome.end == "time":
        return f"no end after {seconds:g} s"
    if outcome.end == "died":
        return f"the process died ({outcome.text})"
    if outcome.bytes > memory:
        return f"took {outcome.bytes / 2**30:.1f} GB"
    if outcome.end == "passed":
        return "" if case.may_pass else "was taken without a word"
    if outcome.kind in BARE:
        return f"bare {outcome.kind}: {outcome.text[:200]}"
    names = (case.file.name, *case.names)
    if not any(name in outcome.text for name in names):
        return f"names no file: {outcome.kind}: {outcome.text[:200]}"
    if len(outcome.text) > 3000:
        return f"a text of {len(outcome.text)} characters"
    return ""


def options(module: str, text: str | None, argv: Sequence[str]) -> argparse.Namespace:
    """`words`, `all` and `v` of a command line; `module` and `text` are `__name__` and `__doc__` of the file."""
    parsed = parser("faults", module, text)
    parsed.add_argument("words", nargs="*", metavar="WORD", help="to try a few: what a case's name has to hold one of")
    parsed.add_argument("--all", action="store_true", help="all damages of each file, not a part of them")
    parsed.add_argument("-v", action="store_true", help="shows how each case ended")
    return parsed.parse_args(argv)


def try_all(cases: Iterable[Case], prefix: str, words: Sequence[str] = (), every: bool = False) -> dict[str, Any]:
    """Tries every case; returns `{prefix}_tried`, `{prefix}_clear` and the list `{prefix}_unclear`.

    Args:
        cases: What is tried, one after the other; files may be made as they are drawn.
        prefix: Of the keys, "bad_files".
        words: Of which a case's name must hold one, to try a few. Where none does, the process ends and says so.
        every: Shows how each case ended.
    """
    tried, problems = 0, []
    for case in cases:
        if words and not any(word in case.name for word in words):
            continue
        outcome = run(case.work)
        problem = unclear(case, outcome)
        tried += 1
        if problem:
            problems.append(f"{case.name}: {problem}")
            say(f"{case.name}: {problem}\n{outcome.trace}")
        elif every:
            say(f"{case.name}: {outcome.end} {outcome.kind} {outcome.text[:300]} ({outcome.seconds:.1f} s)")
    if words and not tried:
        sys.exit(f"No case's name holds {' or '.join(words)}; -v shows them.")
    return {f"{prefix}_tried": tried, f"{prefix}_clear": tried - len(problems), f"{prefix}_unclear": problems}
