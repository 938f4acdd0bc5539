"""The cases of a run that several servers share: which are waiting, what became of each, and the run's folder."""

import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...common.files import save_bytes, save_text
from ..comfy_client.client import Client
from .ledger import MARK, Ledger, with_texts
from .sets import Case
from .template import Template

TIMES = 3  # in a row that something may go wrong before it is taken for lasting
MEMORY = re.compile("out of memory|allocation on device|OutOfMemory", re.IGNORECASE)  # in a server's error


@dataclass(eq=False)
class ServerState:
    """How a server does in a run."""

    client: Client
    jobs: dict[str, tuple[Case, dict]] = field(default_factory=dict)  # by id, oldest first
    made: int = 0
    problem: str = ""  # why it is lost, until it answers again
    out: str = ""  # why it gets no more cases in this run
    strikes: int = 0  # cases in a row that failed here and were drawn elsewhere
    times_lost: int = 0
    away_since: float = 0.0
    progress: float = 0.0  # when the last job ended, or the first was queued

    @property
    def usable(self) -> bool:
        """Whether it takes cases now."""
        return not (self.problem or self.out)


class CaseQueue:
    """Cases are taken by servers, and recorded or given back; all may be called by any thread.

    Args:
        template: The workflow.
        out: The run's folder.
        root: The folder that references are named from.
        workflow: Its name, for the ledger.
        prefetch: Cases in a server's queue at a time, so that it is never idle.
        say: Takes lines about the run's progress.
    """

    def __init__(
        self,
        template: Template,
        out: Path,
        *,
        root: Path = Path(),
        workflow: str | None = None,
        prefetch: int = 2,
        say: Callable[[str], None] = print,
    ):
        self.template, self.out, self.root, self.workflow = template, Path(out), Path(root), workflow
        self.prefetch, self.say = prefetch, say
        self.servers: list[ServerState] = []
        self.over = threading.Event()  # no more cases are taken
        self.empty: set[str] = set()  # cases that a host's cache has answered without a picture
        self._lock = threading.RLock()
        self._losses: dict[str, int] = {}  # by case: times that a server was lost while it worked on it
        self._tried: dict[str, dict[ServerState, str]] = {}  # by case that waits for another server: its errors

    def begin(self, cases: Sequence[Case]) -> None:
        """Reads what the folder has already."""
        self.ledger = Ledger(self.out)
        self.ledger.keep_done(cases)
        self.waiting = deque(case for case in cases if case.name not in self.ledger.lines)
        self.total, self.before = len(cases), len(cases) - len(self.waiting)
        self.made = self.failures = 0
        self.began = time.monotonic()

    @property
    def done(self) -> bool:
        """Whether every case is recorded."""
        return self.before + self.made + self.failures >= self.total

    def settle(self) -> None:
        """Records failed cases that no server is left to try again."""
        with self._lock:
            for case in [case for case in self.waiting if case.name in self._tried]:
                tried = self._tried[case.name]
                if not any(server.usable for server in self.servers if server not in tried):
                    self.waiting.remove(case)
                    server, error = tried.popitem()
                    self.record_failure(case, error, server)

    def take(self, server: ServerState) -> Case | None:
        """The next case for a server that has room in its queue; near the end only for one that is idle."""
        with self._lock:
            room = self.prefetch if len(self.waiting) > len(self.servers) or len(self.servers) == 1 else 1
            doubtful = sum(server in tried for tried in self._tried.values())  # its errors that another is to confirm
            if len(server.jobs) < room and doubtful < TIMES and not self.over.is_set():
                for case in self.waiting:
                    if server not in self._tried.get(case.name, ()):
                        self.waiting.remove(case)
                        return case
        return None

    def others(self, server: ServerState) -> bool:
        """Whether another server takes cases now."""
        return any(other.usable for other in self.servers if other is not server)

    def fill(self, case: Case, images: Sequence[str]) -> dict:
        """The case's own workflow, with these `images` of a server."""
        return self.template.fill(case, images, f"benchmark/{self.out.name or 'run'}")

    def give_back(self, case: Case, last: bool = False) -> None:
        """Lets a case wait again, next in turn or last."""
        with self._lock:
            (self.waiting.append if last else self.waiting.appendleft)(case)

    def lost(self, case: Case, worked: bool) -> None:
        """A case was lost with its server, which worked on it if it was the first in its queue."""
        with self._lock:
            self._losses[case.name] = self._losses.get(case.name, 0) + worked
            if self._losses[case.name] < TIMES:  # what ends one server may end the next: it is tried last
                return self.give_back(case, last=worked and len(self.servers) > 1)
        text = f"The server ended {TIMES} times while it worked on this; its own log says why."
        self.record_failure(case, text)

    def failed(self, server: ServerState, case: Case, error: str) -> None:
        """A case failed on a server. One other may try; where memory was short, all others, one after the other."""
        with self._lock:
            tried = self._tried.setdefault(case.name, {})
            tried[server] = error
            others = any(other.usable for other in self.servers if other not in tried)
            if not others or (len(tried) > 1 and not MEMORY.search(error)):
                return self.record_failure(case, error, server)
            self.say(f"{case.item.subject}: {case.item.prompt[:60]}  failed on {server.client.address}: {error}")
            self.give_back(case)

    def record(self, server: ServerState, case: Case, prompt: dict, entry: dict, data: bytes) -> None:
        """Saves a case's picture, the scores in the server's `entry`, and its line. Raises ValueError for no PNG."""
        data = with_texts(data, {"prompt": json.dumps(prompt), MARK: json.dumps(self.describe(case))})
        with self._lock:
            self._save_scores(case, entry)
            save_bytes(self.out / f"{case.name}.png", data)
            seconds = round(time.monotonic() - server.progress, 2)
            graph = {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in prompt.items()}
            done = {"status": "done", "picture": f"{case.name}.png", "seconds": seconds, "settings": graph}
            self.ledger.add(self.describe(case) | done | {"server": server.client.address})
            self.made, server.made, server.strikes = self.made + 1, server.made + 1, 0
            for other in self._tried.pop(case.name, ()):
                other.strikes += 1
            self._report(case, f"{seconds:.1f} s", server)

    def record_failure(self, case: Case, error: str, server: ServerState | None = None) -> None:
        """Writes a failed case's line."""
        with self._lock:
            where = {"server": server.client.address} if server else {}
            self.ledger.add(self.describe(case) | {"status": "failed", "error": error} | where)
            self._tried.pop(case.name, None)
            self.failures += 1
            self._report(case, f"FAILED: {error}", server)

    def describe(self, case: Case) -> dict:
        """What a picture and its line say of the case."""
        item, names = case.item, [path.relative_to(self.root).as_posix() for path in case.item.references]
        shown = {"name": case.name, "subject": item.subject, "prompt": item.prompt, "references": names}
        return shown | {"seed": case.seed, "take": case.take, "workflow": self.workflow}

    def _save_scores(self, case: Case, entry: dict) -> None:
        """Writes the JSON reports that the workflow shows (a score node's `json` in a Preview as Text) to scores/."""
        texts = [text for output in entry["outputs"].values() for text in output.get("text", ())]
        for number, text in enumerate(filter(_is_report, texts)):
            (self.out / "scores").mkdir(exist_ok=True)
            save_text(self.out / "scores" / f"{case.name}-{number}.json", text)

    def _report(self, case: Case, what: str, server: ServerState | None) -> None:
        here = self.made + self.failures
        left = (self.total - self.before - here) * (time.monotonic() - self.began) / here
        count = f"{self.before + here:{len(str(self.total))}}/{self.total}"
        where = f" on {server.client.address}" if server and len(self.servers) > 1 else ""
        later = f", {left / 60:.0f} min left" if left > 90 else ""
        self.say(f"{count}  {case.item.subject}: {case.item.prompt[:60]}  {what}{where}{later}")


def _is_report(text: object) -> bool:
    try:
        return isinstance(text, str) and "figures" in json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return False
