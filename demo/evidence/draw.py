"""Draws the evidence's cases with the demo's family, in batches and without a server.

It uses the pack's own encoder, aggregator and staged sampling, and the host's sampler.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...dla.features import Features
from ...loaders.conditioning import values_of
from ...sampling.sample import staged_sample
from ...sampling.stages import Stages
from ..family.data import load_references, read_entries
from ..family.layout import NAMES, SIDE
from .results import ResultStore
from .rows import Row

STEPS, CFG, BATCH = 12, 2.5, 32  # the paper's CFG
STRIP = 6  # cases of each row whose pictures are stored for the page


@dataclass(frozen=True)
class Case:
    """An entry of a split's list (demo/family/data.py) with its references.

    Args:
        entry: The entry.
        references: (h, w, 3) in 0..1 each.
        latents: (1, 16, h / 8, w / 8) each, as the VAE returns them.
    """

    entry: dict
    references: list[Tensor]
    latents: list[Tensor]

    @property
    def prompt(self) -> str:
        """The entry's prompt."""
        return self.entry["prompt"]


class Family:
    """The family's models, loaded from the host's model folders."""

    def __init__(self):
        from comfy_extras.nodes_model_advanced import ModelSamplingFlux

        from ...loaders.pipeline import load_pipeline

        model, self.vae, self.mllm, _ = load_pipeline(NAMES["diffusion_models"], NAMES["vae"], NAMES["mllm"])
        self.base = ModelSamplingFlux().patch(model, max_shift=1.15, base_shift=0.5, width=SIDE, height=SIDE)[0]
        self._features: dict[tuple, Features] = {}
        self.empty = self.mllm.encode("")

    @torch.no_grad()
    def cases(self, data: Path) -> list[Case]:
        """All cases of the test split."""
        cases = []
        for entry in read_entries(data, "test"):
            references = load_references(data, entry["image_paths"])
            cases.append(Case(entry, references, [self.vae.encode(image[None]) for image in references]))
        return cases

    def features(self, case: Case, images: bool = True) -> Features:
        """The MLLM's features of a case, with its references or without; encoded once."""
        key = (case.prompt, tuple(case.entry["image_paths"]), images)
        if key not in self._features:
            self._features[key] = self.mllm.encode(case.prompt, case.references if images else (), image_size=SIDE)
        return self._features[key]


class Arm:
    """A pair of DLA and LoRA on the family's DiT."""

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
    ) -> Tensor:
        """Draws the cases; those of equally many tokens share batches.

        Args:
            cases: What to draw.
            stages: The schedule.
            images: Whether the MLLM reads the references.
            change: Applied to the MLLM's features, before the DLA.
            seed: Of the noise.

        Returns:
            Pictures (n, 3, h, w) in 0..1.
        """
        groups = defaultdict(list)
        for index, case in enumerate(cases):
            features = change(self.family.features(case, images))
            groups[features.hidden_states.shape[2], len(case.latents)].append((index, features))
        negative = self.dla.aggregate(self.family.empty).tokens
        out = torch.empty(len(cases), 3, SIDE, SIDE)
        for number, group in enumerate(groups.values()):
            for start in range(0, len(group), BATCH):
                part = group[start : start + BATCH]
                tokens = torch.cat([self.dla.aggregate(features).tokens for _, features in part])
                latents = zip(*(cases[index].latents for index, _ in part))
                references = [torch.cat(column) for column in latents]
                values = values_of(torch.ones(tokens.shape[:2]), False, references=references, method="uxo")
                positive, empty = [[tokens, values]], [[negative.repeat(len(part), 1, 1), values]]
                latent = {"samples": torch.zeros(len(part), 16, SIDE // 8, SIDE // 8)}
                noise_seed = 1000 * seed + 10 * number + start
                sampled = staged_sample(
                    self.model, noise_seed, STEPS, CFG, "euler", "simple", positive, empty, latent, 1.0, stages
                )
                drawn = self.family.vae.decode(sampled["samples"]).movedim(-1, 1)
                out[[index for index, _ in part]] = drawn.float().clamp(0, 1).cpu()
        return out


def draw_rows(store: ResultStore, rows: list[Row], data: Path, share: float) -> None:
    """Draws and measures the rows that have no result yet, each stored at once; the host must have been started.

    Args:
        store: Where results go.
        rows: Rows whose weights are there.
        data: Folder of the cases.
        share: Of each row's cases.
    """
    import comfy.utils
    import folder_paths

    from ...loaders import folders
    from ..family.oracle import load_oracle

    folders.register()
    for kind in NAMES:
        folder_paths.add_model_folder_path(kind, str((store.models / kind).resolve()), is_default=True)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    rows = [row for row in rows if not store.path(row).exists()]
    if not rows:
        return
    family, oracle = Family(), load_oracle(store.models.parent / "oracle.safetensors")
    cases, arm = family.cases(data), None
    for row in rows:
        started = time.monotonic()
        if arm is None or arm.name != row.arm:
            arm = Arm(family, row.arm)
        chosen = [case for case in cases if case.entry["set"] == row.cases]
        chosen = chosen[: max(2, round(len(chosen) * share * row.share))]
        drawn = arm.draw(chosen, row.stages, images=row.images, change=row.change, seed=row.seed)
        reading, file = oracle.read(drawn), store.path(row)
        strip = torch.cat(list(drawn[:STRIP]), 2).mul(255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(strip).save(file.with_suffix(".png"))
        traits = {name: values.tolist() for name, values in reading.traits.items()}
        seconds = round(time.monotonic() - started, 1)
        file.write_text(json.dumps({"angles": reading.angles.tolist(), "traits": traits, "seconds": seconds}))
        print(f"{row.key}: {len(chosen)} pictures in {seconds} s", flush=True)
