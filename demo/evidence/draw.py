"""Draws the demo's cases with the demo's family, many at a time: the pack's own encoder, aggregator, guider and the
host's sampler, without a server.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...dla.features import Features
from ...sampling.sample import staged_sample
from ...sampling.stages import Stages
from ..family import pictures
from ..family.layout import NAMES, SIDE

STEPS, CFG = 12, 2.5  # the paper's CFG


@dataclass(frozen=True)
class Case:
    """An entry of a split's list (demo/family/data.py) with its pictures; the first of `latents` is the first reference's."""

    entry: dict
    references: list[Tensor]  # (h, w, 3) in 0..1
    latents: list[Tensor]  # (1, 16, h / 8, w / 8), as the VAE gives them

    @property
    def prompt(self) -> str:
        return self.entry["prompt"]

    @property
    def target(self):
        return self.entry["pictures"][0]

    @property
    def reference(self):
        return self.entry["pictures"][1]


class Family:
    """The family's models, by the pack's loaders; the host knows their folder."""

    def __init__(self):
        from comfy_extras.nodes_model_advanced import ModelSamplingFlux

        from ...loaders.pipeline import load_pipeline

        model, self.vae, self.mllm, _ = load_pipeline(NAMES["diffusion_models"], NAMES["vae"], NAMES["mllm"])
        self.base = ModelSamplingFlux().patch(model, max_shift=1.15, base_shift=0.5, width=SIDE, height=SIDE)[0]
        self._features: dict[tuple, Features] = {}
        self.empty = self.mllm.encode("")

    def cases(self, data: Path, split: str = "test") -> list[Case]:
        out = []
        with torch.no_grad():
            for entry in pictures.entries(data, split):
                seen = pictures.images(data, entry["image_paths"])
                out.append(Case(entry, seen, [self.vae.encode(picture[None]) for picture in seen]))
        return out

    def features(self, case: Case, images: bool = True) -> Features:
        key = (case.prompt, tuple(case.entry["image_paths"]), images)
        if key not in self._features:
            self._features[key] = self.mllm.encode(case.prompt, case.references if images else (), image_size=SIDE)
        return self._features[key]

    def arm(self, name: str) -> Arm:
        return Arm(self, name)


class Arm:
    """One pair of DLA and LoRA over the family's DiT."""

    def __init__(self, family: Family, name: str):
        import comfy.sd
        import comfy.utils
        import folder_paths

        from ...loaders.dla import load_dla

        self.family, self.name = family, name
        self.dla = load_dla(f"{name}.safetensors")
        lora = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("loras", f"{name}.safetensors"))
        self.model, _ = comfy.sd.load_lora_for_models(family.base, None, lora, 1.0, 0.0)

    @torch.no_grad()
    def draw(
        self,
        cases: list[Case],
        stages: Stages,
        *,
        images: bool = True,
        change: Callable[[Features], Features] = lambda features: features,
        seed: int = 0,
        batch: int = 32,
    ) -> Tensor:
        """Pictures (n, 3, h, w) in 0..1. images: False keeps the references from the MLLM. change: of the MLLM's
        features, before the DLA. Cases of equally many tokens are drawn together."""
        groups = defaultdict(list)
        for index, case in enumerate(cases):
            features = change(self.family.features(case, images))
            groups[features.hidden_states.shape[2], len(case.latents)].append((index, features))
        negative = self.dla.aggregate(self.family.empty).tokens
        out = torch.empty(len(cases), 3, SIDE, SIDE)
        for number, rows in enumerate(groups.values()):
            for start in range(0, len(rows), batch):
                part = rows[start : start + batch]
                tokens = torch.cat([self.dla.aggregate(features).tokens for _, features in part])
                latents = zip(*(cases[index].latents for index, _ in part))
                values = {
                    "pooled_output": None,
                    "reference_latents": [torch.cat(column) for column in latents],
                    "reference_latents_method": "uxo",
                }
                latent = {"samples": torch.zeros(len(part), 16, SIDE // 8, SIDE // 8)}
                sampled = staged_sample(
                    self.model, 1000 * seed + 10 * number + start, STEPS, CFG, "euler", "simple", [[tokens, values]],
                    [[negative.repeat(len(part), 1, 1), values]], latent, 1.0, stages,
                )  # fmt: skip
                drawn = self.family.vae.decode(sampled["samples"]).movedim(-1, 1)
                out[[index for index, _ in part]] = drawn.float().clamp(0, 1).cpu()
        return out
