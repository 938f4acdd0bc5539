"""Draws the demo's data: pictures, and lists of references, prompt and target as the pack's training reads them.

    python common/bootstrap.py demo.family.data OUT [--examples N] [--seed S]

writes OUT/{training,pairs,validation,test}.json (UNO's format, with a description of each picture) and
OUT/pictures/*.png, all of them a function of the seed. The functions below read them again.
"""

import argparse
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .world import Example, Picture, Toy, View, random_example, test_example

# "free again": fresh cases, for a claim that the first sixty suggested
TEST = {"view": 200, "free": 60, "reasoning": 80, "free again": 200}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--examples", type=int, default=16_000, help="for training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    splits = random_splits(options.examples, options.seed)
    _write(options.out, splits)
    counts = {name: len(examples) for name, examples in splits.items()}
    print(json.dumps({"examples": counts, "seconds": round(time.monotonic() - started)}))


def random_splits(count: int, seed: int) -> dict[str, list[tuple[str, Example]]]:
    """By split, (name of the test set or "", example); a picture's number is its position."""
    training, validation, test = (random.Random(f"{seed} {split}") for split in ("training", "validation", "test"))
    return {
        "training": [("", random_example(training, "training")) for _ in range(count)],
        "validation": [("", random_example(validation, "validation")) for _ in range(256)],
        "test": [(name, test_example(test, name.removesuffix(" again"))) for name, n in TEST.items() for _ in range(n)],
    }


def _write(out: Path, splits: dict[str, list[tuple[str, Example]]]) -> None:
    from .render import Renderer  # a window that only this process needs

    renderer = Renderer()
    for split, examples in splits.items():
        entries = []
        (out / "pictures" / split).mkdir(parents=True, exist_ok=True)
        for number, (name, example) in enumerate(examples):
            pictures = (example.target, *example.references)
            paths = [f"pictures/{split}/{number:05d}-{part}.png" for part in range(len(pictures))]
            for path, picture in zip(paths, pictures):
                renderer.picture(picture).save(out / path, compress_level=1)
            entries.append({
                "prompt": example.prompt, "image_paths": paths[1:], "image_tgt_path": paths[0],
                "subject": f"{split}-{number}", "set": name, "named": example.named, "reasoning": example.reasoning,
                "pictures": [asdict(picture) | {"caption": picture.caption()} for picture in pictures],
            })  # fmt: skip
            if (number + 1) % 5000 == 0:
                print(f"{split}: {number + 1}", file=sys.stderr, flush=True)
        (out / f"{split}.json").write_text(json.dumps(entries), encoding="utf-8")
        if split == "training":  # half is enough for the DiT and what is trained on it, where encoding takes the time
            (out / "pairs.json").write_text(json.dumps(entries[: len(entries) // 2]), encoding="utf-8")


def read_entries(data: Path, split: str) -> list[dict]:
    """The entries of a split's list, with `pictures` (target first) as world.Picture."""
    entries = json.loads((data / f"{split}.json").read_text(encoding="utf-8"))
    for entry in entries:
        entry["pictures"] = [
            Picture(tuple(Toy(**toy) for toy in p["toys"]), View(**p["view"]), p["place"], p["seed"])
            for p in entry["pictures"]
        ]
    return entries


def picture_paths(entries: list[dict]) -> list[str]:
    """The files of all pictures in the order of the entries, target first in each."""
    return [path for entry in entries for path in (entry["image_tgt_path"], *entry["image_paths"])]


def load_pictures(data: Path, paths: list[str]) -> Tensor:
    """(n, 3, h, w) uint8."""
    with ThreadPoolExecutor(4) as pool:
        arrays = list(pool.map(lambda path: np.asarray(Image.open(data / path).convert("RGB")), paths))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def load_references(data: Path, paths: list[str]) -> list[Tensor]:
    """(h, w, 3) in 0..1 each, as in the host's IMAGE."""
    return list(load_pictures(data, paths).permute(0, 2, 3, 1).float() / 255) if paths else []


if __name__ == "__main__":
    main()
