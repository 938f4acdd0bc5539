"""The HTTP interface of any ComfyUI server: upload, queue, wait, fetch."""

import base64
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path

ABSENT = (404, 405, 501)  # what is said for a part of the interface that a service does not have
ODD = (AttributeError, KeyError, TypeError, ValueError)  # what reading an answer of another form than ComfyUI's raises
Progress = Callable[[str, int, int], None]  # called with the node's id, the step reached, and the number of steps


class HostError(RuntimeError):
    """The server did not start, died, or refused; the text holds the end of its log."""


class WorkflowError(RuntimeError):
    """A workflow that the server refused or that failed in a node; the text names node and cause."""


class Client:
    """Requests to one server, or to a service with ComfyUI's interface.

    Args:
        address: Such as http://127.0.0.1:8188 or https://user:password@example.org/comfy. Without the password, it is
            the attribute `address`.
        headers: Sent with each request, for services that ask for a key; not where an answer redirects to.
        alive: Whether its process runs, where that is known.
        log_tail: The end of its log, for errors.

    Raises:
        HostError: If the address is not of http or https, such as file:///etc/hosts.
    """

    def __init__(
        self,
        address: str,
        *,
        headers: Mapping[str, str] | None = None,
        alive: Callable[[], bool] = lambda: True,
        log_tail: Callable[[], str] = lambda: "",
    ):
        parts = urllib.parse.urlsplit(address if "://" in address else f"http://{address}")
        if parts.scheme not in ("http", "https"):
            raise HostError(f"{address} is no address of a server, expected such as http://127.0.0.1:8188")
        password, _, host = parts.netloc.rpartition("@")
        self.address, self.headers = parts._replace(netloc=host).geturl().rstrip("/"), dict(headers or {})
        if password:
            code = base64.b64encode(urllib.parse.unquote(password).encode()).decode()
            self.headers["Authorization"] = f"Basic {code}"
        self.alive, self.log_tail = alive, log_tail
        self.id = uuid.uuid4().hex

    def answers(self) -> bool:
        """Whether a ComfyUI answers at the address."""
        return not self.problem()

    def problem(self) -> str:
        """Why no ComfyUI answers at the address, nor a service with the part of its interface that jobs need; or ""."""
        reasons = []
        for path in ("/system_stats", f"/history/{self.id}"):  # services may have the second alone
            try:
                self.get(path, timeout=10)
                return ""
            except urllib.error.HTTPError as error:
                if reasons and error.code == 404 and "json" in error.headers.get("Content-Type", ""):
                    return ""  # it has no such job
                reasons.append(why(error))
                if error.code not in ABSENT:
                    break
            except ValueError:  # a web page
                reasons.append("what answers is no ComfyUI")
            except (OSError, HTTPException) as error:
                reasons.append(why(error))
                break
        return reasons[0]

    def get(self, path: str, timeout: float = 60):
        """The JSON at a path; `timeout` in seconds."""
        with self._open(path, timeout=timeout) as answer:
            return json.load(answer)

    def post(self, path: str, body: bytes, kind: str, timeout: float = 60):
        """The JSON that a request with a body of MIME type `kind` is answered with."""
        with self._open(path, body, {"Content-Type": kind}, timeout) as answer:
            return json.load(answer)

    def _open(self, path: str, body: bytes | None = None, headers: dict | None = None, timeout: float = 60):
        request = urllib.request.Request(self.address + path, body, headers or {})  # noqa: S310 (http or https: __init__)
        for name, value in self.headers.items():
            request.add_unredirected_header(name, value)
        return urllib.request.urlopen(request, timeout=timeout)  # noqa: S310

    def version(self) -> str:
        """ComfyUI's version."""
        return str(self.get("/system_stats")["system"].get("comfyui_version", "unknown"))

    def object_info(self) -> dict:
        """The schema of every node, by class. Raises ValueError for another answer."""
        nodes = self.get("/object_info")
        if not isinstance(nodes, dict) or not all(isinstance(node, dict) for node in nodes.values()):
            raise ValueError(f"{self.address}/object_info holds no schemas of nodes.")
        return nodes

    def upload(self, image: Path, name: str = "") -> str:
        """Copies a picture into the server's input folder, as `name` if given; returns its name for Load Image."""
        mark = uuid.uuid4().hex
        name = urllib.parse.quote(name or image.name, safe=" .-_()")
        head = f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        head += "Content-Type: image/*\r\n\r\n"
        body = head.encode() + image.read_bytes() + f"\r\n--{mark}--\r\n".encode()
        answer = self.post("/upload/image", body, f"multipart/form-data; boundary={mark}")
        return "/".join(filter(None, [answer.get("subfolder"), answer["name"]]))

    def queue(self, prompt: dict, titles: dict[str, str] | None = None, graph: dict | None = None) -> str:
        """Queues a workflow in API format; returns the job's id.

        Args:
            prompt: The workflow.
            titles: Names of nodes by id, for errors.
            graph: The same in the editor's format, for the pictures' metadata.
        """
        extra = {"extra_pnginfo": {"workflow": graph}} if graph else {}
        body = json.dumps({"prompt": prompt, "client_id": self.id, "extra_data": extra}).encode()
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
        with self._open(f"/view?{query}") as answer:
            return answer.read()


def why(error: Exception) -> str:
    """What an error of a request says, in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    return str(getattr(error, "reason", "") or error) or type(error).__name__


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
        lines = [f"{(answer.get('error') or {}).get('message', 'The server refused the workflow')}:"]
        for node, found in (answer.get("node_errors") or {}).items():
            for error in found["errors"]:
                lines.append(f"  {title(node, prompt, titles)}: {error['message']}: {error.get('details', '')}")
    except ODD:  # a proxy's own
        return f"The server refused the workflow: {text}"
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
