"""A benchmark as a queue of prompts on a running ComfyUI: every case once, whatever happens to either side.

The folder of a run holds the pictures, `ledger.jsonl` with a line for each case, and `run.json`, which says what
workflow they come from. A case is done when its picture lies in the folder; failed ones are tried again at the next
start. Only HTTP is spoken, through demo/host.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import time
import urllib.error
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from PIL import Image

from ..demo import workflow
from ..demo.host import Client, refusal, title
from ..demo.workflow import WorkflowFileError
from .benchmark_sets import Case

MARK = "subject_benchmark"  # the case, among a PNG's texts
LEDGER, RUN = "ledger.jsonl", "run.json"
GATEWAY = (502, 503, 504)  # what a proxy says for a server that is down
LOSSES = 3  # times that the server may end while it works on a case


class RunError(ValueError):
    """A run that cannot begin; the text says what to do."""


class Away(Exception):
    """The server did not answer."""


class Template:
    """A workflow in API format with places for a case's references, prompt and seed.

    prompt: see demo/workflow.py's to_api. object_info: the server's. prompt_node: id of the node that holds the prompt,
    where the choice of demo/workflow.py's text_inputs is not wanted.
    """

    def __init__(self, prompt: dict, object_info: dict, prompt_node: str | None = None):
        self.prompt, self.object_info, self.titles = prompt, object_info, workflow.titles(prompt)
        if prompt_node is None:
            self.places = workflow.text_inputs(prompt)
        elif prompt_node not in prompt:
            raise WorkflowFileError(f"--prompt-node is {prompt_node}, expected one of {', '.join(prompt)}.")
        else:
            names = [name for name in workflow.TEXTS if name in prompt[prompt_node]["inputs"]]
            if not names:
                raise WorkflowFileError(f"--prompt-node: {title(prompt_node, prompt, self.titles)} has no text.")
            self.places = [workflow.text_source(prompt, prompt_node, name) for name in names]
        self.seeds = seed_inputs(prompt)
        if not self.seeds:
            raise WorkflowFileError("This workflow has no seed, so its pictures could not be told apart.")
        self.loaders = sorted(
            (key for key, n in prompt.items() if n["class_type"] == "LoadImage"), key=workflow.by_number
        )
        if not any(node["class_type"] == "SaveImage" for node in prompt.values()):
            raise WorkflowFileError("This workflow has no Save Image node, so there is no picture to collect.")

    @property
    def digest(self) -> str:
        """Of nodes, links and settings, whatever stands in the places."""
        prompt = self._fill("", [""] * len(self.loaders), 0, "")
        return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()

    def fill(self, case: Case, images: Sequence[str], folder: str) -> dict:
        """The case's own workflow. images: names of its references on the server. Load Image nodes without a reference
        are taken out, as if they were bypassed. Raises WorkflowFileError where there are too few."""
        prompt = self._fill(case.item.prompt, images, case.seed, f"{folder}/{case.name}")
        for loader in self.loaders[len(images) :]:
            bypass(prompt, loader, self.object_info)
        if not any(node["class_type"] == "SaveImage" for node in prompt.values()):
            raise WorkflowFileError(
                f"This workflow draws nothing from {len(images)} reference(s): it has {len(self.loaders)} Load Image "
                "nodes and needs them all. Give more (--references), or take nodes out."
            )
        return prompt

    def _fill(self, text: str, images: Sequence[str], seed: int, file: str) -> dict:
        prompt = workflow.put_in(self.prompt, list(images))
        for key, name in self.places:
            prompt[key]["inputs"][name] = text
        for key, name in self.seeds:
            prompt[key]["inputs"][name] = seed
        for node in prompt.values():
            if node["class_type"] == "SaveImage":
                node["inputs"]["filename_prefix"] = file
        return prompt


def seed_inputs(prompt: dict) -> list[tuple[str, str]]:
    """(node, input) pairs where the workflow's seeds are written, through the links to them."""
    found = []
    for key, node in prompt.items():
        for name in ("seed", "noise_seed"):
            place, value = (key, name), node["inputs"].get(name)
            if isinstance(value, list) and value[0] in prompt:
                place = (value[0], "value")
                value = prompt[value[0]]["inputs"].get("value")
            if isinstance(value, int) and not isinstance(value, bool):
                found.append(place)
    return list(dict.fromkeys(found))


def bypass(prompt: dict, key: str, object_info: dict) -> None:
    """Takes a node out, as the editor's bypass does: what it handed on comes from its own input of that type, if there
    is one. A node that needs what is then missing is bypassed too."""
    node = prompt.pop(key)
    info = object_info[node["class_type"]]
    types = {
        name: spec[0] for group in info["input"].values() if isinstance(group, dict) for name, spec in group.items()
    }
    links = [(types.get(name), value) for name, value in node["inputs"].items() if isinstance(value, list)]
    for other in list(prompt):
        for name, value in list(prompt.get(other, {"inputs": {}})["inputs"].items()):
            if not isinstance(value, list) or value[0] != key:
                continue
            kind = info["output"][value[1]]
            through = next((link for type_, link in links if type_ == kind and link[0] in prompt), None)
            if through:
                prompt[other]["inputs"][name] = through
                continue
            del prompt[other]["inputs"][name]
            if name in object_info[prompt[other]["class_type"]]["input"].get("required", {}):
                bypass(prompt, other, object_info)
                break


class Ledger:
    """A line for each case, appended at once and whole; the last line of a name counts."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / LEDGER
        self.lines: dict[str, dict] = {}
        self.damaged = 0
        for line in self.path.read_bytes().split(b"\n") if self.path.is_file() else ():
            try:
                entry = json.loads(line) if line.strip() else None
                if entry is not None:
                    self.lines[entry["name"]] = entry
            except (ValueError, TypeError, KeyError):  # cut off by a full disk or a kill
                self.damaged += 1

    def add(self, entry: dict) -> None:
        self.lines[entry["name"]] = entry
        line = json.dumps(entry, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(file, line) != len(line):
                raise OSError(f"{self.path}: the line was not written whole, is the disk full?")
            os.fsync(file)
        finally:
            os.close(file)

    def keep_done(self, wanted: Sequence[Case]) -> None:
        """Leaves one line for each picture that is there: failures are to be tried again, lost pictures made again, and
        a picture of a wanted case that no line speaks of, since its run was killed in between, gets its line."""
        kept = {name: entry for name, entry in self.lines.items() if self.picture(entry)}
        for case in wanted:
            path = self.folder / f"{case.name}.png"
            if case.name not in kept and (found := read_mark(path)):
                kept[case.name] = found | {"status": "done", "picture": path.name}
        self.lines = kept
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept.values())
        write(self.path, text.encode("utf-8", "backslashreplace"))

    def picture(self, entry: dict) -> bool:
        name = entry.get("picture")
        return entry.get("status") == "done" and isinstance(name, str) and (self.folder / Path(name).name).is_file()

    @contextmanager
    def alone(self):
        """Refuses a second run in the same folder."""
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        with open(self.folder / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(f"{self.folder}: another run writes here; wait for it, or use another --out.") from None
            yield


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


def check_run(out: Path, facts: dict) -> None:
    """One folder holds the pictures of one workflow. Raises RunError for another one's."""
    path = out / RUN
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["workflow_digest"] != facts["workflow_digest"]:
            raise RunError(
                f"{out}: holds the pictures of another workflow or of other settings ({found.get('workflow')}). Use "
                f"another --out, or remove {path.name} if they may lie together."
            )
    except FileNotFoundError:
        pass
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise RunError(
            f"{path}: is damaged ({error}). Remove it if the folder's pictures are this workflow's."
        ) from None
    write(path, json.dumps(facts, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))


def is_report(text: str) -> bool:
    try:
        return "figures" in json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return False


def write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    work = path.with_name(f".{path.name}.part")
    with open(work, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(work, path)


def with_texts(data: bytes, texts: dict[str, str]) -> bytes:
    """A PNG with these texts where it has none of that name (a server may be told to save none). Raises ValueError for
    what is no whole PNG."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            kind, found = picture.format, getattr(picture, "text", {})
    except Exception as error:  # Pillow's readers raise nearly everything on damaged files
        raise ValueError(f"is no picture: {error}") from error
    if kind != "PNG":
        raise ValueError(f"is {kind}, expected PNG")
    chunks = b""
    for name, text in texts.items():
        if name not in found:
            chunk = b"iTXt" + name.encode("latin-1") + b"\0\0\0\0\0" + text.encode("utf-8", "backslashreplace")
            chunks += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    end = data.rindex(b"IEND") - 4
    return data[:end] + chunks + data[end:]


def read_mark(path: Path) -> dict | None:
    """The case that a picture says it shows; None for no such picture."""
    try:
        with Image.open(path) as picture:
            picture.load()
            found = json.loads(picture.text[MARK])
    except Exception:  # not there, cut off, or somebody else's: it is made again
        return None
    return found if isinstance(found, dict) and found.get("name") == path.stem else None
