"""A ComfyUI server process of one's own, on a free loopback port, with only this pack.

Everything it writes is in one folder (models, custom_nodes, input, output, user); the checkout is only read.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ...common.bootstrap import ROOT
from . import keeper
from .client import Client, HostError

PACK = "subject-dla"
POSIX = os.name == "posix"
START_SECONDS = 300


class Server:
    """`with Server(comfyui, base) as server:` a running server; `server.client` sends requests to it.

    Everything that it reads and writes is in the folder `base`. packs: folders of the enabled custom nodes, by name;
    None: this pack. models: further folders laid out like ComfyUI's `models`. port 0: a free one.
    """

    def __init__(
        self,
        comfyui: str | Path,
        base: str | Path,
        *,
        packs: Mapping[str, Path] | None = None,
        models: Sequence[Path] = (),
        arguments: Sequence[str] = (),
        python: str = sys.executable,
        port: int = 0,
    ):
        self.comfyui, self.base = Path(comfyui).resolve(), Path(base).resolve()
        self.packs = {PACK: ROOT} if packs is None else packs
        self.models, self.arguments, self.python = models, arguments, python
        self.port = port or _free_port()
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
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> Client:
        """Sends requests to this server."""
        return Client(self.address, alive=lambda: self.process.poll() is None, log_tail=self.log_tail)

    def start(self) -> None:
        """Starts the process and waits until it answers. Raises HostError."""
        for name in ("custom_nodes", "input", "output", "temp", "user", "models/dla"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for name, folder in self.packs.items():
            _link(Path(folder), self.base / "custom_nodes" / name)
        command = [self.python, str(self.comfyui / "main.py"), "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base)]
        command += ["--database-url", f"sqlite:///{self.base / 'user' / 'comfyui.db'}"]
        command += ["--disable-auto-launch", "--disable-api-nodes"]
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", *self.packs]
        if self.models:
            paths = self.base / "extra_model_paths.yaml"
            folders = [self.base / "models", *self.models]  # its own first: trained models are written there
            paths.write_text("\n".join(_model_paths(folders)), encoding="utf-8")
            command += ["--extra-model-paths-config", str(paths)]
        settings = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        # The keeper leads a process group of its own, so that Ctrl-C reaches us first, and ends when our pipe closes.
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [self.python, keeper.__file__, *command, *self.arguments],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                cwd=self.base, env={**os.environ, **settings}, start_new_session=POSIX,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not self.client.answers():
            if self.process.poll() is not None:
                raise HostError(f"ComfyUI did not start (exit code {self.process.returncode}).\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise HostError(f"ComfyUI did not answer within {START_SECONDS} s.\n{self.log_tail()}")
            time.sleep(0.3)
        log = self.log.read_text(encoding="utf-8", errors="replace")  # all that a pack which fails to import leaves
        bad = [line for line in log.splitlines() if "(IMPORT FAILED)" in line or "comfy_entrypoint" in line]
        if bad:
            raise HostError("ComfyUI started without the pack:\n" + "\n".join(bad) + f"\n{self.log_tail()}")

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of the server's log, for errors."""
        if not self.log.exists():
            return ""
        text = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
        return "\n".join(["The end of its log:", *("    " + line for line in text), f"(all of it: {self.log})"])

    def stop(self) -> None:
        """Ends the process and everything that it started."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            end_group(self.process)


def device() -> list[str]:
    """The host's arguments for this machine: it finds an accelerator by itself, but fails without one."""
    import torch

    xpu = getattr(torch, "xpu", None)
    found = torch.cuda.is_available() or (xpu and xpu.is_available()) or torch.backends.mps.is_available()
    return [] if found else ["--cpu"]


def end_group(process: subprocess.Popen) -> None:
    """Kills a process that leads its own group, and the whole group."""
    if POSIX:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _link(folder: Path, link: Path) -> None:
    """A symbolic link to a folder, or a copy where the system allows none."""
    if link.is_symlink() or link.exists():
        return
    try:
        link.symlink_to(folder, target_is_directory=True)
    except OSError:
        shutil.copytree(folder, link, ignore=shutil.ignore_patterns(".*", "__pycache__", "output"))


def _model_paths(folders: Iterable[Path]) -> list[str]:
    """Lines of an extra_model_paths.yaml that adds every sub-folder of these `models` folders under its own name."""
    lines = []
    for number, folder in enumerate(folders):
        lines += [f"folder{number}:", f"    base_path: {json.dumps(str(Path(folder).resolve()))}"]
        lines += [f"    {kind.name}: {kind.name}" for kind in sorted(Path(folder).iterdir()) if kind.is_dir()]
    return lines


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
