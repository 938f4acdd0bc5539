"""The demo's data in memory: pictures as uint8, and what is known of each."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .world import Picture, Toy, View


def entries(data: Path, split: str) -> list[dict]:
    """Of the split's list, with `pictures` (target first) as world.Picture."""
    rows = json.loads((data / f"{split}.json").read_text(encoding="utf-8"))
    for row in rows:
        row["pictures"] = [
            Picture(tuple(Toy(**toy) for toy in p["toys"]), View(**p["view"]), p["place"], p["seed"])
            for p in row["pictures"]
        ]
    return rows


def paths(row: dict) -> list[str]:
    """As row["pictures"]: target first."""
    return [row["image_tgt_path"], *row["image_paths"]]


def load(data: Path, names: list[str]) -> Tensor:
    """(n, 3, h, w) uint8."""
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda name: np.asarray(Image.open(data / name).convert("RGB")), names))
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


def images(data: Path, names: list[str]) -> list[Tensor]:
    """(h, w, 3) in 0..1 each, as the host's IMAGE has them."""
    return list(load(data, names).permute(0, 2, 3, 1).float() / 255) if names else []
