"""A real ComfyUI server of one's own: started on a free loopback port with only this pack, spoken to over HTTP, ended
for sure.

Everything it writes lies in a folder given to it (models, custom_nodes, input, output, user); the checkout is only
read.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

from ...common.bootstrap import ROOT
from . import keeper

PACK = "subject-dla"
POSIX = os.name == "posix"
START_SECONDS = 300


class HostProblem(RuntimeError):
    """The server did not start, died, or refused; the text has its own last words."""


class WorkflowProblem(RuntimeError):
    """A workflow that the server refused or that failed in a node; the text names node and cause."""


class Server:
    """`with Server(comfyui, base) as server:` a running host; `server.client` speaks to it.

    comfyui: the checkout. base: folder for everything the server reads and writes. packs: folders linked into
    custom_nodes
    and enabled, by name. models: further folders laid out like ComfyUI's `models`. arguments: further ones for main.py.
    """

    def __init__(self, comfyui, base, *, packs=None, models=(), arguments=(), python=sys.executable, port=0):
        self.comfyui, self.base = Path(comfyui).resolve(), Path(base).resolve()
        self.packs = {PACK: ROOT} if packs is None else packs
        self.models, self.arguments, self.python = models, arguments, python
        self.port = port or free_port()
        self.log = self.base / "server.log"
        self.process = None

    def __enter__(self) -> Server:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> Client:
        return Client(self.address, alive=lambda: self.process.poll() is None, last_words=self.last_words)

    def start(self) -> None:
        for name in ("custom_nodes", "input", "output", "temp", "user", "models/dla"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for name, folder in self.packs.items():
            link(Path(folder), self.base / "custom_nodes" / name)
        command = [self.python, str(self.comfyui / "main.py"), "--listen", "127.0.0.1", "--port", str(self.port)]
        command += [
            "--base-directory",
            str(self.base),
            "--database-url",
            f"sqlite:///{self.base / 'user' / 'comfyui.db'}",
        ]
        command += ["--disable-auto-launch", "--disable-api-nodes"]
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", *self.packs]
        if self.models:
            paths = self.base / "extra_model_paths.yaml"
            folders = [self.base / "models", *self.models]  # its own first: what is trained is written there
            paths.write_text("\n".join(model_paths(folders)), encoding="utf-8")
            command += ["--extra-model-paths-config", str(paths)]
        command += self.arguments
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONIOENCODING": "utf-8",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        # The keeper (below) leads a process group of its own, so that Ctrl-C reaches us first, and ends when our pipe
        # closes.
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [self.python, keeper.__file__, *command],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                cwd=self.base, env=environment, start_new_session=POSIX,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not self.client.answers():
            if self.process.poll() is not None:
                raise HostProblem(f"ComfyUI did not start (exit code {self.process.returncode}).\n{self.last_words()}")
            if time.monotonic() > deadline:
                raise HostProblem(f"ComfyUI did not answer within {START_SECONDS} s.\n{self.last_words()}")
            time.sleep(0.3)
        self.check_packs()

    def check_packs(self) -> None:
        """A pack that fails to import leaves only a line in the log."""
        log = self.log.read_text(encoding="utf-8", errors="replace")
        bad = [line for line in log.splitlines() if "(IMPORT FAILED)" in line or "comfy_entrypoint" in line]
        if bad:
            raise HostProblem("ComfyUI started without the pack:\n" + "\n".join(bad) + f"\n{self.last_words()}")

    def last_words(self, lines: int = 30) -> str:
        if not self.log.exists():
            return ""
        text = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
        return "\n".join(["Its last words:", *("    " + line for line in text), f"(all of them: {self.log})"])

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            end_group(self.process)


def link(folder: Path, place: Path) -> None:
    """`place` shows `folder`: a symbolic link, or a copy where the system allows none."""
    if place.is_symlink() or place.exists():
        return
    try:
        place.symlink_to(folder, target_is_directory=True)
    except OSError:
        shutil.copytree(folder, place, ignore=shutil.ignore_patterns(".*", "__pycache__", "output"))


def model_paths(folders) -> list[str]:
    """Lines of an extra_model_paths.yaml that adds every sub-folder of these `models` folders under its own name."""
    lines = []
    for number, folder in enumerate(folders):
        lines += [f"folder{number}:", f"    base_path: {json.dumps(str(Path(folder).resolve()))}"]
        lines += [f"    {kind.name}: {kind.name}" for kind in sorted(Path(folder).iterdir()) if kind.is_dir()]
    return lines


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Client:
    """The host's HTTP interface: what there is, upload, queue, wait, fetch."""

    def __init__(
        self, address: str, *, alive: Callable[[], bool] = lambda: True, last_words: Callable[[], str] = lambda: ""
    ):
        self.address, self.alive, self.last_words = address, alive, last_words
        self.id = uuid.uuid4().hex

    def answers(self) -> bool:
        try:
            self.get("/system_stats", timeout=5)
            return True
        except (OSError, HostProblem):
            return False

    def get(self, path: str, timeout: float = 60):
        with urllib.request.urlopen(self.address + path, timeout=timeout) as answer:
            return json.load(answer)

    def post(self, path: str, body: bytes, kind: str):
        request = urllib.request.Request(self.address + path, body, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def version(self) -> str:
        return self.get("/system_stats")["system"].get("comfyui_version", "unknown")

    def object_info(self) -> dict:
        return self.get("/object_info")

    def upload(self, image: Path, name: str = "") -> str:
        """Puts a picture into the server's input folder, as `name` if given; the name that LoadImage knows it by."""
        mark = uuid.uuid4().hex
        name = urllib.parse.quote(name or image.name, safe=" .-_()")
        head = f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        head += "Content-Type: image/*\r\n\r\n"
        answer = self.post(
            "/upload/image", head.encode() + image.read_bytes() + f"\r\n--{mark}--\r\n".encode(),
            f"multipart/form-data; boundary={mark}",
        )  # fmt: skip
        return "/".join(filter(None, [answer.get("subfolder"), answer["name"]]))

    def queue(self, prompt: dict, titles: dict[str, str] | None = None) -> str:
        """Queues a workflow in API format; its id. titles: names of nodes by id, for errors."""
        body = json.dumps({"prompt": prompt, "client_id": self.id}).encode()
        try:
            return self.post("/prompt", body, "application/json")["prompt_id"]
        except urllib.error.HTTPError as error:
            raise WorkflowProblem(refusal(error.read().decode(errors="replace"), prompt, titles or {})) from None

    def wait(
        self, job: str, prompt: dict, titles=None, progress: Callable[[str, int, int], None] | None = None
    ) -> dict:
        """The job's outputs by node id, once it is done. progress(node, value, of) is called as the server reports
        it."""
        listener = Listener(self.address, self.id, progress) if progress else None
        try:
            while True:
                if not self.alive():
                    raise HostProblem(f"ComfyUI ended during the run.\n{self.last_words()}")
                entry = self.get(f"/history/{job}").get(job)
                if entry and entry.get("status", {}).get("completed") is not None:
                    break
                time.sleep(0.25)
        finally:
            if listener:
                listener.close()
        for kind, message in entry["status"].get("messages", []):
            if kind == "execution_error":
                name = title(str(message.get("node_id")), prompt, titles or {})
                raise WorkflowProblem(f"{name}: {message.get('exception_message', '').strip()}")
            if kind == "execution_interrupted":
                raise WorkflowProblem("The run was interrupted on the server.")
        if entry["status"].get("status_str") != "success":
            raise WorkflowProblem(f"The run failed: {entry['status']}")
        return entry["outputs"]

    def fetch(self, image: dict) -> bytes:
        """Bytes of a picture named in a job's outputs."""
        query = urllib.parse.urlencode({key: image.get(key, "") for key in ("filename", "subfolder", "type")})
        with urllib.request.urlopen(f"{self.address}/view?{query}", timeout=60) as answer:
            return answer.read()


class Listener:
    """Hears the server's progress messages on a thread; without the websocket package the run is merely silent."""

    def __init__(self, address: str, client: str, progress: Callable[[str, int, int], None]):
        self.closed, self.socket = False, None
        try:
            import websocket
        except ImportError:
            return
        self.socket = websocket.create_connection(
            f"{address.replace('http', 'ws', 1)}/ws?clientId={client}", timeout=10
        )
        self.socket.settimeout(None)
        threading.Thread(target=self.listen, args=(progress,), daemon=True).start()

    def listen(self, progress) -> None:
        node = ""
        while not self.closed:
            try:
                message = self.socket.recv()
            except Exception:  # the server or we have hung up: what the run came to is asked elsewhere
                return
            if not isinstance(message, str) or not message:
                continue  # a preview picture
            event = json.loads(message)
            data = event.get("data", {})
            if event.get("type") == "executing" and data.get("node"):
                node = str(data["node"])
                progress(node, 0, 0)
            elif event.get("type") == "progress":
                progress(str(data.get("node") or node), int(data["value"]), int(data["max"]))

    def close(self) -> None:
        self.closed = True
        if self.socket:
            self.socket.close()


def title(node: str, prompt: dict, titles: dict[str, str]) -> str:
    kind = prompt.get(node, {}).get("class_type", "unknown node")
    return f"node {node} ({titles.get(node) or kind})"


def refusal(text: str, prompt: dict, titles: dict[str, str]) -> str:
    """The server's answer to a workflow it does not accept, in lines."""
    try:
        answer = json.loads(text)
    except json.JSONDecodeError:
        return f"The server refused the workflow: {text}"
    lines = [f"{(answer.get('error') or {}).get('message', 'The server refused the workflow')}:"]
    for node, found in (answer.get("node_errors") or {}).items():
        for error in found["errors"]:
            lines.append(f"  {title(node, prompt, titles)}: {error['message']}: {error.get('details', '')}")
    return "\n".join(lines if len(lines) > 1 else [*lines, f"  {(answer.get('error') or {}).get('details', text)}"])


def end_group(process: subprocess.Popen) -> None:
    """Ends a process that leads its own group, and the whole group."""
    if POSIX:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    else:
        process.kill()
    process.wait()
