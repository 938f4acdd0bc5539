"""Trains the demo's DiT: FLUX.1's layout made small, from nothing, first on captions, then on prompts and references.

    python common/bootstrap.py demo.family.train_dit COMFYUI DATA RUN [--steps CAPTIONS PAIRS] [--start FILE]

reads RUN/models/vae and RUN/models/mllm, writes RUN/models/diffusion_models (fp16). The DiT's context is the MLLM's
last layer, as in Qwen-Image.
"""

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
from . import loop
from .data import load_references, picture_paths, read_entries
from .latents import encode_cached
from .layout import FLUX, NAMES, SIDE, SIZES, flux_config

BATCH, DROP = 32, 0.1  # DROP: share of batches with an empty prompt
CAPTIONS = 3000  # how many entries' captions are used
SHIFT = 1.592  # FLUX.1's at 7 x 7 tokens, from ModelSamplingFlux at 112 x 112 px


def main() -> None:
    """The command."""
    options = loop.setup(__doc__, 3000, 5200)
    entries = read_entries(options.data, "pairs")
    latents = encode_cached(options.data, picture_paths(entries), options.run)
    first = torch.tensor([0] + [len(entry["pictures"]) for entry in entries]).cumsum(0)  # each entry's target
    captions = _Contexts(options, "captions", [(entry["pictures"][0].caption(), []) for entry in entries[:CAPTIONS]])
    prompts = _Contexts(options, "pairs", [(entry["prompt"], entry["image_paths"]) for entry in entries])
    empty = _Contexts(options, "nothing", [("", [])]).contexts[0]
    dit = _new_dit()
    loop.load_matching(dit, options.start, _norm_names(dit))
    times = FlowTimes(shift=SHIFT)

    def loss(seed: int, step: int, contexts: _Contexts, with_references: bool) -> Tensor:
        """Flow-matching loss of one batch, with the references' latents or without."""
        generator = loop.step_generator(seed, step)
        index, context = contexts.batch(generator)
        if torch.rand(1, generator=generator) < DROP:
            context = empty.expand(BATCH, -1, -1)
        clean = latents[first[index]].float()
        count = len(entries[int(index[0])]["image_paths"]) if with_references else 0  # the same in the whole batch
        references = [latents[first[index] + 1 + n].float() for n in range(count)]
        noise = torch.randn(clean.shape, generator=generator)
        t = times(torch.rand(BATCH, generator=generator))
        noisy = torch.lerp(clean, noise, t[:, None, None, None])
        velocity = dit(noisy, t, context, ref_latents=references or None, ref_latents_method="uxo")
        return (velocity.float() - (noise - clean)).square().mean()

    def caption_terms(step: int) -> dict[str, Tensor]:
        return {"caption": loss(2, step, captions, False)}

    def pair_terms(step: int) -> dict[str, Tensor]:
        """Of ten steps two are on captions still, three on prompts with the references' latents, five without."""
        if step % 10 in (0, 5):
            return caption_terms(caption_steps + step)
        with_references = step % 10 in (1, 4, 7)
        return {"both" if with_references else "mllm": loss(5, step, prompts, with_references)}

    caption_steps, pair_steps = options.steps
    shared = {"folder": options.run, "context": in_place}  # the host's blocks write in place
    record = {"phases": [
        loop.train("dit", dit, caption_terms, steps=caption_steps, learning_rate=1e-3, warmup=500, **shared),
        loop.train("dit-pairs", dit, pair_terms, steps=pair_steps, learning_rate=7e-4, **shared),
    ]}  # fmt: skip
    # The published files call the norms' weights "scale"; newer hosts rename them on loading.
    weights = {key.replace("_norm.weight", "_norm.scale"): value for key, value in dit.state_dict().items()}
    metadata = {"unet_config": json.dumps({name: FLUX[name] for name in SIZES})}
    path = options.run / "models" / "diffusion_models" / NAMES["diffusion_models"]
    loop.save_weights(path, weights, record, metadata)


class _Contexts:
    """Prompts with their references as the MLLM's last layer, encoded once; a batch has one number of tokens."""

    def __init__(self, options, name: str, prompts: list[tuple[str, list[str]]]):
        file = options.run / f"contexts-{name}.safetensors"
        if not file.exists():
            tokens = list(_encode(options, prompts))
            save_tensors(file, {"tokens": torch.cat(tokens).half(), "lengths": torch.tensor([len(t) for t in tokens])})
        saved = load_file(file)
        self.contexts = saved["tokens"].float().split(saved["lengths"].tolist())
        groups = defaultdict(list)
        for index, ((_, images), context) in enumerate(zip(prompts, self.contexts)):
            groups[len(images), len(context)].append(index)
        self.groups = [torch.tensor(group) for group in groups.values()]
        self.shares = torch.tensor([float(len(group)) for group in self.groups])

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Indices (BATCH,) of prompts, and their context tokens (BATCH, n, c)."""
        group = self.groups[int(torch.multinomial(self.shares, 1, generator=generator))]
        index = group[torch.randint(len(group), (BATCH,), generator=generator)]
        return index, torch.stack([self.contexts[i] for i in index.tolist()])


@torch.no_grad()
def _encode(options, prompts: list[tuple[str, list[str]]]) -> Iterator[Tensor]:
    import folder_paths

    from ...loaders import folders
    from ...loaders.mllm import load_mllm

    folders.register()
    folder_paths.add_model_folder_path("mllm", str((options.run / "models" / "mllm").resolve()), is_default=True)
    mllm = load_mllm(NAMES["mllm"])
    for prompt, paths in prompts:
        images = load_references(options.data, paths)
        yield aggregate(mllm.encode(prompt, images, image_size=SIDE)).tokens[0]


def _norm_names(dit: nn.Module):
    """From a published file's names of the norms' weights, "scale", to this host's."""
    own = dit.state_dict()
    return lambda key: key if key in own else key.replace("_norm.scale", "_norm.weight")


def _new_dit() -> nn.Module:
    """The host's class with fresh weights, which its own layers lack. Modulation and output start at zero."""
    import comfy.ldm.flux.model
    import comfy.ops

    ops = comfy.ops.disable_weight_init
    model = comfy.ldm.flux.model.Flux(**flux_config(), dtype=torch.float32, device="cpu", operations=ops)
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            zero = re.search(r"mod(ulation)?\.lin$|adaLN_modulation\.1$|final_layer\.linear$", name)
            weight = torch.empty_like(part.weight)
            part.weight.data = weight.zero_() if zero else nn.init.xavier_uniform_(weight)
            part.bias.data.zero_()
    for name, value in model.named_parameters():
        if re.search(r"_norm\.(scale|weight)$", name):
            value.data.fill_(1.0)
    return model.requires_grad_(True)


if __name__ == "__main__":
    main()
