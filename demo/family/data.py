"""Draws the demo's data: pictures, and the lists of references, prompt and target that the pack's training reads.

    python common/bootstrap.py demo.family.data OUT [--examples N] [--seed S]

writes OUT/{training,pairs,validation,test}.json (UNO's form, with more told of each picture) and OUT/pictures/*.png, all of
them a function of the seed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path

from .world import Example, random_example, test_example

# "free again": fresh cases, for a claim that the first sixty suggested
TEST = {"view": 200, "free": 60, "reasoning": 80, "free again": 200}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--examples", type=int, default=16_000, help="for training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    sets = examples(options.examples, options.seed)
    write(options.out, sets)
    print(json.dumps({"examples": {name: len(rows) for name, rows in sets.items()}, "seconds": round(time.monotonic() - started)}))  # fmt: skip


def examples(count: int, seed: int) -> dict[str, list[tuple[str, Example]]]:
    """(set, example) by split; a picture's number is its place."""
    draw = random.Random(f"{seed} training")
    out = {"training": [("", random_example(draw, "training")) for _ in range(count)]}
    draw = random.Random(f"{seed} validation")
    out["validation"] = [("", random_example(draw, "validation")) for _ in range(256)]
    draw = random.Random(f"{seed} test")
    out["test"] = [
        (name, test_example(draw, name.removesuffix(" again"))) for name, number in TEST.items() for _ in range(number)
    ]
    return out


def write(out: Path, sets: dict[str, list[tuple[str, Example]]]) -> None:
    from .render import Renderer  # a window that only this process needs

    renderer = Renderer()
    for split, rows in sets.items():
        entries = []
        (out / "pictures" / split).mkdir(parents=True, exist_ok=True)
        for number, (name, example) in enumerate(rows):
            paths = []
            for part, picture in enumerate((example.target, *example.references)):
                path = f"pictures/{split}/{number:05d}-{part}.png"
                renderer.picture(picture).save(out / path, compress_level=1)
                paths.append(path)
            entries.append({
                "prompt": example.prompt, "image_paths": paths[1:], "image_tgt_path": paths[0],
                "subject": f"{split}-{number}", "set": name, "named": example.named, "reasoning": example.reasoning,
                "pictures": [asdict(picture) | {"caption": picture.caption()} for picture in (example.target, *example.references)],
            })  # fmt: skip
            if (number + 1) % 5000 == 0:
                print(f"{split}: {number + 1}", file=sys.stderr, flush=True)
        (out / f"{split}.json").write_text(json.dumps(entries), encoding="utf-8")
        if split == "training":  # half is enough for the DiT and what is trained on it, where encoding takes the time
            (out / "pairs.json").write_text(json.dumps(entries[: len(entries) // 2]), encoding="utf-8")


if __name__ == "__main__":
    main()
