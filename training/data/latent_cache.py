"""VAE latents of image files, encoded once and kept on disk."""

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from ...common.files import save_tensors
from ...common.images import cut_off
from ...common.picture_files import PictureFile, file_version, load_picture
from ...loaders.encode_cache import fingerprint
from ...loaders.reference_latents import resize
from .shared import compute_once, each, read_entry, record

CUT = 0.3  # share that the nearest of the aspect ratios may cut off a picture without a word
HEADER = 88 + 204  # bytes of a latent's file beside its values

log = logging.getLogger(__name__)


class LatentCache:
    """Latents of the host's VAE, a .safetensors in `folder` for each image and size; None keeps them in memory."""

    def __init__(self, vae, folder: Path | None):
        self.vae, self.folder = vae, folder
        self._model = ""
        self._memory: dict[str, Tensor] = {}

    # Not inference mode, in which hosts run nodes: a backward pass may keep the result; and the host may offload the
    # DiT meanwhile, whose weights autograd could then not use.
    @torch.inference_mode(False)
    @torch.no_grad()
    def get(self, path: PictureFile, width: int, height: int, wait: bool = True) -> Tensor | None:
        """Returns the latent of an image cropped to width x height px, (c, h, w) or (c, 1, h, w), fp32 on the CPU.

        None only without `wait`, where another process encodes it at present. Raises ImageError where the image cannot
        be read, ValueError where the latent is not finite.
        """
        key = self._key(path, width, height)
        if self.folder is None:
            if key not in self._memory:
                self._memory[key] = self._encode(path, width, height)
            return self._memory[key]
        file = self.folder / f"{key}.safetensors"

        def read() -> Tensor | None:
            found = read_entry(file, "latent", key, (path,), lambda tensors: self._problem(tensors, width, height))
            return found and found[0]["latent"]

        def compute() -> Tensor:
            latent = self._encode(path, width, height)
            self._save(file, key, path, latent)
            return latent

        return compute_once(file, read, compute, wait)

    def prefetch(self, images: Iterable[tuple[PictureFile, int, int]]) -> None:
        """Encodes these images (path, width, height), those last that another process encodes at present."""
        each(dict.fromkeys(images), lambda image, wait: self.get(*image, wait=wait))

    def put(self, path: PictureFile, width: int, height: int, latent: Tensor) -> None:
        """Stores on disk a latent that was encoded elsewhere, in the form that `get` returns."""
        key = self._key(path, width, height)
        self._save(self.folder / f"{key}.safetensors", key, path, latent.float().cpu().contiguous())

    def size(self, images: Iterable[tuple[PictureFile, int, int]]) -> int:
        """Returns the bytes on disk that these images (path, width, height) will take, from encoding the first."""
        images = list(dict.fromkeys(images))
        if not images:
            return 0
        path, width, height = images[0]
        pixel = self.get(path, width, height).nbytes / (width * height)
        return round(sum(pixel * w * h + HEADER for _, w, h in images))

    def _encode(self, path: PictureFile, width: int, height: int) -> Tensor:
        picture = load_picture(path)
        if lost := cut_off(picture.shape[1], picture.shape[0], width, height, CUT):
            log.warning("%s: %s", path, lost)
        pixels = cut(picture, width, height)[None]
        try:
            latent = self.vae.encode(pixels)[0]
        except RuntimeError as error:  # out of memory: the host's second way, in tiles, takes inference mode alone
            if "InferenceMode" not in str(error):
                raise
            with torch.inference_mode():
                latent = self.vae.encode(pixels)[0]
        if not bool(latent.isfinite().all()):
            raise ValueError(
                f"The VAE gave NaN or infinite values for {path.name}. Load it in bf16 or fp32 instead of fp16."
            )
        return latent.clone().float().cpu().contiguous()

    @staticmethod
    def _save(file: Path, key: str, path: PictureFile, latent: Tensor) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"latent": latent}
        save_tensors(file, tensors, {"latent": record(key, (path,), tensors, {})})

    def _problem(self, tensors: dict[str, Tensor], width: int, height: int) -> str:
        """Why an entry cannot be this VAE's latent of width x height px; "" where it can."""
        latent = tensors.get("latent")
        if latent is None:
            return "has no latent"
        channels, scale = getattr(self.vae, "latent_channels", None), self.vae.spacial_compression_encode()
        sides = tuple(latent.shape[-2:])
        if (
            latent.dtype != torch.float32
            or latent.ndim not in (3, 4)
            or latent.shape[0] != (channels or latent.shape[0])
        ):
            return f"is {latent.dtype} of shape {tuple(latent.shape)}, expected fp32 of {channels} channels"
        if sides != (height // scale, width // scale):
            return f"has shape {tuple(latent.shape)}, expected {height // scale} x {width // scale} at its end"
        return ""

    def _key(self, path: PictureFile, width: int, height: int) -> str:
        self._model = self._model or fingerprint(self.vae.first_stage_model)
        facts = (*file_version(path), width, height, self._model)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:40]


def cut(image: Tensor, width: int, height: int) -> Tensor:
    """Scales an image (H, W, 3) evenly and crops it at the centre to (height, width, 3), as Add Identity does."""
    return rearrange(resize(rearrange(image, "h w c -> c h w"), width, height), "c h w -> h w c")
