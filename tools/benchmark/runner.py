"""Generates a benchmark's pictures on a running ComfyUI: every case once, however often either side is restarted.

A case is done when its picture is in the run's folder; failed ones are tried again at the next start.
"""

import json
import time
import urllib.error
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

from ...common.files import save_bytes, save_text
from ..comfy_client.client import Client, failure, refusal
from ..comfy_client.workflow import WorkflowFileError, nodes_of
from .ledger import MARK, Ledger, RunError, check_run, with_texts
from .sets import Case
from .template import Template

GATEWAY = (502, 503, 504)  # what a proxy says for a server that is down
LOSSES = 3  # times that the server may end while it works on a case


class _NoAnswerError(Exception):
    """The server did not answer."""


class Benchmark:
    """A run; `Benchmark(client, template, out).run(cases)` leaves every case's picture in `out`.

    `root` is the folder that references are named from, and `facts` are about the run, for run.json. `prefetch` cases
    are in the server's queue at a time, so that it is never idle; `patience` is how many seconds it may not answer.
    """

    def __init__(
        self,
        client: Client,
        template: Template,
        out: Path,
        *,
        root: Path = Path(),
        facts: dict | None = None,
        prefetch: int = 3,
        patience: float = 3600,
        say: Callable[[str], None] = print,
    ):
        self.client, self.template, self.out = client, template, Path(out)
        self.root, self.facts = Path(root), facts or {}
        self.prefetch, self.patience, self.say = prefetch, patience, say
        self.uploaded: dict[Path, str] = {}
        self.losses: dict[str, int] = {}  # by case: times that the server ended while it worked on it
        self.empty: set[str] = set()  # cases that the host's cache has answered without a picture

    def run(self, cases: Sequence[Case]) -> dict:
        """Generates what is missing; returns counts of pictures, made, failed and cases. Raises RunError."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(self.out)
        with self.ledger.alone():
            check_run(self.out, {"workflow_digest": self.template.digest, **self.facts})
            self.ledger.keep_done(cases)
            self.waiting = deque(case for case in cases if case.name not in self.ledger.lines)
            self.queued: dict[str, tuple[Case, dict]] = {}  # by job, oldest first
            self.total, self.before = len(cases), len(cases) - len(self.waiting)
            self.made = self.failed = 0
            self.began = self.last = time.monotonic()
            if self.before:
                self.say(f"{self.before} of {len(cases)} pictures are there already")
            try:
                while self.waiting or self.queued:
                    self._step()
            except BaseException:
                self._cancel()
                raise
        return {"pictures": self.before + self.made, "made": self.made, "failed": self.failed, "cases": len(cases)}

    def _step(self) -> None:
        """Fills the server's queue and collects the jobs that are done."""
        try:
            while self.waiting and len(self.queued) < self.prefetch:
                self._submit(self.waiting.popleft())
            if not self._collect():
                time.sleep(0.2)
        except _NoAnswerError:
            self._await_server()

    def _submit(self, case: Case) -> None:
        try:
            images = [self._upload(case, path) for path in case.item.references]
            prompt = self.template.fill(case, images, f"benchmark/{self.out.name or 'run'}")
        except _NoAnswerError:
            self.waiting.appendleft(case)
            raise
        except (WorkflowFileError, OSError) as error:
            return self._fail(case, str(error))
        # The name of the job is ours, so that after a lost answer we can ask whether it was taken.
        job, extra = str(uuid.uuid4()), {"extra_pnginfo": {MARK: self._describe(case)}}
        if case.name in self.empty:
            for key in nodes_of(prompt, "SaveImage"):
                prompt[key]["inputs"]["filename_prefix"] += "-again"
        body = {"prompt": prompt, "prompt_id": job, "client_id": self.client.id, "extra_data": extra}
        self.queued[job] = (case, prompt)
        try:
            answer = self._request(self.client.post, "/prompt", json.dumps(body).encode(), "application/json")
        except urllib.error.HTTPError as error:
            del self.queued[job]
            return self._fail(case, refusal(error.read().decode(errors="replace"), prompt, self.template.titles))
        if answer["prompt_id"] != job:
            self.queued[answer["prompt_id"]] = self.queued.pop(job)

    def _upload(self, case: Case, path: Path) -> str:
        if path not in self.uploaded:
            name = "".join(c if c.isalnum() or c in "._-" else "_" for c in f"{case.item.subject}-{path.name}")[-100:]
            try:
                self.uploaded[path] = self._request(self.client.upload, path, name)
            except urllib.error.HTTPError as error:
                raise WorkflowFileError(f"{path.name}: the server did not take it ({error}).") from None
        return self.uploaded[path]

    def _collect(self) -> bool:
        """Records the jobs that have ended; those that the server no longer knows wait again. Whether any did."""
        queue = self._request(self.client.get, "/queue")  # asked first: a job that is not in it must be in the history
        alive = {str(entry[1]) for entries in queue.values() for entry in entries}
        ended, first = [job for job in self.queued if job not in alive], next(iter(self.queued), None)
        for job in ended:
            case, prompt = self.queued[job]
            entry = self._request(self.client.get, f"/history/{job}").get(job)
            if entry is None:
                del self.queued[job]
                self._lost(case, was_running=job == first)
            else:
                self._finish(case, prompt, entry)
                del self.queued[job]
        return bool(ended)

    def _lost(self, case: Case, was_running: bool) -> None:
        """The server has forgotten the job: it ended in between, and the oldest job is the one it worked on."""
        self.losses[case.name] = self.losses.get(case.name, 0) + was_running
        if self.losses[case.name] >= LOSSES:
            return self._fail(case, f"The server ended {LOSSES} times while it worked on this; its own log says why.")
        self.waiting.appendleft(case)

    def _finish(self, case: Case, prompt: dict, entry: dict) -> None:
        if problem := failure(entry, prompt, self.template.titles):
            return self._fail(case, problem)
        outputs = entry.get("outputs", {}).values()
        images = [image for output in outputs for image in output.get("images", []) if image.get("type") == "output"]
        if not images and case.name not in self.empty:  # an equal job was run before: older hosts then name no picture
            self.empty.add(case.name)
            return self.waiting.append(case)
        if len(images) != 1:
            expected = "expected one: batch size 1 and one Save Image node."
            return self._fail(case, f"{len(images)} pictures were saved, {expected}")
        try:
            data = self._request(self.client.fetch, images[0])
            data = with_texts(data, {"prompt": json.dumps(prompt), MARK: json.dumps(self._describe(case))})
        except (urllib.error.HTTPError, ValueError) as error:
            return self._fail(case, f"{images[0].get('filename')}: the picture could not be fetched ({error})")
        self._save_scores(case, entry)
        save_bytes(self.out / f"{case.name}.png", data)
        now = time.monotonic()
        seconds, self.last = round(now - self.last, 2), now
        graph = {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in prompt.items()}
        done = {"status": "done", "picture": f"{case.name}.png", "seconds": seconds, "settings": graph}
        self.ledger.add(self._describe(case) | done)
        self.made += 1
        self._report(case, f"{seconds:.1f} s")

    def _save_scores(self, case: Case, entry: dict) -> None:
        """Writes the JSON reports that the workflow shows (a score node's `json` in a Preview as Text) to scores/."""
        texts = [text for output in entry["outputs"].values() for text in output.get("text", ())]
        for number, text in enumerate(filter(_is_report, texts)):
            (self.out / "scores").mkdir(exist_ok=True)
            save_text(self.out / "scores" / f"{case.name}-{number}.json", text)

    def _fail(self, case: Case, error: str) -> None:
        self.last = time.monotonic()
        self.ledger.add(self._describe(case) | {"status": "failed", "error": error})
        self.failed += 1
        self._report(case, f"FAILED: {error}")

    def _describe(self, case: Case) -> dict:
        item, names = case.item, [path.relative_to(self.root).as_posix() for path in case.item.references]
        shown = {"name": case.name, "subject": item.subject, "prompt": item.prompt, "references": names}
        return shown | {"seed": case.seed, "take": case.take, "workflow": self.facts.get("workflow")}

    def _report(self, case: Case, what: str) -> None:
        here = self.made + self.failed
        left = (self.total - self.before - here) * (time.monotonic() - self.began) / here
        count = f"{self.before + here:{len(str(self.total))}}/{self.total}"
        later = f", {left / 60:.0f} min left" if left > 90 else ""
        self.say(f"{count}  {case.item.subject}: {case.item.prompt[:60]}  {what}{later}")

    def _request(self, call: Callable, *arguments):
        """Any request; raises _NoAnswerError if the server does not answer."""
        try:
            return call(*arguments)
        except urllib.error.HTTPError as error:
            if error.code in GATEWAY:
                raise _NoAnswerError from None
            raise
        except FileNotFoundError:  # a reference that has been removed
            raise
        except (OSError, HTTPException, json.JSONDecodeError):
            raise _NoAnswerError from None

    def _await_server(self) -> None:
        if self.client.answers():
            return
        self.say(f"{self.client.address} does not answer; waiting for it")
        began = time.monotonic()
        while not self.client.answers():
            if time.monotonic() - began > self.patience:
                raise RunError(
                    f"{self.client.address} has not answered for {self.patience:.0f} s. Start it again; the same "
                    "command continues the run."
                )
            time.sleep(1)
        self.say(f"{self.client.address} answers again")
        self.uploaded.clear()  # it may be another server with an empty input folder

    def _cancel(self) -> None:
        """Removes our jobs from the server's queue."""
        failures = OSError, HTTPException, ValueError  # ValueError: the answer is empty
        with suppress(*failures):
            self.client.post("/queue", json.dumps({"delete": list(self.queued)}).encode(), "application/json")
        for job in self.queued:
            with suppress(*failures):
                if job in {str(entry[1]) for entry in self.client.get("/queue").get("queue_running", [])}:
                    self.client.post("/interrupt", json.dumps({"prompt_id": job}).encode(), "application/json")


def _is_report(text: object) -> bool:
    try:
        return isinstance(text, str) and "figures" in json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return False
