"""VAE latents of pictures, encoded once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..dla.files import save_tensors
from .buckets import crop
from .data import load_picture


class LatentCache:
    """vae: the host's. folder: of one .safetensors for each picture and size; None keeps them in memory alone."""

    def __init__(self, vae, folder: Path | None):
        self.vae, self.folder = vae, folder
        self._fingerprint = ""
        self._memory: dict[str, Tensor] = {}

    def get(self, path: Path, width: int, height: int) -> Tensor:
        """The host's latent without batch axis, (c, h, w) or (c, 1, h, w), fp32 on the CPU, of the picture cut to
        width x height px."""
        key = self._key(path, width, height)
        if self.folder is None:
            if key not in self._memory:
                self._memory[key] = self._encode(path, width, height)
            return self._memory[key]
        file = self.folder / f"{key}.safetensors"
        try:
            return load_file(file)["latent"]
        except (SafetensorError, OSError, KeyError):  # not there yet, or damaged
            latent = self._encode(path, width, height)
            file.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(file, {"latent": latent})
            return latent

    def size(self, images: Iterable[tuple[Path, int, int]]) -> int:
        """Bytes on disk that these pictures will take, from the first one's."""
        images = list(images)
        if not images:
            return 0
        path, width, height = images[0]
        latent = self.get(path, width, height)
        return round(sum(latent.numel() * 4 * (w * h) / (width * height) + 88 for _, w, h in images))

    def _encode(self, path: Path, width: int, height: int) -> Tensor:
        with torch.inference_mode():
            latent = self.vae.encode(crop(load_picture(path), width, height)[None])[0]
        with torch.inference_mode(False):  # a tensor that a backward pass may keep
            return latent.clone().float().cpu().contiguous()

    def _key(self, path: Path, width: int, height: int) -> str:
        status = path.stat()
        self._fingerprint = self._fingerprint or fingerprint(self.vae)
        facts = (path.resolve(), status.st_size, status.st_mtime_ns, width, height, self._fingerprint)
        return hashlib.sha256("\0".join(map(str, facts)).encode()).hexdigest()[:40]


def fingerprint(vae) -> str:
    """Of a VAE's weights: names, shapes, and some values of each."""
    digest = hashlib.sha256()
    for key, value in vae.first_stage_model.state_dict().items():
        some = value.flatten()[:: max(1, value.numel() // 16)].float().tolist()
        digest.update(f"{key} {tuple(value.shape)} {some}".encode())
    return digest.hexdigest()
