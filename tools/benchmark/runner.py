"""Generates a benchmark's pictures on running ComfyUIs: every case once, however often any side is restarted.

A case is done when its picture is in the run's folder; failed ones are tried again at the next start.
"""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ..comfy_client.client import Client
from .case_queue import CaseQueue
from .ledger import Ledger, RunError, check_run
from .sets import Case
from .template import Template
from .worker import Worker


class Benchmark:
    """A run; `Benchmark(clients, template, out).run(cases)` leaves every case's picture in `out`.

    Args:
        clients: Of the servers, which are equal but for their speed. Each takes cases one by one, so that a faster one
            does more.
        template: The workflow.
        out: The run's folder.
        facts: About the run, for run.json.
        patience: How long all servers may not answer, and one of several may work on a case, s.
        **settings: See CaseQueue.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        template: Template,
        out: Path,
        *,
        facts: dict | None = None,
        patience: float = 3600,
        **settings,
    ):
        self.facts, self.patience = {"workflow_digest": template.digest, **(facts or {})}, patience
        self.queue = CaseQueue(template, out, workflow=self.facts.get("workflow"), **settings)
        self.workers = [Worker(client, self.queue, patience) for client in clients]
        self.queue.servers = [*self.workers]
        self._error: BaseException | None = None  # in a worker

    def run(self, cases: Sequence[Case]) -> dict:
        """Generates what is missing; returns counts of pictures, made, failed and cases. Raises RunError."""
        queue = self.queue
        queue.out.mkdir(parents=True, exist_ok=True)
        with Ledger(queue.out).alone():
            check_run(queue.out, self.facts)
            queue.begin(cases)
            if queue.before:
                queue.say(f"{queue.before} of {len(cases)} pictures are there already")
            threads = [threading.Thread(target=self._work, args=(worker,), daemon=True) for worker in self.workers]
            try:
                for thread in threads:
                    thread.start()
                while not queue.done:
                    queue.over.wait(0.2)
                    self._check_workers()
                    queue.settle()
            except BaseException:
                queue.over.set()
                for thread in threads:  # one may be sending a job
                    thread.join(5)
                for worker in self.workers:
                    worker.cancel([*worker.jobs] if worker.usable else [])
                raise
            queue.over.set()
            queue.ledger.sort(cases)
        made = {"pictures": queue.before + queue.made, "made": queue.made}
        return {**made, "failed": queue.failures, "cases": len(cases)}

    def _work(self, worker: Worker) -> None:
        try:
            worker.run()
        except BaseException as error:  # a full disk: the run's own, raised where it began
            self._error = self._error or error
            self.queue.over.set()

    def _check_workers(self) -> None:
        """Ends a run that has no server left."""
        if self._error:
            raise self._error
        now = time.monotonic()
        if all(w.out or (w.away_since and now - w.away_since > self.patience) for w in self.workers):
            lines = [
                f"{w.client.address} {w.out or f'has not answered for {self.patience:.0f} s ({w.problem})'}."
                for w in self.workers
            ]
            text = "No server is left. Start one again; the same command continues the run."
            raise RunError("\n".join([*lines, text]))
