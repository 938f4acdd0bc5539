"""A benchmark as a queue of prompts on a running ComfyUI: every case once, whatever happens to either side.

A case is done when its picture lies in the run's folder; failed ones are tried again at the next start. Only HTTP is
spoken, through tools/comfy_client/server.py.
"""

from __future__ import annotations

import json
import time
import urllib.error
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path

from ..comfy_client.server import Client, refusal, title
from ..comfy_client.workflow import WorkflowFileError
from .ledger import MARK, Ledger, RunError, check_run, with_texts, write
from .sets import Case
from .template import Template

GATEWAY = (502, 503, 504)  # what a proxy says for a server that is down
LOSSES = 3  # times that the server may end while it works on a case


class Away(Exception):
    """The server did not answer."""


class Benchmark:
    """`Benchmark(client, template, out).run(cases)`: every case's picture in `out`; counts of what happened.

    root: folder that references are named from. facts: of the run, for run.json. ahead: cases in the server's queue at
    a time, so that it never waits for us. patience: seconds to wait for a server that has gone away. say: prints
    a line.
    """

    def __init__(
        self,
        client: Client,
        template: Template,
        out: Path,
        *,
        root: Path = Path(),
        facts: dict | None = None,
        ahead: int = 3,
        patience: float = 3600,
        say: Callable[[str], None] = print,
    ):
        self.client, self.template, self.out = client, template, Path(out)
        self.root, self.facts = Path(root), facts or {}
        self.ahead, self.patience, self.say = ahead, patience, say
        self.uploaded: dict[Path, str] = {}
        self.losses: dict[str, int] = {}  # by case: times that the server ended while it worked on it
        self.empty: set[str] = set()  # cases that the host's cache has answered without a picture

    def run(self, cases: Sequence[Case]) -> dict:
        self.out.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(self.out)
        with self.ledger.alone():
            check_run(self.out, {"workflow_digest": self.template.digest, **self.facts})
            self.ledger.keep_done(cases)
            self.waiting = deque(case for case in cases if case.name not in self.ledger.lines)
            self.flying: dict[str, tuple[Case, dict]] = {}  # by job, oldest first
            self.total, self.before = len(cases), len(cases) - len(self.waiting)
            self.made = self.failed = 0
            self.began = self.last = time.monotonic()
            if self.before:
                self.say(f"{self.before} of {len(cases)} pictures are there already")
            try:
                while self.waiting or self.flying:
                    self.turn()
            except BaseException:
                self.cancel()
                raise
        return {"pictures": self.before + self.made, "made": self.made, "failed": self.failed, "cases": len(cases)}

    def turn(self) -> None:
        """Fills the server's queue and collects what is done."""
        try:
            while self.waiting and len(self.flying) < self.ahead:
                self.submit(self.waiting.popleft())
            if not self.collect():
                time.sleep(0.2)
        except Away:
            self.await_server()

    def submit(self, case: Case) -> None:
        try:
            images = [self.upload(case, path) for path in case.item.references]
            prompt = self.template.fill(case, images, f"benchmark/{self.out.name or 'run'}")
        except Away:
            self.waiting.appendleft(case)
            raise
        except (WorkflowFileError, OSError) as problem:
            return self.fail(case, str(problem))
        # The name of the job is ours, so that after a lost answer we can ask whether it was taken.
        job, extra = str(uuid.uuid4()), {"extra_pnginfo": {MARK: self.describe(case)}}
        if case.name in self.empty:
            for node in prompt.values():
                if node["class_type"] == "SaveImage":
                    node["inputs"]["filename_prefix"] += "-again"
        body = {"prompt": prompt, "prompt_id": job, "client_id": self.client.id, "extra_data": extra}
        self.flying[job] = (case, prompt)
        try:
            answer = self.ask(self.client.post, "/prompt", json.dumps(body).encode(), "application/json")
        except urllib.error.HTTPError as error:
            del self.flying[job]
            return self.fail(case, refusal(error.read().decode(errors="replace"), prompt, self.template.titles))
        if answer["prompt_id"] != job:
            self.flying[answer["prompt_id"]] = self.flying.pop(job)

    def upload(self, case: Case, path: Path) -> str:
        if path not in self.uploaded:
            name = "".join(c if c.isalnum() or c in "._-" else "_" for c in f"{case.item.subject}-{path.name}")[-100:]
            try:
                self.uploaded[path] = self.ask(self.client.upload, path, name)
            except urllib.error.HTTPError as error:
                raise WorkflowFileError(f"{path.name}: the server did not take it ({error}).") from None
        return self.uploaded[path]

    def collect(self) -> bool:
        """Records the jobs that have ended; those that the server no longer knows wait again. Whether any did."""
        queue = self.ask(self.client.get, "/queue")  # asked first: a job that is not in it must be in the history
        alive = {str(entry[1]) for entries in queue.values() for entry in entries}
        ended, first = [job for job in self.flying if job not in alive], next(iter(self.flying), None)
        for job in ended:
            case, prompt = self.flying[job]
            entry = self.ask(self.client.get, f"/history/{job}").get(job)
            if entry is None:
                del self.flying[job]
                self.lost(case, was_running=job == first)
            else:
                self.finish(case, prompt, entry)
                del self.flying[job]
        return bool(ended)

    def lost(self, case: Case, was_running: bool) -> None:
        """The server has forgotten the job: it ended in between, and the oldest job is the one it worked on."""
        self.losses[case.name] = self.losses.get(case.name, 0) + was_running
        if self.losses[case.name] >= LOSSES:
            return self.fail(case, f"The server ended {LOSSES} times while it worked on this; its own log says why.")
        self.waiting.appendleft(case)

    def finish(self, case: Case, prompt: dict, entry: dict) -> None:
        status = entry.get("status") or {}
        for kind, message in status.get("messages", []):
            if kind == "execution_error":
                name = title(str(message.get("node_id")), prompt, self.template.titles)
                return self.fail(case, f"{name}: {message.get('exception_message', '').strip()}")
            if kind == "execution_interrupted":
                return self.fail(case, "It was interrupted on the server.")
        if status.get("status_str", "success") != "success":
            return self.fail(case, f"The run failed: {status}")
        outputs = entry.get("outputs", {}).values()
        images = [image for output in outputs for image in output.get("images", []) if image.get("type") == "output"]
        if not images and case.name not in self.empty:  # an equal job was run before: older hosts then name no picture
            self.empty.add(case.name)
            return self.waiting.append(case)
        if len(images) != 1:
            return self.fail(
                case, f"{len(images)} pictures were saved, expected one: batch size 1 and one Save Image node."
            )
        try:
            data = self.ask(self.client.fetch, images[0])
            data = with_texts(data, {"prompt": json.dumps(prompt), MARK: json.dumps(self.describe(case))})
        except (urllib.error.HTTPError, ValueError) as error:
            return self.fail(case, f"{images[0].get('filename')}: the picture could not be fetched ({error})")
        self.keep_scores(case, entry)
        write(self.out / f"{case.name}.png", data)
        now = time.monotonic()
        seconds, self.last = round(now - self.last, 2), now
        graph = {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in prompt.items()}
        self.ledger.add(
            self.describe(case)
            | {"status": "done", "picture": f"{case.name}.png", "seconds": seconds, "settings": graph}
        )
        self.made += 1
        self.tell(case, f"{seconds:.1f} s")

    def keep_scores(self, case: Case, entry: dict) -> None:
        """Reports in JSON that the workflow shows (a score node's `json` in a Preview as Text) go to scores/."""
        texts = [
            text for output in entry["outputs"].values() for text in output.get("text", ()) if isinstance(text, str)
        ]
        for number, text in enumerate(text for text in texts if is_report(text)):
            (self.out / "scores").mkdir(exist_ok=True)
            write(self.out / "scores" / f"{case.name}-{number}.json", text.encode("utf-8", "backslashreplace"))

    def fail(self, case: Case, error: str) -> None:
        self.last = time.monotonic()
        self.ledger.add(self.describe(case) | {"status": "failed", "error": error})
        self.failed += 1
        self.tell(case, f"FAILED: {error}")

    def describe(self, case: Case) -> dict:
        item = case.item
        return {
            "name": case.name,
            "subject": item.subject,
            "prompt": item.prompt,
            "references": [path.relative_to(self.root).as_posix() for path in item.references],
            "seed": case.seed,
            "take": case.take,
            "workflow": self.facts.get("workflow"),
        }

    def tell(self, case: Case, what: str) -> None:
        here = self.made + self.failed
        left = (self.total - self.before - here) * (time.monotonic() - self.began) / here
        count = f"{self.before + here:{len(str(self.total))}}/{self.total}"
        later = f", {left / 60:.0f} min left" if left > 90 else ""
        self.say(f"{count}  {case.item.subject}: {case.item.prompt[:60]}  {what}{later}")

    def ask(self, call: Callable, *arguments):
        """Any request: Away if nobody answers."""
        try:
            return call(*arguments)
        except urllib.error.HTTPError as error:
            if error.code in GATEWAY:
                raise Away from None
            raise
        except FileNotFoundError:  # a reference that has been removed
            raise
        except (OSError, HTTPException, json.JSONDecodeError):
            raise Away from None

    def await_server(self) -> None:
        if self.client.answers():
            return
        self.say(f"{self.client.address} does not answer; waiting for it")
        began = time.monotonic()
        while not self.client.answers():
            if time.monotonic() - began > self.patience:
                raise RunError(
                    f"{self.client.address} has not answered for {self.patience:.0f} s. Start it again; the same "
                    "command goes on from here."
                )
            time.sleep(1)
        self.say(f"{self.client.address} answers again")
        self.uploaded.clear()  # it may be another server with an empty input folder

    def cancel(self) -> None:
        """Leaves nothing of ours in the server's queue."""
        try:
            self.client.post("/queue", json.dumps({"delete": list(self.flying)}).encode(), "application/json")
        except (OSError, HTTPException, ValueError):  # ValueError: the answer is empty
            pass
        for job in self.flying:
            try:
                if job in {str(entry[1]) for entry in self.client.get("/queue").get("queue_running", [])}:
                    self.client.post("/interrupt", json.dumps({"prompt_id": job}).encode(), "application/json")
            except (OSError, HTTPException, ValueError):
                pass


def is_report(text: str) -> bool:
    try:
        return "figures" in json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return False
