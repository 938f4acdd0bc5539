"""The jobs of one server in a benchmark's run: it takes cases, collects pictures, and returns cases when lost."""

import json
import time
import urllib.error
import uuid
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

from ..comfy_client.client import ABSENT, ODD, Client, failure, refusal, why
from ..comfy_client.workflow import WorkflowFileError, nodes_of
from .case_queue import TIMES, CaseQueue, ServerState
from .ledger import MARK
from .servers import missing_now
from .sets import Case

# What a server, or a proxy for one that is down, says of itself and not of a case: no access, busy, too slow, gone.
NOT_THE_CASE = (401, 403, 408, 429, 502, 503, 504)
POLL = 0.2  # s, between looks for jobs that have ended
LONGEST_PAUSE = 15  # s, between looks for a lost server


class _NoAnswerError(Exception):
    """The server did not answer, or refused what is no fault of the case; the text says why."""


class Worker(ServerState):
    """One server's part in a run: `run()`, on a thread of its own, takes cases until all are done.

    Args:
        client: Of the server.
        queue: The run's cases.
        patience: How long the server may work on a case where another could do it, s.
    """

    def __init__(self, client: Client, queue: CaseQueue, patience: float):
        super().__init__(client)
        self.queue, self.patience = queue, patience
        self.abandoned: list[str] = []  # jobs whose cases were given back; the server may still know them
        self.accepted: set[str] = set()  # jobs that the server has said it took
        self.uploaded: dict[Path, str] = {}
        self.errors = 0  # requests in a row without an answer
        self.shows_queue = True

    def run(self) -> None:
        """Takes cases and collects pictures until the run is over or this server is out."""
        over, pause = self.queue.over, 1.0
        while not over.is_set() and not self.out:
            try:
                if self.problem:
                    over.wait(pause)
                    pause = min(1.5 * pause, LONGEST_PAUSE)
                    self._try_again()
                else:
                    self._step()
                    pause = 1.0
            except _NoAnswerError as error:
                self._no_answer(str(error))

    def _step(self) -> None:
        """Fills the server's queue and collects the jobs that are done."""
        while (case := self.queue.take(self)) is not None:
            self._submit(case)
        if not self._collect():
            self.queue.over.wait(POLL if self.shows_queue else 5 * POLL)
        if self.strikes >= TIMES:
            self._leave("fails what others draw")
        slow = self.jobs and time.monotonic() - self.progress > self.patience
        if slow and (self.queue.others(self) or not self.shows_queue):
            self._leave(f"has finished nothing for {self.patience:.0f} s", worked=True)

    def _submit(self, case: Case) -> None:
        try:
            images = [self._upload(case, path) for path in case.item.references]
            prompt = self.queue.fill(case, images)
        except _NoAnswerError:
            self.queue.give_back(case)
            raise
        except urllib.error.HTTPError as error:
            return self.queue.failed(self, case, f"The server did not take a reference ({error}).")
        except (WorkflowFileError, OSError) as error:
            return self.queue.record_failure(case, str(error), self)
        # The name of the job is ours, so that after a lost answer we can ask whether it was taken.
        job, extra = str(uuid.uuid4()), {"extra_pnginfo": {MARK: self.queue.describe(case)}}
        if case.name in self.queue.empty:
            for key in nodes_of(prompt, "SaveImage"):
                prompt[key]["inputs"]["filename_prefix"] += "-again"
        body = {"prompt": prompt, "prompt_id": job, "client_id": self.client.id, "extra_data": extra}
        if not self.jobs:
            self.progress = time.monotonic()
        self.jobs[job] = (case, prompt)
        try:
            answer = self._request(self.client.post, "/prompt", json.dumps(body).encode(), "application/json")
            if not isinstance(named := answer["prompt_id"], str):
                raise TypeError
        except urllib.error.HTTPError as error:
            del self.jobs[job]
            if error.code in ABSENT:
                self.queue.give_back(case)
                raise _NoAnswerError(f"{why(error)} for /prompt") from None
            text = refusal(error.read().decode(errors="replace"), prompt, self.queue.template.titles)
            return self.queue.failed(self, case, text)
        except _NoAnswerError:
            if not self.shows_queue:  # nor can it be asked whether it has taken the job
                del self.jobs[job]
                self.queue.give_back(case)
            raise
        except (KeyError, TypeError):
            del self.jobs[job]
            self.queue.give_back(case)
            raise _NoAnswerError("its answer to a job has no prompt_id") from None
        self.errors, self.away_since = 0, 0.0
        if named != job:
            self.jobs[named] = self.jobs.pop(job)
        self.accepted.add(named)

    def _upload(self, case: Case, path: Path) -> str:
        if path not in self.uploaded:
            name = "".join(c if c.isalnum() or c in "._-" else "_" for c in f"{case.item.subject}-{path.name}")[-100:]
            self.uploaded[path] = self._request(self.client.upload, path, name)
        return self.uploaded[path]

    def _collect(self) -> bool:
        """Records the jobs that have ended; those that the server no longer knows are given back. Whether any did."""
        queued = self._queued()  # asked first: a job that is not in it must be in the history
        found, first = False, next(iter(self.jobs), None)
        for job in [job for job in self.jobs if queued is None or job not in queued]:
            case, prompt = self.jobs[job]
            entry = self._history(job)
            if entry is None and queued is None:
                continue
            if entry is None:
                del self.jobs[job]
                self.queue.lost(case, worked=job == first and job in self.accepted)
            else:
                self._finish(case, prompt, entry)
                del self.jobs[job]
            found, self.progress = True, time.monotonic()
        return found

    def _queued(self) -> set[str] | None:
        """Ids of the jobs in the server's queue; None where it does not show that."""
        if not self.shows_queue:
            return None
        try:
            queue = self._request(self.client.get, "/queue")
            return {str(entry[1]) for entries in queue.values() for entry in entries}
        except urllib.error.HTTPError as error:
            if error.code not in ABSENT:
                raise _NoAnswerError(why(error)) from None
        except (AttributeError, TypeError, IndexError):  # some other list
            pass
        self.shows_queue = False
        self.queue.say(f"{self.client.address} does not show its queue: each job is asked for by its name")
        return None

    def _history(self, job: str) -> dict | None:
        """The server's record of a job that has ended."""

        def read() -> dict | None:
            entry = self.client.get(f"/history/{job}").get(job)
            status = ((entry or {}).get("status") or {}).get("status_str", "success")
            return entry if self.shows_queue or status in ("success", "error") else None

        try:
            return self._request(read)
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise _NoAnswerError(why(error)) from None
            return None

    def _finish(self, case: Case, prompt: dict, entry: dict) -> None:
        queue = self.queue
        try:
            if problem := failure(entry, prompt, queue.template.titles):
                return queue.failed(self, case, problem)
            outputs = entry.get("outputs", {}).values()
            images = [image for one in outputs for image in one.get("images", []) if image.get("type") == "output"]
        except ODD as error:
            return queue.failed(self, case, f"The server's record of the job cannot be read ({error!r}).")
        if not images and case.name not in queue.empty:  # an equal job was run before: older hosts name no picture
            queue.empty.add(case.name)
            return queue.give_back(case, last=True)
        if len(images) != 1:
            expected = "expected one: batch size 1 and one Save Image node."
            return queue.failed(self, case, f"{len(images)} pictures were saved, {expected}")
        try:
            data = self._request(self.client.fetch, images[0])
            queue.record(self, case, prompt, entry, data)
        except (urllib.error.HTTPError, *ODD) as error:
            queue.failed(self, case, f"{images[0].get('filename')}: the picture could not be fetched ({error})")

    def _request(self, call: Callable, *arguments):
        """Any request; raises _NoAnswerError if the server does not answer."""
        try:
            return call(*arguments)
        except urllib.error.HTTPError as error:
            if error.code in NOT_THE_CASE:
                raise _NoAnswerError(why(error)) from None
            raise
        except FileNotFoundError:  # a reference that has been removed
            raise
        except (OSError, HTTPException) as error:
            raise _NoAnswerError(why(error)) from None
        except ODD as error:
            raise _NoAnswerError(f"its answer is not as ComfyUI's: {error!r}") from None

    def _no_answer(self, reason: str) -> None:
        """After a request without an answer: whether the server is lost; then others get its cases."""
        self.errors += 1
        known, away = self.away_since, self.client.problem()
        self.problem = away or (reason if self.errors >= TIMES else "")
        if not self.problem:
            self.queue.over.wait(5 * POLL)
            return
        if not known:
            self.away_since, self.times_lost = time.monotonic(), self.times_lost + 1
            others = " Others get its cases." if self.queue.others(self) else ""
            self.queue.say(f"{self.client.address} does not answer ({self.problem}); waiting for it.{others}")
        self._give_back(worked=bool(away))  # no case has ended a server that still answers

    def _give_back(self, worked: bool = True, always: bool = False) -> None:
        """Returns the cases of unfinished jobs, if another server can draw them or `always`."""
        if self.jobs and (always or self.queue.others(self)):
            first = next(iter(self.jobs))
            for job, (case, _) in reversed(self.jobs.items()):
                self.queue.lost(case, worked=worked and job == first and job in self.accepted)
            self.abandoned += self.jobs
            self.jobs = {}

    def _try_again(self) -> None:
        """Looks for a lost server. It comes back without the jobs that were given to others."""
        self._give_back()  # another one may be back
        if problem := self.client.problem():
            self.problem = problem
            return
        if lacks := missing_now(self.client, self.queue.template.prompt):
            return self._leave(f"lacks {', '.join(lacks)}")
        self.cancel(self.abandoned)
        self.abandoned = []
        self.uploaded.clear()  # it may be another server with an empty input folder
        self.problem, self.progress = "", time.monotonic()
        if self.errors < TIMES:  # else it does answer, but takes no jobs
            self.away_since = 0.0
            self.queue.say(f"{self.client.address} answers again")

    def _leave(self, reason: str, worked: bool = False) -> None:
        """Takes no more cases in this run."""
        self.out = reason
        self.queue.say(f"{self.client.address} {reason}; it gets no more cases in this run.")
        self._give_back(worked, always=True)
        self.cancel(self.abandoned)

    def cancel(self, jobs: list[str]) -> None:
        """Removes jobs from the server's queue, and ends the one that is running."""
        failures = OSError, HTTPException, ValueError, AttributeError, TypeError, IndexError  # or answers of no use
        if not jobs or not self.shows_queue:
            return
        with suppress(*failures):
            self.client.post("/queue", json.dumps({"delete": jobs}).encode(), "application/json", timeout=10)
        for job in jobs:
            with suppress(*failures):
                running = {str(entry[1]) for entry in self.client.get("/queue", timeout=10).get("queue_running", [])}
                if job in running:
                    body = json.dumps({"prompt_id": job}).encode()
                    self.client.post("/interrupt", body, "application/json", timeout=10)
