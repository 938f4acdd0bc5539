"""The demo: reference pictures and a prompt through a workflow on a real ComfyUI server, pictures of the subject out.

`nox -s demo` runs this in an environment of its own. The last line of standard output is one JSON object:
{"images": [paths], "sheet": path, "seconds": s, "host": version, "workflow": name}
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

from ..common.bootstrap import ROOT
from ..common.console import say
from ..tools.comfy_client import workflow
from ..tools.comfy_client.client import HostError, WorkflowError
from ..tools.comfy_client.server import Server, device
from ..tools.comfy_client.shipped import find
from .family.layout import MODELS
from .showcase import showcase

WORKFLOW = Path("demo")  # a short name
IMAGES = ROOT / "demo" / "images"
SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if os.name == "posix" else [])]


def main() -> int:
    """The command."""
    options = _arguments()
    for number in SIGNALS:
        signal.signal(number, _stop)
    try:
        return _demo(options)
    except (HostError, WorkflowError, workflow.WorkflowFileError) as error:
        say(f"\n{error}")
        return 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nox -s demo --", description=__doc__.split("\n")[0])
    add, file, folder = parser.add_argument, {"type": Path, "metavar": "FILE"}, {"type": Path, "metavar": "DIR"}
    add("--workflow", **file, default=WORKFLOW, help="from the editor or in API format, or a short name")
    add("--image", **file, action="append", default=[], help="reference, for the Load Image nodes in order")
    add("--prompt", metavar="TEXT", help="what the picture shows, for the Encode Subject node")
    add("--out", **folder, default=ROOT / "output", help="where the pictures go (default: output/)")
    add("--models", **folder, action="append", default=[], help="a models folder with ComfyUI's sub-folders")
    add("--serve", action="store_true", help="leave the editor open afterwards, until Ctrl-C")
    add("--port", type=int, default=0, help="port of the server (default: a free one)")
    add("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.comfyui is None:
        parser.error("no host: set COMFYUI_PATH, or use `nox -s demo`, which brings one")
    for path in [find(options.workflow), *options.image, *options.models]:
        if not path.exists():
            parser.error(f"{path}: there is no such file")
    return options


def _demo(options: argparse.Namespace) -> int:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="subject-dla-demo-", ignore_cleanup_errors=True) as base:
        own = options.comfyui / "models"
        folders = [MODELS, *options.models, *([own] if own.is_dir() else [])]
        say(f"Starting ComfyUI from {options.comfyui}")
        with Server(options.comfyui, base, models=folders, arguments=device(), port=options.port) as server:
            say(f"ComfyUI {server.client.version()} on {server.address} after {time.monotonic() - started:.0f} s")
            result = json.dumps(_run(server.client, options))
            if options.serve:
                say(f"\nThe editor is open at {server.address} (Ctrl-C ends it); its files are in {base}")
                print(result, flush=True)
                while server.process.poll() is None:
                    time.sleep(0.5)
                raise HostError(f"ComfyUI ended.\n{server.log_tail()}")
    print(result, flush=True)
    return 0


def _run(client, options: argparse.Namespace) -> dict:
    """Queues the workflow and saves its pictures in the output folder; the JSON object of the last line."""
    started = time.monotonic()
    for image in sorted(IMAGES.glob("*.png")):  # the demo workflow's references, by their names
        client.upload(image)
    saved, info = workflow.read(options.workflow), client.object_info()
    prompt = workflow.to_api(saved, info, options.workflow)
    if options.workflow == WORKFLOW and not options.image and options.prompt is None:
        pictures, sheet = showcase(client, saved, IMAGES, lambda text: say(_since(started, text)))
        paths = [_save(options.out / f"subject-{number:02d}.png", data) for number, data in enumerate(pictures, 1)]
        buffer = BytesIO()
        sheet.save(buffer, "png")
        result = {"images": paths, "sheet": _save(options.out / "sheet.png", buffer.getvalue())}
    else:
        prompt = workflow.put_in(prompt, [client.upload(image) for image in options.image], options.prompt)
        titles = workflow.titles(prompt)
        progress = _Progress(titles)
        job = client.queue(prompt, titles, workflow.editor_graph(saved, prompt, info))
        outputs = client.wait(job, prompt, titles, progress)
        progress.end()
        images = [image for output in outputs.values() for image in output.get("images", [])]
        images = [image for image in images if image.get("type") == "output"]
        if not images:
            raise WorkflowError(f"{options.workflow.name} ran, but saved no picture: it needs a Save Image node.")
        result = {"images": [_save(options.out / image["filename"], client.fetch(image)) for image in images]}
    seconds = round(time.monotonic() - started, 2)
    return {**result, "seconds": seconds, "host": client.version(), "workflow": options.workflow.stem}


def _save(path: Path, data: bytes) -> str:
    """Writes a picture under this name, or the next free one, so that earlier runs' stay; its absolute path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    free.write_bytes(data)
    say(f"  {free}")
    return str(free.resolve())


class _Progress:
    """One line with the running node and its progress; where the output is no terminal, one line per node."""

    def __init__(self, titles: dict[str, str]):
        self.titles, self.node, self.started = titles, None, time.monotonic()
        self.live = sys.stderr.isatty()

    def __call__(self, node: str, value: int, of: int) -> None:
        text = _since(self.started, self.titles.get(node, node))
        if self.live:
            bar = f" [{'#' * (20 * value // of):<20}] {value}/{of}" if of else ""
            print(f"\r\033[K{text}{bar}", end="", file=sys.stderr, flush=True)
        elif node != self.node or (of and value == of):
            say(text + (f" {value}/{of}" if of else ""))
        self.node = node

    def end(self) -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr)


def _stop(number: int, _frame) -> None:
    """Ends the run through the `with` blocks, which end the server and remove its folder."""
    for later in SIGNALS:  # a second one would cut that off
        signal.signal(later, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _since(started: float, text: str) -> str:
    return f"{time.monotonic() - started:5.0f} s  {text}"


if __name__ == "__main__":
    sys.exit(main())
