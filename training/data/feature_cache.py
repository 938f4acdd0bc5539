"""MLLM features of prompts and references, computed when needed, or read from a cache on disk."""

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.files import save_tensors
from ...common.picture_files import PictureFile, file_version, load_picture
from ...dla.features import Features, ImageGrid, MLLMInfo, Modality, StockContext
from ...loaders.encode_cache import weights
from ...loaders.mllm.base import MLLM
from ...loaders.protocols import CLIP
from .shared import compute_once, each, read_entry, record

log = logging.getLogger(__name__)
FIELDS = ("hidden_states", "modality", "image_index", "attention_mask")
HEADER = 870  # bytes of a file beside its values
Prompt = tuple[str, tuple[PictureFile, ...]]


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """What the text encoders give for one prompt and its references."""

    features: Features  # of batch 1, on the CPU
    pooled: Tensor | None  # (1, p), CLIP-L's where there is one


class FeatureSource:
    """Features of prompts, encoded once: the last `keep` used stay in memory, all of them on disk if there is a folder.

    The MLLM reads prompts and references, without `images`, or if it reads text only, the prompts alone; the CLIP, if
    there is one, gives the pooled vector. layers, image_size: see MLLM.encode.
    """

    def __init__(
        self,
        mllm: MLLM,
        *,
        layers: Sequence[int] | None = None,
        clip: CLIP | None = None,
        folder: Path | None = None,
        image_size: int = 0,
        images: bool = True,
        keep: int = 64,
    ):
        self.mllm, self.layers, self.clip = mllm, layers, clip
        self.reads_images = images and mllm.reads_images
        self.folder, self.image_size, self.keep = folder, image_size, keep
        self._memory: OrderedDict[str, EncodedPrompt] = OrderedDict()
        self._models = ""

    # Not inference mode, for the reasons of LatentCache.get.
    @torch.inference_mode(False)
    @torch.no_grad()
    def get(self, prompt: str, references: tuple[PictureFile, ...], wait: bool = True) -> EncodedPrompt | None:
        """Features of one prompt, read together with its references. Raises ImageError, MLLMError.

        None only without `wait`, where another process encodes it at present.
        """
        references = references if self.reads_images else ()
        key = self._key(prompt, references)
        if key not in self._memory:
            found = self._read_or_encode(key, prompt, references, wait)
            if found is None:
                return None
            self._memory[key] = found
        self._memory.move_to_end(key)
        while len(self._memory) > self.keep:
            self._memory.popitem(last=False)
        return self._memory[key]

    def prefetch(self, wanted: Iterable[Prompt]) -> None:
        """Encodes these prompts one after the other, so that the MLLM is loaded once for them.

        Those that another process encodes at present come last.
        """
        wanted = list(wanted)
        if self.folder is None:
            self.keep = max(self.keep, len(wanted))
        each(wanted, lambda prompt, wait: self.get(*prompt, wait=wait))

    def size(self, wanted: Iterable[Prompt]) -> int:
        """Estimate of the bytes on disk that these prompts will take, each once.

        One with the most images is encoded; of the others only text tokens are counted, and each image is taken to have
        as many tokens as that one's on average.
        """
        wanted = list(dict.fromkeys((prompt, references if self.reads_images else ()) for prompt, references in wanted))
        if not wanted:
            return 0

        def text_tokens(prompt: str, pictures: int) -> int:  # with one placeholder for each picture
            return len(self.mllm.tokenize(self.mllm.template.text(prompt, pictures)))

        prompt, references = max(wanted, key=lambda item: len(item[1]))
        encoded, pictures = self.get(prompt, references), len(references)
        tokens = encoded.features.attention_mask.shape[1]
        picture = (tokens - text_tokens(prompt, pictures)) / max(pictures, 1)
        token = sum(getattr(encoded.features, name).nbytes for name in FIELDS) / tokens
        fixed = HEADER + (0 if encoded.pooled is None else encoded.pooled.nbytes)
        return round(sum(token * (text_tokens(p, len(r)) + picture * len(r)) + fixed for p, r in wanted))

    def _read_or_encode(
        self, key: str, prompt: str, references: tuple[PictureFile, ...], wait: bool
    ) -> EncodedPrompt | None:
        def encode() -> EncodedPrompt:
            return self._encode(key, prompt, references)

        def read() -> EncodedPrompt | None:
            return self._read(key, references)

        if self.folder is None:
            return encode()
        return compute_once(self.folder / f"{key}.safetensors", read, encode, wait)

    def _encode(self, key: str, prompt: str, references: tuple[PictureFile, ...]) -> EncodedPrompt:
        pictures = [load_picture(path) for path in references]
        features = self.mllm.encode(prompt, pictures, image_size=self.image_size, layers=self.layers)
        tensors = {name: getattr(features, name).clone().cpu().contiguous() for name in FIELDS}
        if self.clip is not None:
            pooled = self.clip.encode_from_tokens(self.clip.tokenize(prompt), return_pooled=True)[1]
            tensors["pooled"] = pooled.clone().cpu().contiguous()
        facts = {name: getattr(features, name) for name in ("layers", "prefix")}
        facts |= {"info": asdict(features.info), "grids": [asdict(grid) for grid in features.grids[0]]}
        facts["stock"] = features.stock and asdict(features.stock)
        if self.folder is not None:
            facts = json.loads(json.dumps(facts))  # as it is read
            text = record(key, references, tensors, facts)
            save_tensors(self.folder / f"{key}.safetensors", tensors, {"features": text})
        return _assemble(tensors, facts)

    def _read(self, key: str, references: tuple[PictureFile, ...]) -> EncodedPrompt | None:
        """The prompt's file; None where there is none, or a damaged one."""
        file = self.folder / f"{key}.safetensors"
        found = read_entry(file, "features", key, references, self._problem)
        try:
            return found and _assemble(*found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            log.warning("Subject DLA: the cache entry %s cannot be read (%r). It is made again.", file, error)
            return None

    def _problem(self, tensors: dict[str, Tensor]) -> str:
        """Why an entry cannot be this MLLM's features of one prompt; "" where it can."""
        if missing := sorted({*FIELDS, *(["pooled"] if self.clip is not None else [])} - tensors.keys()):
            return f"has no {missing[0]}"
        hidden, *rest = (tensors[name] for name in FIELDS)
        tokens = hidden.shape[2] if hidden.ndim == 4 else -1
        whole = not any(value.is_floating_point() for value in rest)
        if (
            hidden.ndim != 4
            or hidden.shape[0] != 1
            or hidden.shape[3] != self.mllm.info.width
            or hidden.element_size() < 2
        ):
            return f"has hidden_states of {hidden.dtype} and shape {tuple(hidden.shape)}, expected this MLLM's"
        if not hidden.is_floating_point() or not whole or any(value.shape != (1, tokens) for value in rest):
            return "has tensors of another dtype or shape than this MLLM's features"
        return ""

    def _key(self, prompt: str, references: tuple[PictureFile, ...]) -> str:
        files = [(str(where), *rest) for where, *rest in map(file_version, references)]
        text = self.mllm.template.text(prompt, len(references))
        if self.folder is not None and not self._models:
            self._models = " ".join(
                weights(part.patcher.model, part.patcher) for part in (self.mllm, self.clip) if part is not None
            )
        facts = (prompt, text, files, self.layers, self.image_size, self.mllm.info, self._models)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:40]


def stack(features: Sequence[Features]) -> Features:
    """One batch of prompts of unequal length, padded on the right; all from one MLLM, with the same layers."""
    tokens = max(f.hidden_states.shape[2] for f in features)

    def rows(name: str, value: float) -> Tensor:
        parts = [getattr(f, name) for f in features]
        sides = [(0, 0, 0, tokens - p.shape[2]) if p.ndim == 4 else (0, tokens - p.shape[1]) for p in parts]
        return torch.cat([F.pad(part, side, value=value) for part, side in zip(parts, sides)])

    def joined(name: str) -> tuple | None:
        parts = [getattr(f, name) for f in features]
        return None if None in parts else tuple(one for part in parts for one in part)

    hidden, modality = rows("hidden_states", 0), rows("modality", int(Modality.TEMPLATE))
    index, mask, first = rows("image_index", -1), rows("attention_mask", False), features[0]
    return Features(
        hidden, first.layers, modality, index, mask, first.info, joined("prefix"), joined("grids"), first.stock
    )


def _assemble(tensors: dict[str, Tensor], facts: dict) -> EncodedPrompt:
    hidden, *rest = (tensors[name] for name in FIELDS)
    prefix, grids = facts["prefix"], facts.get("grids")  # 0.1.0 wrote no grids
    grids = None if grids is None else (tuple(ImageGrid(**grid) for grid in grids),)
    stock = facts.get("stock")
    stock = stock and StockContext(**{**stock, "layers": tuple(stock["layers"])})
    info, layers = MLLMInfo(**facts["info"]), tuple(facts["layers"])
    features = Features(hidden, layers, *rest, info, prefix and tuple(prefix), grids, stock)
    return EncodedPrompt(features, tensors.get("pooled"))
