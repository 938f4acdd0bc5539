"""Damaged and hostile files of every loader: MLLM folders, DINO and CLIP, a DiT, a DLA, Orient Anything, pictures.

    nox -s faults -- bad_files [--all] [-v] [WORD ...]

Small models are damaged in every way of `_damage.py`, one file at a time; each is loaded, and used once, in a process
of its own. Of each file's damages a part is drawn; `--all` takes the 1,800 that there are. Last line: one JSON object.
"""

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ...common.bootstrap import ROOT, start_host
from ._child import Case, options, try_all
from ._damage import Damage, damages

DRAWN = 26  # damages that are tried of a file
# Damages after which a file is what it was: of the checksum of a chunk that holds nothing, or of a line's end.
HARMLESS = ("picture: last byte lost", "DINO config.json: last byte lost", "CLIP config.json: last byte lost")
UNREAD = ("MLLM", "DINO", "CLIP")  # whose metadata nobody reads
DEMO = ROOT / "demo" / "models"


def main(argv: list[str]) -> None:
    """Tries them and prints one JSON object. `argv`: the command line without this file's name."""
    given = options(__name__, __doc__, argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    start_host(os.environ["COMFYUI_PATH"])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = try_all(cases(Path(folder), given.all), "bad_files", given.words, given.v)
    print(json.dumps(found))


def cases(folder: Path, every: bool = False) -> Iterator[Case]:
    """The cases, whose files are made in `folder` one after the other."""
    prepare(folder / "good")
    for name, (good, files, work) in _models(folder / "good").items():
        for file in files:
            found = list(damages(good / file if good.is_dir() else good))
            drawn = found if every else random.Random(0).sample(found, min(DRAWN, len(found)))
            for damage in drawn:
                yield from _case(name, good, file, damage, folder / "bad", work)


def prepare(good: Path) -> None:
    """Writes the models that the pack does not have, and imports what all cases import."""
    import transformers
    from safetensors.torch import save_file

    from ...common.safetensors_header import read_header
    from ...loaders.orient_anything import network
    from ...tests.small.measure import published_state

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    (good / "clip_vision").mkdir(parents=True)
    vit = transformers.ViTConfig(**small, image_size=32)
    transformers.ViTModel(vit, add_pooling_layer=False).save_pretrained(good / "clip_vision" / "dino-vit")
    parts = {"text_config": small | {"vocab_size": 99}, "vision_config": {**small, "patch_size": 32}}
    config = transformers.CLIPConfig(**parts, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(good / "clip_vision" / "clip")
    shutil.copytree(DEMO / "mllm" / "demo-qwen2.5-vl", good / "mllm")
    for folder in (good / "mllm", *(good / "clip_vision").iterdir()):  # stale beside a whole file, used without it
        keys = read_header(folder / "model.safetensors").tensors
        index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "model-1.safetensors")}
        (folder / INDEX).write_text(json.dumps(index), "utf-8")
    network.SIZES[384] = ("small", 1)  # one layer
    state = published_state(384, 1, 180)
    (good / "orientation").mkdir()
    save_file(state, good / "orientation" / "orient.safetensors")
    torch.save(state, good / "orientation" / "orient.pt")


def _models(good: Path) -> dict[str, tuple[Path, tuple[str, ...], Callable[[Path], Any]]]:
    """Name -> (good file or folder, the files in it that are damaged, what loads it and uses it once)."""
    return {
        "MLLM": (good / "mllm", ("config.json", "model.safetensors", "tokenizer.json", INDEX), _mllm),
        "DINO": (good / "clip_vision" / "dino-vit", ("config.json", "model.safetensors", INDEX), _embedder("dino")),
        "CLIP": (good / "clip_vision" / "clip", ("config.json", "model.safetensors"), _embedder("clip")),
        "DLA": (DEMO / "dla" / "demo.safetensors", ("",), _dla),
        "DiT": (DEMO / "diffusion_models" / "demo-flux.safetensors", ("",), _dit),
        "Orient Anything": (good / "orientation" / "orient.safetensors", ("",), _orientation),
        "Orient Anything .pt": (good / "orientation" / "orient.pt", ("",), _orientation),
        "picture": (ROOT / "demo" / "images" / "toy-1.png", ("",), _picture),
    }


INDEX = "model.safetensors.index.json"


def _case(name: str, good: Path, file: str, damage: Damage, bad: Path, work: Callable[[Path], Any]) -> Iterator[Case]:
    """One damaged file, and what is tried with it; afterwards it is gone."""
    bad.mkdir()
    target = bad / good.name
    if not file:
        damage.write(good, target)
    else:
        shutil.copytree(good, target)
        if file == INDEX:
            (target / "model.safetensors").rename(target / "model-1.safetensors")
        (target / file).unlink()
        damage.write(good / file, target / file)
    label = f"{name}{' ' * bool(file)}{file}: {damage.name}"
    may_pass = damage.may_pass or label in HARMLESS or name in UNREAD and damage.name.startswith("metadata n")
    yield Case(label, target / file if file else target, lambda: work(target), may_pass, (target.name,))
    shutil.rmtree(bad)


def _mllm(folder: Path) -> None:
    from ...loaders.mllm.huggingface import load_folder

    features = load_folder(folder).encode("a red fox", [torch.rand(56, 56, 3)])
    assert bool(features.hidden_states.isfinite().all())


def _embedder(kind: str) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        import folder_paths

        from ...loaders.embedders import FolderEmbedder

        folder_paths.get_folder_paths = lambda _: [str(folder.parent)]
        assert bool(FolderEmbedder(folder.name, kind).image(torch.rand(32, 32, 3)).isfinite().all())

    return work


def _found(folder: Path, kind: str) -> None:
    """Makes a folder the host's only one of a kind."""
    import folder_paths

    endings = {".safetensors", ".pt"}
    folder_paths.folder_names_and_paths = {kind: ([str(folder)], endings)}


def _dla(file: Path) -> None:
    from ...loaders.dla import load_dla

    _found(file.parent, "dla")
    load_dla(file.name)


def _dit(file: Path) -> None:
    from ...loaders.dit import load_dit, read_header

    _found(file.parent, "diffusion_models")
    read_header(str(file))
    load_dit(file.name)


def _orientation(file: Path) -> None:
    from ...loaders.orient_anything.model import load_orientation

    _found(file.parent, "orientation")
    load_orientation(file.name).estimate([torch.rand(32, 32, 3)])


def _picture(file: Path) -> None:
    from ...common.picture_files import load_picture

    load_picture(file)
