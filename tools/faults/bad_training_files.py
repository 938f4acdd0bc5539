"""Damaged and hostile files of training and benchmarks: checkpoints, caches, lists, captions, shards, ledgers, reports.

    nox -s faults -- bad_training_files [--all] [-v] [WORD ...]

Good files are damaged in every way of `_damage.py`, one at a time; each is read in a process of its own. Of each file's
damages a part is drawn; `--all` takes all. A cache's entry has to come back as it was, however it was damaged; what a
list or folder leaves out has to be named. Last line: one JSON object.
"""

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...common.bootstrap import start_host
from ._child import Case, options, try_all
from ._damage import Damage, damages, hostile_tar

DRAWN = 14  # damages that are tried of a file
# Damages after which a file is what it was: a LoRA without alpha has the rank, a line's last end and the last block of
# a .tar count for nothing.
HARMLESS = (
    "0.1.0's lora.safetensors: first tensor lost", "LoRA to start from: first tensor lost",
    "list.jsonl: last byte lost", "cups.tar: last byte lost", "0.1.0's optimizer.safetensors: no shape of 9/step",
)  # fmt: skip


class Target(NamedTuple):
    """A file to damage.

    Attributes:
        name: For the report.
        folder: What it is read with, as it should be; a copy is damaged.
        file: Its path in there.
        read: Reads a copy of the folder.
        may_pass: Whether a damage of this name may pass; None = as the damage itself says.
    """

    name: str
    folder: Path
    file: str
    read: Callable[[Path], Any]
    may_pass: Callable[[str], bool] | None = None


def main(argv: list[str]) -> None:
    """Tries them and prints one JSON object. `argv`: the command line without this file's name."""
    given = options(__name__, __doc__, argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    start_host(os.environ["COMFYUI_PATH"])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = try_all(cases(Path(folder), given.all), "bad_files", given.words, given.v)
    counts = {f"training_files_{key}": found[f"bad_files_{key}"] for key in ("tried", "clear")}
    print(json.dumps({**found, **counts}))


def cases(folder: Path, every: bool = False, drawn: int = DRAWN) -> Iterator[Case]:
    """The cases, whose files are made in `folder` one after the other."""
    for target in _targets(folder / "good"):
        found = [*damages(target.folder / target.file), *(HOSTILE if target.file.endswith(".tar") else ())]
        chosen = found if every else random.Random(0).sample(found, min(drawn, len(found)))
        for damage in chosen:
            yield from _case(target, damage, folder / "bad" / target.folder.name)


HOSTILE = (Damage("names that lead out", lambda good, bad: bad.write_bytes(hostile_tar())),)


def _case(target: Target, damage: Damage, copy: Path) -> Iterator[Case]:
    shutil.copytree(target.folder, copy)
    file = copy / target.file
    file.unlink()
    damage.write(target.folder / target.file, file)
    may_pass = damage.may_pass if target.may_pass is None else target.may_pass(damage.name)
    may_pass = may_pass or f"{target.name}: {damage.name}" in HARMLESS
    names = (f"{file.parent.name}/{file.stem}", file.parent.name if "checkpoint" in file.parent.name else file.name)
    yield Case(f"{target.name}: {damage.name}", file, lambda: target.read(copy), may_pass, names)
    shutil.rmtree(copy)


def _targets(good: Path) -> Iterator[Target]:
    good.mkdir()
    yield from _checkpoints(good)
    yield from _caches(good)
    yield from _data(good)
    yield from _reports(good)


def _never(name: str) -> bool:
    return False


def _always(name: str) -> bool:
    return True


def _checkpoints(good: Path) -> Iterator[Target]:
    """Of a run's only checkpoint, with checksums and, as 0.1.0 wrote it, without; and a LoRA to start from."""
    from ...tests.small.killed import Trained
    from ...training.checkpoints import resume

    def read(folder: Path) -> None:
        new = Trained()
        resume(folder, lambda state: None, new.dla, new.lora, new.optimizer)

    def start_lora(folder: Path) -> None:
        Trained().lora.load(folder / "lora.safetensors")

    trained = Trained(0.5)
    for name in ("run", "old-run"):
        checkpoint = trained.save(good / name, 1)
    state = json.loads((checkpoint / "state.json").read_text())
    del state["files"], state["checksum"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    for file in ("dla.safetensors", "lora.safetensors", "optimizer.safetensors", "state.json"):
        yield Target(f"checkpoint's {file}", good / "run", f"{checkpoint.name}/{file}", read, _never)
        yield Target(f"0.1.0's {file}", good / "old-run", f"{checkpoint.name}/{file}", read)
    (good / "start").mkdir()
    shutil.copy(checkpoint / "lora.safetensors", good / "start")
    yield Target("LoRA to start from", good / "start", "lora.safetensors", start_lora)


def _caches(good: Path) -> Iterator[Target]:
    """Latents, features and the index, which are made again: each reading must give what was there."""
    import comfy.sd

    from ...loaders.mllm.huggingface import load_folder
    from ...tests.small.mllm import build_qwen25vl
    from ...tests.small.models import host_shapes, random_like
    from ...tests.small.training import paint_subjects
    from ...training.data.dataset import read_data
    from ...training.data.feature_cache import FeatureSource
    from ...training.data.latent_cache import LatentCache

    shapes = host_shapes("comfy.taesd.taesd", "TAESD", {"latent_channels": 16})
    vae = comfy.sd.VAE(sd=random_like(shapes, torch.float32))
    mllm = load_folder(build_qwen25vl(good / "mllm"))
    data = paint_subjects(good / "pictures", 2)
    picture = min(data.glob("*/*.jpg"), default=None) or min(data.glob("*/*.png"))

    def latent(folder: Path) -> torch.Tensor:
        return LatentCache(vae, folder).get(picture, 64, 64)

    def features(folder: Path) -> torch.Tensor:
        return FeatureSource(mllm, folder=folder, layers=(0, 1)).get("a fox", (picture,)).features.hidden_states

    def index(folder: Path) -> torch.Tensor:
        found = read_data(data, cache=folder, validation=0.5)
        return torch.tensor(list(found.fingerprint.encode()))

    for name, make in (("latents", latent), ("features", features), ("index", index)):
        (good / name).mkdir()
        expected = make(good / name)

        def read(folder: Path, make: Callable = make, expected: torch.Tensor = expected) -> None:
            if not torch.equal(make(folder), expected):
                raise AssertionError("another entry came back")

        for file in sorted((good / name).glob("*.safetensors")):
            yield Target(f"cache of {name}, {file.name[:5]}", good / name, file.name, read, _always)


def _data(good: Path) -> Iterator[Target]:
    """Lists, captions and shards; what is left out, with its name, counts as an error."""
    import io
    import tarfile

    from PIL import Image

    from ...training.data.dataset import read_data

    def read_of(name: str) -> Callable[[Path], None]:
        def read(folder: Path) -> None:
            found = read_data(folder / name, validation=0.0)
            if found.problems:
                raise ValueError("\n".join(found.problems)[:2000])

        return read

    pictures = {}
    for number in range(6):
        held = io.BytesIO()
        Image.new("RGB", (48, 48), (40 * number, 90, 200)).save(held, "JPEG")
        pictures[number] = held.getvalue()
    entries = [
        {"prompt": f"a cup, {number}", "image_paths": [f"{number}.jpg"], "image_tgt_path": f"{number + 1}.jpg"}
        for number in range(5)
    ]
    for name, text in (
        ("list.json", json.dumps(entries)),
        ("list.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries)),
        ("cup/1.txt", "a cup on a table, seen from the left"),
        ("cups.tar", ""),
    ):
        folder = good / f"data {name.replace('/', ' ')}"
        home = folder / "cup" if "/" in name else folder
        home.mkdir(parents=True)
        for number, data in pictures.items():
            (home / f"{number}.jpg").write_bytes(data)
        if text:
            (folder / name).write_text(text, encoding="utf-8")
        else:
            with tarfile.open(folder / name, "w") as tar:
                for member, data in (
                    ("cup/1.jpg", pictures[1]), ("cup/1.txt", b"a cup"), ("cup/1.ref0.jpg", pictures[2]),
                    ("cup/2.jpg", pictures[3]), ("cup/2.txt", b"a mug"), ("cup/2.ref0.jpg", pictures[4]),
                ):  # fmt: skip
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        may_pass = {"cup/1.txt": lambda damage: "cut" in damage or "byte" in damage or damage == "web page"}.get(name)
        yield Target(name, folder, name, read_of("" if "/" in name else name), may_pass)


def _reports(good: Path) -> Iterator[Target]:
    """A benchmark's ledger and the facts of its run, score files, and a run's table of validation losses."""
    from ...training.reporting.losses import Loss, read_table, write_table
    from ..benchmark.ledger import Ledger, check_run
    from ..benchmark.score_table import read_systems, score_table

    folder = good / "reports"
    folder.mkdir()

    def ledger(copy: Path) -> None:
        if damaged := Ledger(copy).damaged:
            raise ValueError(f"ledger.jsonl: {damaged} damaged lines")

    def scores(name: str) -> Callable[[Path], None]:
        return lambda copy: score_table(read_systems([str(copy / name)])) and None

    lines = [{"name": f"cup-{number}", "status": "done", "picture": f"cup-{number}.png"} for number in range(4)]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {"workflow": "a.json", "workflow_digest": "0123"}
    (folder / "run.json").write_text(json.dumps(facts))
    metrics = [{"figure": name, "backbone": "b", "per_output": [0.5, 0.25]} for name in ("CLIP-I", "DINO-I")]
    (folder / "identity.json").write_text(json.dumps({"figures": metrics}))
    pairs = [{"azimuth_difference": 10.0 * n, "polar_difference": 2.0, "counted": 1} for n in range(4)]
    (folder / "pose.json").write_text(json.dumps({"orientation_model": "m", "threshold": 0.5, "pairs": pairs}))
    (folder / "own.jsonl").write_text("".join(json.dumps({"clip_i": n / 9}) + "\n" for n in range(9)))
    (folder / "own.csv").write_text("name,clip_i,dino_i\n" + "".join(f"{n}.png,0.{n},0.5\n" for n in range(9)))
    write_table(folder / "validation.csv", 1, [Loss("both", "all", 0.5, 0.4, 0.6, 8)])
    ends = {"empty", "last byte lost"}  # the last byte is a line's end
    yield Target("ledger", folder, "ledger.jsonl", ledger, lambda name: name in ends or "byte" in name or "cut" in name)
    yield Target("run.json", folder, "run.json", lambda copy: check_run(copy, facts))
    for name in ("identity.json", "pose.json", "own.jsonl", "own.csv"):
        lines_of = name.endswith(("jsonl", "csv"))
        may_pass = (lambda damage: "byte" in damage or damage.startswith("cut")) if lines_of else None
        yield Target(name, folder, name, scores(name), may_pass)
    yield Target("validation.csv", folder, "validation.csv", lambda copy: read_table(copy / "validation.csv") and None,
                 lambda name: "byte" in name or name.startswith("cut"))  # fmt: skip
