"""What is counted of the faults in a running server, and how one is brought about."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...common.console import say
from ...tests.small.prompts import of_type
from ...tests.small.training import paint_subjects
from ..comfy_client.client import Client
from ..comfy_client.server import Server
from ._server import Settings, draw, graph, small_server, upload_pictures


class Faults:
    """Counts what was tried and lost; starts servers, each with a folder of its own."""

    def __init__(self, work: Path):
        self.work, self.tried, self.servers = work, 0, 0
        self.lost: list[str] = []
        self.leaks: list[str] = []
        self.kinds: dict[str, int] = {}
        self.run_left_alone: dict[str, str] = {}  # checksums of its finished files
        self._alone: dict[tuple[Settings, str], list[str]] = {}

    def note(self, kind: str, name: str, problem: str, leak: bool = False) -> None:
        """Counts a fault; `problem` is what was lost by it, or ""."""
        self.tried += 1
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        say(f"  {kind}, {name}: {problem or 'nothing lost'}")
        if problem:
            (self.leaks if leak else self.lost).append(f"{kind}, {name}: {problem}")

    @contextmanager
    def server(self, base: Path | None = None, models: tuple[Path, ...] = ()) -> Iterator[Server]:
        """A server with the pictures, and subjects to train on, in a new folder or the same as before."""
        self.servers += 1
        base = base or self.work / f"server-{self.servers}"
        with small_server(base, models=models) as server:
            upload_pictures(server.client)
            if not (base / "input" / "subjects").exists():
                paint_subjects(base / "input" / "subjects", subjects=4)
            yield server

    def alone(self, settings: Settings, dla: Path | None = None) -> list[str]:
        """The pictures that settings give on a server that draws nothing else; `dla`: a file in place of the demo's."""
        key = settings, str(dla)
        if key not in self._alone:
            models = () if dla is None else (dla.parents[1],)
            with self.server(models=models) as server:
                prompt = graph(settings, server.client.object_info(), "alone")
                if dla is not None:
                    of_type(prompt, "SubjectLoadPipeline")["dla"] = dla.name
                self._alone[key] = draw(server.client, prompt)
        return self._alone[key]


def inject(client: Client, at: str, call: int = 0, do: str = "") -> None:
    """Chooses what happens at a call of a function in the server (see `inject/`); call 0: nothing more."""
    client.post("/faults", json.dumps({"at": at, "call": call, "do": do}).encode(), "application/json")


def until(happened: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing after {seconds:g} s")
        time.sleep(0.05)
