"""Damaged files through a real server: each ends its own prompt at most, and the same process draws the next one.

    nox -s faults -- bad_served [WORD ...]

A DLA, an MLLM's weights, config and tokenizer, a DiT, a VAE, a picture, and a folder to train on are damaged one at a
time, in each way of `_damage.py`; a prompt that loads the file is queued, then a good one, which must give its
picture. `server_restarts` counts servers that had to be started again: they died, or had not ended a prompt after a
minute. Last line: one JSON object.
"""

import json
import os
import shutil
import sys
import tempfile
import urllib.error
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from ...common.console import say
from ...demo.family.layout import MODELS, NAMES
from ...tests.small.prompts import of_type
from ..comfy_client.client import HostError, WorkflowError, failure
from ..tables import parser
from ._damage import OF_ANY, Damage, code_ran, damages
from ._server import Settings, draw, graph, pictures, small_server, upload_pictures, wait
from ._training import training

SECONDS = 60  # of a prompt
SAMPLE = 5  # of the many damages that fit a kind of file alone, one in so many: `bad_files` tries them all
HOSTS = (
    "named pipe",
    "device",
)  # in its input folder the host's Load Image waits for the one and reads all of the other
WIDGETS = {"diffusion_models": "diffusion_model", "vae": "vae", "dla": "dla", "mllm": "mllm"}


class Bad(NamedTuple):
    """A damaged file in the server's folders, and the prompt that loads it."""

    name: str
    file: Path
    prompt: dict[str, Any]
    names: tuple[str, ...]  # of which an error has to hold one
    may_pass: bool


def main(argv: list[str]) -> None:
    """Tries them and prints one JSON object. `argv`: the command line without the file's name."""
    parsed = parser("faults", __name__, __doc__)
    parsed.add_argument("words", nargs="*", metavar="WORD", help="to try a few: what a case's name has to hold one of")
    words = parsed.parse_args(argv).words
    tried, restarts, unclear = 0, 0, []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work, ExitStack() as stack:
        base = Path(work) / "server"
        server = stack.enter_context(small_server(base))
        upload_pictures(server.client)
        info = server.client.object_info()
        expected = draw(server.client, graph(Settings(), info, "good"))
        for number, bad in enumerate(cases(base, info)):
            if words and not any(word in bad.name for word in words):
                continue
            tried += 1
            problem, alive = "", True
            try:
                entry = wait(server.client, server.client.queue(bad.prompt), bad.prompt, SECONDS)
                text = failure(entry, bad.prompt, {})
            except WorkflowError as error:
                text = str(error)
            except (TimeoutError, HostError, OSError, urllib.error.URLError) as error:
                text, alive = str(error), False
            if alive and not text and not bad.may_pass and pictures(server.client, entry["outputs"]) != expected:
                problem = "was taken without a word, and draws another picture"
            elif alive and text and not any(name in text for name in bad.names):
                problem = f"names no file: {text[:300]}"
            try:
                good = graph(Settings(), info, f"good-{number}")
                if alive and draw(server.client, good) != expected:
                    problem = "the good prompt afterwards: another picture"
            except (WorkflowError, TimeoutError, HostError, OSError) as error:
                problem, alive = f"the good prompt afterwards: {error}", False
            if code_ran():
                problem = "code of the file was run"
            if not alive:
                problem = f"the server had to be started again: {problem or text[:300]}"
                restarts += 1
                server.stop()
                server = stack.enter_context(small_server(base))
            if problem:
                unclear.append(f"{bad.name}: {problem}")
            say(f"{bad.name}: {problem or ('refused' if text else 'taken')}")
    if words and not tried:
        sys.exit(f"No case's name holds {' or '.join(words)}.")
    result = {"server_restarts": restarts, "served_tried": tried, "served_unclear": unclear, "device": "cpu"}
    print(json.dumps(result))


def cases(base: Path, info: dict[str, Any]) -> Iterator[Bad]:
    """Damaged files, each in the server's folders while it is tried."""
    settings = Settings()
    for kind in ("dla", "diffusion_models", "vae"):
        for number, damage in _sample(MODELS / kind / NAMES[kind]):
            file = base / "models" / kind / f"bad-{kind}-{number}.safetensors"
            prompt = graph(settings, info, "bad")
            of_type(prompt, "SubjectLoadPipeline")[WIDGETS[kind]] = file.name
            yield from _made(f"{kind}, {damage.name}", damage, MODELS / kind / NAMES[kind], file, prompt, (file.name,))
    mllm = MODELS / "mllm" / NAMES["mllm"]
    for source in sorted(mllm.iterdir()):
        if source.name not in ("config.json", "tokenizer.json", "model.safetensors"):  # the demo's others are not read
            continue
        for number, damage in _sample(source):
            folder = base / "models" / "mllm" / f"bad-{source.stem}-{number}"
            shutil.copytree(mllm, folder)
            (folder / source.name).unlink()
            prompt = graph(settings, info, "bad")
            of_type(prompt, "SubjectLoadPipeline")["mllm"] = folder.name
            names = (source.name, folder.name)
            yield from _made(
                f"MLLM's {source.name}, {damage.name}", damage, source, folder / source.name, prompt, names
            )
            shutil.rmtree(folder)
    picture = next(path for path in (base / "input").iterdir() if path.name == settings.subject)
    for number, damage in enumerate(OF_ANY):
        file = base / "input" / f"bad-{number}.png"
        prompt = graph(settings._replace(subject=file.name), info, "bad")
        if damage.name not in HOSTS:
            names = (file.name, "LoadImage")
            yield from _made(f"picture, {damage.name}", damage, picture, file, prompt, names, may_pass=True)
        folder = base / "input" / f"bad-subjects-{number}"
        for view in range(3):
            (folder / "toy").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, folder / "toy" / f"{view}.png")
            (folder / "toy" / f"{view}.txt").write_text("a toy", "utf-8")
        job = training(f"bad-{number}", steps=1)
        job["2"]["inputs"]["data"] = folder.name
        job["3"] = {"class_type": "PreviewAny", "inputs": {"source": ["2", 2]}}
        for name in ("bad.png", "0.txt"):
            file = folder / "toy" / name
            names = (name, file.stem, folder.name)
            yield from _made(f"to train on, {name}, {damage.name}", damage, picture, file, job, names, may_pass=True)
        shutil.rmtree(folder)


def _sample(source: Path) -> Iterator[tuple[int, Damage]]:
    """Numbered damages of a file: all that fit any file, and some of the others."""
    for number, damage in enumerate(damages(source)):
        if damage in OF_ANY or number % SAMPLE == 0:
            yield number, damage


def _made(
    name: str, damage: Damage, source: Path, file: Path, prompt: dict, names: tuple[str, ...], may_pass: bool = False
) -> Iterator[Bad]:
    """The damaged file, which is gone afterwards."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        file.unlink()
    damage.write(source, file)
    yield Bad(name, file, prompt, names, may_pass or damage.may_pass)
    if file.is_dir() and not file.is_symlink():
        os.rmdir(file)
    else:
        file.unlink()
