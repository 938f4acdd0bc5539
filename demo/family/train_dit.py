"""Trains the demo's DiT: FLUX.1's layout made small, from nothing, first to draw captions, then what a prompt and a reference
ask for. It reads the MLLM's last layer, as Qwen-Image's DiT does.

    python common/bootstrap.py demo.family.train_dit COMFYUI DATA RUN [--steps CAPTIONS PAIRS] [--start FILE]

reads RUN/models/vae and RUN/models/mllm, writes RUN/models/diffusion_models (fp16).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...common.files import save_tensors
from ...dla.context import aggregate
from ...training.dit.checkpointing import in_place
from ...training.flow import FlowTimes
from . import fit, pictures
from .latents import encoded
from .layout import FLUX, NAMES, SIDE, SIZES, flux_config

BATCH, DROP = 32, 0.1
CAPTIONS = 3000  # so many rows' captions are drawn from
SHIFT = 1.592  # FLUX.1's at 7 x 7 tokens, what ModelSamplingFlux gives at 112 x 112 px


def main() -> None:
    options = fit.begin(__doc__, 3000, 5200)
    rows = pictures.entries(options.data, "pairs")
    latents = encoded(options.data, [name for row in rows for name in pictures.paths(row)], options.run)
    first = torch.tensor([0] + [len(row["pictures"]) for row in rows]).cumsum(0)  # of each row's pictures: the target
    captions = Said(options, "captions", [(row["pictures"][0].caption(), []) for row in rows[:CAPTIONS]])
    prompts = Said(options, "pairs", [(row["prompt"], row["image_paths"]) for row in rows])
    nothing = Said(options, "nothing", [("", [])]).contexts[0]
    dit = new_dit()
    fit.start(dit, options.start, norm_names(dit))
    times = FlowTimes(shift=SHIFT)

    def loss(seed: int, step: int, said: Said, look: bool) -> Tensor:
        """Of one batch. look: the DiT gets the references' latents too."""
        generator = fit.draw(seed, step)
        index, context = said.batch(generator)
        if torch.rand(1, generator=generator) < DROP:
            context = nothing.expand(BATCH, -1, -1)
        clean = latents[first[index]].float()
        count = len(rows[int(index[0])]["image_paths"]) if look else 0  # of the whole batch
        references = [latents[first[index] + 1 + n].float() for n in range(count)]
        noise = torch.randn(clean.shape, generator=generator)
        t = times(torch.rand(BATCH, generator=generator))
        noisy = torch.lerp(clean, noise, t[:, None, None, None])
        velocity = dit(noisy, t, context, ref_latents=references or None, ref_latents_method="uxo")
        return (velocity.float() - (noise - clean)).square().mean()

    def from_pairs(step: int) -> dict[str, Tensor]:
        """Of ten steps two are of captions still, three of prompts with the references' latents, five without."""
        if step % 10 in (0, 5):
            return {"caption": loss(2, options.steps[0] + step, captions, False)}
        look = step % 10 in (1, 4, 7)
        return {"both" if look else "mllm": loss(5, step, prompts, look)}

    settings = {"average": 0.998, "around": in_place}  # as the host's blocks write
    drawn, paired = options.steps
    record = {"phases": [
        fit.fit("dit", dit, lambda step: {"caption": loss(2, step, captions, False)}, options.run, steps=drawn, rate=1e-3, warmup=500, **settings),
        fit.fit("dit-pairs", dit, from_pairs, options.run, steps=paired, rate=7e-4, warmup=100, **settings),
    ]}  # fmt: skip
    # The published files call the norms' weights "scale"; newer hosts rename them on loading.
    weights = {key.replace("_norm.weight", "_norm.scale"): value for key, value in dit.state_dict().items()}
    sizes = {name: FLUX[name] for name in SIZES}
    fit.keep(
        options.run / "models" / "diffusion_models" / NAMES["diffusion_models"],
        weights,
        record,
        {"unet_config": json.dumps(sizes)},
    )


class Said:
    """Prompts, each with its pictures, as the MLLM's last layer has them; a batch is of one number of tokens."""

    def __init__(self, options, name: str, asked: list[tuple[str, list[str]]]):
        file = options.run / f"contexts-{name}.safetensors"
        if not file.exists():
            tokens = list(read(options, asked))
            save_tensors(file, {"tokens": torch.cat(tokens).half(), "lengths": torch.tensor([len(t) for t in tokens])})
        kept = load_file(file)
        self.contexts = kept["tokens"].float().split(kept["lengths"].tolist())
        groups = defaultdict(list)
        for index, ((_, images), context) in enumerate(zip(asked, self.contexts)):
            groups[len(images), len(context)].append(index)
        self.groups = [torch.tensor(group) for group in groups.values()]
        self.shares = torch.tensor([float(len(group)) for group in self.groups])

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Numbers (BATCH,) and context tokens (BATCH, n, c)."""
        group = self.groups[int(torch.multinomial(self.shares, 1, generator=generator))]
        index = group[torch.randint(len(group), (BATCH,), generator=generator)]
        return index, torch.stack([self.contexts[i] for i in index.tolist()])


@torch.no_grad()
def read(options, asked: list[tuple[str, list[str]]]) -> Iterator[Tensor]:
    import folder_paths

    from ...loaders import folders
    from ...loaders.mllm import load_mllm

    folders.register()
    folder_paths.add_model_folder_path("mllm", str((options.run / "models" / "mllm").resolve()), is_default=True)
    mllm = load_mllm(NAMES["mllm"])
    for prompt, names in asked:
        seen = pictures.images(options.data, names)
        yield aggregate(mllm.encode(prompt, seen, image_size=SIDE)).tokens[0]


def norm_names(dit: nn.Module):
    """From a published file's names of the norms' weights, "scale", to this host's."""
    own = dit.state_dict()
    return lambda key: key if key in own else key.replace("_norm.scale", "_norm.weight")


def new_dit() -> nn.Module:
    """The host's class with fresh weights: its own layers come without. Modulation and output start at zero."""
    import comfy.ldm.flux.model
    import comfy.ops

    ops = comfy.ops.disable_weight_init
    model = comfy.ldm.flux.model.Flux(**flux_config(), dtype=torch.float32, device="cpu", operations=ops)
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            still = re.search(r"mod(ulation)?\.lin$|adaLN_modulation\.1$|final_layer\.linear$", name)
            weight = torch.empty_like(part.weight)
            part.weight.data = weight.zero_() if still else nn.init.xavier_uniform_(weight)
            part.bias.data.zero_()
    for name, value in model.named_parameters():
        if re.search(r"_norm\.(scale|weight)$", name):
            value.data.fill_(1.0)
    return model.requires_grad_(True)


if __name__ == "__main__":
    main()
