"""The HTTP interface of any ComfyUI server: upload, queue, wait, fetch."""

import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

Progress = Callable[[str, int, int], None]  # called with the node's id, the step reached, and the number of steps


class HostError(RuntimeError):
    """The server did not start, died, or refused; the text holds the end of its log."""


class WorkflowError(RuntimeError):
    """A workflow that the server refused or that failed in a node; the text names node and cause."""


class Client:
    """Requests to one server, at an `address` such as http://127.0.0.1:8188.

    `alive` (whether its process runs) and `log_tail` (the end of its log, for errors) are given where they are known.
    """

    def __init__(
        self, address: str, *, alive: Callable[[], bool] = lambda: True, log_tail: Callable[[], str] = lambda: ""
    ):
        self.address, self.alive, self.log_tail = address, alive, log_tail
        self.id = uuid.uuid4().hex

    def answers(self) -> bool:
        """Whether a ComfyUI answers at the address."""
        try:
            self.get("/system_stats", timeout=5)
            return True
        except (OSError, HTTPException, ValueError):  # ValueError: something else answers, not in JSON
            return False

    def get(self, path: str, timeout: float = 60):
        """The JSON at a path; `timeout` in seconds."""
        with urllib.request.urlopen(self.address + path, timeout=timeout) as answer:
            return json.load(answer)

    def post(self, path: str, body: bytes, kind: str):
        """The JSON that a request with a body of MIME type `kind` is answered with."""
        request = urllib.request.Request(self.address + path, body, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def version(self) -> str:
        """ComfyUI's version."""
        return self.get("/system_stats")["system"].get("comfyui_version", "unknown")

    def object_info(self) -> dict:
        """The schema of every node, by class."""
        return self.get("/object_info")

    def upload(self, image: Path, name: str = "") -> str:
        """Copies a picture into the server's input folder, as `name` if given; returns its name for Load Image."""
        mark = uuid.uuid4().hex
        name = urllib.parse.quote(name or image.name, safe=" .-_()")
        head = f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        head += "Content-Type: image/*\r\n\r\n"
        body = head.encode() + image.read_bytes() + f"\r\n--{mark}--\r\n".encode()
        answer = self.post("/upload/image", body, f"multipart/form-data; boundary={mark}")
        return "/".join(filter(None, [answer.get("subfolder"), answer["name"]]))

    def queue(self, prompt: dict, titles: dict[str, str] | None = None) -> str:
        """Queues a workflow in API format; returns the job's id. titles: names of nodes by id, for errors."""
        body = json.dumps({"prompt": prompt, "client_id": self.id}).encode()
        try:
            return self.post("/prompt", body, "application/json")["prompt_id"]
        except urllib.error.HTTPError as error:
            raise WorkflowError(refusal(error.read().decode(errors="replace"), prompt, titles or {})) from None

    def wait(self, job: str, prompt: dict, titles: dict[str, str] | None = None, progress: Progress | None = None):
        """The job's outputs by node id, once it is done. Raises HostError, WorkflowError."""
        listener = _Listener(self.address, self.id, progress) if progress else None
        try:
            while True:
                if not self.alive():
                    raise HostError(f"ComfyUI ended during the run.\n{self.log_tail()}")
                entry = self.get(f"/history/{job}").get(job)
                if entry and entry.get("status", {}).get("completed") is not None:
                    break
                time.sleep(0.25)
        finally:
            if listener:
                listener.close()
        if problem := failure(entry, prompt, titles or {}):
            raise WorkflowError(problem)
        return entry["outputs"]

    def fetch(self, image: dict) -> bytes:
        """The bytes of a picture in a job's outputs."""
        query = urllib.parse.urlencode({key: image.get(key, "") for key in ("filename", "subfolder", "type")})
        with urllib.request.urlopen(f"{self.address}/view?{query}", timeout=60) as answer:
            return answer.read()


def title(node: str, prompt: dict, titles: dict[str, str]) -> str:
    """How errors call a node."""
    kind = prompt.get(node, {}).get("class_type", "unknown node")
    return f"node {node} ({titles.get(node) or kind})"


def failure(entry: dict, prompt: dict, titles: dict[str, str]) -> str:
    """Why a job of the server's history failed; empty where it did not."""
    status = entry.get("status") or {}
    for kind, message in status.get("messages", []):
        if kind == "execution_error":
            name = title(str(message.get("node_id")), prompt, titles)
            return f"{name}: {message.get('exception_message', '').strip()}"
        if kind == "execution_interrupted":
            return "The run was interrupted on the server."
    return "" if status.get("status_str", "success") == "success" else f"The run failed: {status}"


def refusal(text: str, prompt: dict, titles: dict[str, str]) -> str:
    """The server's answer to a workflow that it does not accept, in lines."""
    try:
        answer = json.loads(text)
    except json.JSONDecodeError:
        return f"The server refused the workflow: {text}"
    lines = [f"{(answer.get('error') or {}).get('message', 'The server refused the workflow')}:"]
    for node, found in (answer.get("node_errors") or {}).items():
        for error in found["errors"]:
            lines.append(f"  {title(node, prompt, titles)}: {error['message']}: {error.get('details', '')}")
    return "\n".join(lines if len(lines) > 1 else [*lines, f"  {(answer.get('error') or {}).get('details', text)}"])


class _Listener:
    """Receives the server's progress messages on a thread; without the websocket package, none."""

    def __init__(self, address: str, client: str, progress: Progress):
        self.closed, self.socket = False, None
        try:
            import websocket
        except ImportError:
            return
        url = f"{address.replace('http', 'ws', 1)}/ws?clientId={client}"
        self.socket = websocket.create_connection(url, timeout=10)
        self.socket.settimeout(None)
        threading.Thread(target=self._receive, args=(progress,), daemon=True).start()

    def _receive(self, progress: Progress) -> None:
        node = ""
        while not self.closed:
            try:
                message = self.socket.recv()
            except Exception:  # one side has closed the connection: the job's result is asked for elsewhere
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
        """Ends the thread."""
        self.closed = True
        if self.socket:
            self.socket.close()
