"""MLLM features of prompts and references, computed as they are needed or kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...common.files import save_tensors
from ...common.picture_files import load_picture
from ...dla.features import Features, MLLMInfo, Modality
from .latent_cache import fingerprint

FIELDS = ("hidden_states", "modality", "image_index", "attention_mask")
HEADER = 700  # bytes of a file beside its values
Prompt = tuple[str, tuple[Path, ...]]


@dataclass(frozen=True, eq=False)
class Encoded:
    features: Features  # of one prompt, on the CPU
    pooled: Tensor | None  # (1, p), CLIP-L's where there is one


class FeatureSource:
    """mllm: loaders.mllm.MLLM; one that reads text only gets no references. layers: numbers that are wanted, None = all.
    images: False keeps the references from the MLLM. clip: a host CLIP for the pooled vector. folder: where to keep
    features; None = nowhere, beside the `keep` last used in memory. image_size: of MLLM.encode."""

    def __init__(
        self,
        mllm,
        *,
        layers=None,
        clip=None,
        folder: Path | None = None,
        image_size: int = 0,
        images: bool = True,
        keep: int = 64,
    ):
        self.mllm, self.layers, self.clip = mllm, layers, clip
        self.eyes = images and mllm.reads_images
        self.folder, self.image_size, self.keep = folder, image_size, keep
        self._memory: OrderedDict[str, Encoded] = OrderedDict()
        self._models = ""

    # Not inference mode, for the reasons of LatentCache.get.
    @torch.inference_mode(False)
    @torch.no_grad()
    def get(self, prompt: str, references: tuple[Path, ...]) -> Encoded:
        """Of one prompt, read together with its references. Raises ImageError, MLLMError."""
        references = references if self.eyes else ()
        key = self._key(prompt, references)
        if key not in self._memory:
            self._memory[key] = self._read(key) or self._encode(key, prompt, references)
        self._memory.move_to_end(key)
        while len(self._memory) > self.keep:
            self._memory.popitem(last=False)
        return self._memory[key]

    def prefetch(self, wanted: Iterable[Prompt]) -> None:
        """Encodes these in one go, so that the MLLM is loaded once for them."""
        wanted = list(wanted)
        if self.folder is None:
            self.keep = max(self.keep, len(wanted))
        for prompt in wanted:
            self.get(*prompt)

    def size(self, wanted: Iterable[Prompt]) -> int:
        """Bytes on disk that these will take, each once, from encoding one with the most pictures and from counting the
        others' text tokens. Pictures are taken to have as many tokens as that one's on average."""
        wanted = list(dict.fromkeys((prompt, references if self.eyes else ()) for prompt, references in wanted))
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

    def _encode(self, key: str, prompt: str, references: tuple[Path, ...]) -> Encoded:
        pictures = [load_picture(path) for path in references]
        features = self.mllm.encode(prompt, pictures, image_size=self.image_size, layers=self.layers)
        tensors = {name: getattr(features, name).clone().cpu().contiguous() for name in FIELDS}
        if self.clip is not None:
            pooled = self.clip.encode_from_tokens(self.clip.tokenize(prompt), return_pooled=True)[1]
            tensors["pooled"] = pooled.clone().cpu().contiguous()
        facts = {"layers": features.layers, "info": asdict(features.info), "prefix": features.prefix}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(self.folder / f"{key}.safetensors", tensors, {"features": json.dumps(facts)})
        return _assemble(tensors, facts)

    def _read(self, key: str) -> Encoded | None:
        """What is kept on disk; None where that is nothing, or damaged."""
        if self.folder is None:
            return None
        try:
            with safe_open(self.folder / f"{key}.safetensors", framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                return _assemble(tensors, json.loads(file.metadata()["features"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None

    def _key(self, prompt: str, references: tuple[Path, ...]) -> str:
        files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in references]
        text = self.mllm.template.text(prompt, len(references))
        if self.folder is not None and not self._models:
            self._models = " ".join(_weights(part.patcher) for part in (self.mllm, self.clip) if part is not None)
        facts = (prompt, text, files, self.layers, self.image_size, self.mllm.info, self._models)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:40]


def _weights(patcher) -> str:
    """Of a model under the host's model management; with patches, such as a LoRA's, of this session alone."""
    patches = patcher.patches_uuid if patcher.patches else ""
    return f"{fingerprint(patcher.model)} {patcher.load_device.type} {patches}"


def stack(features: Sequence[Features]) -> Features:
    """One batch of prompts of unequal length, padded on the right."""
    tokens = max(f.hidden_states.shape[2] for f in features)

    def rows(name: str, value: float) -> Tensor:
        parts = [getattr(f, name) for f in features]
        sides = [(0, 0, 0, tokens - p.shape[2]) if p.ndim == 4 else (0, tokens - p.shape[1]) for p in parts]
        return torch.cat([F.pad(part, side, value=value) for part, side in zip(parts, sides)])

    prefix = None if any(f.prefix is None for f in features) else tuple(p for f in features for p in f.prefix)
    return Features(
        rows("hidden_states", 0),
        features[0].layers,
        rows("modality", int(Modality.TEMPLATE)),
        rows("image_index", -1),
        rows("attention_mask", False),
        features[0].info,
        prefix,
    )


def _assemble(tensors: dict[str, Tensor], facts: dict) -> Encoded:
    hidden, *rest = (tensors[name] for name in FIELDS)
    prefix = tuple(facts["prefix"]) if facts["prefix"] is not None else None
    features = Features(hidden, tuple(facts["layers"]), *rest, MLLMInfo(**facts["info"]), prefix)
    return Encoded(features, tensors.get("pooled"))
