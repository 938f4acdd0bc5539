"""The main job from a workflow file: reference pictures and a prompt in, pictures of the subject out, on a real
ComfyUI server.

`nox -s demo` runs this in an environment of its own. The last line of standard output is one JSON object:
{"images": [paths], "sheet": path, "seconds": s, "host": version, "workflow": name}
"""

from __future__ import annotations

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
from ..tools.comfy_client.server import Server
from .family import layout as family
from .showcase import showcase

WORKFLOW = ROOT / "workflows" / "demo.json"
IMAGES = ROOT / "demo" / "images"
SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if os.name == "posix" else [])]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nox -s demo --", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--workflow",
        type=Path,
        metavar="FILE",
        default=WORKFLOW,
        help="workflow file, from the editor or in API format",
    )
    parser.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        action="append",
        default=[],
        help="reference, for the Load Image nodes in order",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="what the picture shows, for the Encode Subject node")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=ROOT / "output", help="where the pictures go (default: output/)"
    )
    parser.add_argument(
        "--models",
        type=Path,
        metavar="DIR",
        action="append",
        default=[],
        help="a models folder laid out like ComfyUI's",
    )
    parser.add_argument("--serve", action="store_true", help="leave the editor open afterwards, until Ctrl-C")
    parser.add_argument("--port", type=int, default=0, help="port of the server (default: a free one)")
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.comfyui is None:
        parser.error("no host: set COMFYUI_PATH, or use `nox -s demo`, which brings one")
    for file in [options.workflow, *options.image, *options.models]:
        if not file.exists():
            parser.error(f"{file}: there is no such file")
    return options


def main() -> int:
    options = arguments()
    for number in SIGNALS:
        signal.signal(number, stop)
    try:
        return demo(options)
    except (HostError, WorkflowError, workflow.WorkflowFileError) as problem:
        say(f"\n{problem}")
        return 1


def demo(options: argparse.Namespace) -> int:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="subject-dla-demo-", ignore_cleanup_errors=True) as base:
        own = options.comfyui / "models"
        folders = [family.MODELS, *options.models, *([own] if own.is_dir() else [])]
        say(f"Starting ComfyUI from {options.comfyui}")
        with Server(options.comfyui, base, models=folders, arguments=device(), port=options.port) as server:
            say(f"ComfyUI {server.client.version()} on {server.address} after {time.monotonic() - started:.0f} s")
            result = run(server, options)
            if options.serve:
                say(f"\nThe editor is open at {server.address} (Ctrl-C ends it); its files are in {base}")
                print(json.dumps(result), flush=True)
                while server.process.poll() is None:
                    time.sleep(0.5)
                raise HostError(f"ComfyUI ended.\n{server.log_tail()}")
    print(json.dumps(result), flush=True)
    return 0


def run(server: Server, options: argparse.Namespace) -> dict:
    """Queues the workflow and fetches its pictures into the output folder; what the last line says."""
    client, started = server.client, time.monotonic()
    for image in sorted(IMAGES.glob("*.png")):  # the demo workflow's references, by their names
        client.upload(image)
    prompt = workflow.to_api(workflow.read(options.workflow), client.object_info())
    if options.workflow == WORKFLOW and not options.image and options.prompt is None:
        pictures, sheet = showcase(
            client, prompt, IMAGES, lambda text: say(f"{time.monotonic() - started:5.0f} s  {text}")
        )
        paths = [keep(options.out / f"subject-{number:02d}.png", data) for number, data in enumerate(pictures, 1)]
        picture = BytesIO()
        sheet.save(picture, "png")
        result = {"images": paths, "sheet": keep(options.out / "sheet.png", picture.getvalue())}
        return {**result, **facts(client, options, started)}
    prompt = workflow.put_in(prompt, [client.upload(image) for image in options.image], options.prompt)
    titles = workflow.titles(prompt)
    progress = Progress(titles)
    outputs = client.wait(client.queue(prompt, titles), prompt, titles, progress)
    progress.end()
    pictures = [
        image for output in outputs.values() for image in output.get("images", []) if image.get("type") == "output"
    ]
    if not pictures:
        raise WorkflowError(f"{options.workflow.name} ran, but saved no picture: it needs a Save Image node.")
    paths = [keep(options.out / image["filename"], client.fetch(image)) for image in pictures]
    return {"images": paths, **facts(client, options, started)}


def facts(client, options: argparse.Namespace, started: float) -> dict:
    seconds = round(time.monotonic() - started, 2)
    return {"seconds": seconds, "host": client.version(), "workflow": options.workflow.stem}


def keep(path: Path, data: bytes) -> str:
    """Writes a picture under this name, or the next free one; its whole path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path = unused(path)
    path.write_bytes(data)
    say(f"  {path}")
    return str(path.resolve())


def device() -> list[str]:
    """The host's own choice where it has one; without an accelerator it has to be told."""
    import torch

    found = (
        torch.cuda.is_available()
        or getattr(torch, "xpu", None)
        and torch.xpu.is_available()
        or torch.backends.mps.is_available()
    )
    return [] if found else ["--cpu"]


class Progress:
    """One line that tells which node runs and how far it is; where nobody looks on, one line per node."""

    def __init__(self, titles: dict[str, str]):
        self.titles, self.node, self.started = titles, None, time.monotonic()
        self.live = sys.stderr.isatty()

    def __call__(self, node: str, value: int, of: int) -> None:
        name = self.titles.get(node, node)
        seconds = time.monotonic() - self.started
        if self.live:
            bar = f" [{'#' * (20 * value // of):<20}] {value}/{of}" if of else ""
            sys.stderr.write(f"\r\033[K{seconds:5.0f} s  {name}{bar}")
            sys.stderr.flush()
        elif node != self.node or (of and value == of):
            say(f"{seconds:5.0f} s  {name}" + (f" {value}/{of}" if of else ""))
        self.node = node

    def end(self) -> None:
        if self.live:
            sys.stderr.write("\r\033[K")


def unused(path: Path) -> Path:
    """`path`, or the next free name beside it: pictures of earlier runs stay."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_stem(f"{path.stem}-{number}")
    return found


def stop(number: int, _frame) -> None:
    """Ends the run through the `with` blocks, which end the server and remove its folder."""
    for later in SIGNALS:  # a second one would leave them half done
        signal.signal(later, signal.SIG_IGN)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
