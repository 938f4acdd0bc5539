"""Trains the demo's DiT: FLUX.1's layout made small, from nothing, first to draw captions, then prompts with reference
latents beside them as well. It stands where FLUX.1-dev with UNO stands: an image model with references that has seen no MLLM.

    python demo/train_dit.py COMFYUI DATA RUN [--steps CAPTIONS REFERENCES] [--start FILE]

reads RUN/models/vae, writes RUN/models/diffusion_models (fp16). Its text encoder, two layers over words, is dropped
afterwards, as the paper drops T5: the DLA's tokens take its place.
"""

from __future__ import annotations

import json
import re

import torch
from torch import Tensor, nn

if __name__ == "__main__":
    from family import import_pack  # beside this file

    import_pack()

from subject_dla.demo import fit, pictures  # noqa: E402
from subject_dla.demo.family import CONTEXT_WIDTH, FLUX, NAMES, SIZES, flux_config  # noqa: E402
from subject_dla.demo.latents import encoded  # noqa: E402
from subject_dla.training.flow import FlowTimes  # noqa: E402

BATCH, DROP, WORDS = 32, 0.1, 48
SHIFT = 1.592  # FLUX.1's at 7 x 7 tokens, what ModelSamplingFlux gives at 112 x 112 px


def main() -> None:
    options = fit.begin(__doc__, 3200, 3000)
    rows = pictures.entries(options.data, "pairs")
    names = [name for row in rows for name in pictures.paths(row)]
    captions = [picture.caption() for row in rows for picture in row["pictures"]]
    prompts = [row["prompt"] for row in rows]
    latents = encoded(options.data, names, options.run)
    vocabulary = {word: n for n, word in enumerate(sorted({w for text in captions + prompts for w in words(text)}), 1)}
    captions, prompts = numbers(captions, vocabulary), numbers(prompts, vocabulary)
    first = torch.tensor([0] + [len(row["pictures"]) for row in rows]).cumsum(0)  # of each row's pictures: the target
    by_count = {n: torch.tensor([i for i, row in enumerate(rows) if len(row["image_paths"]) == n]) for n in (1, 2)}
    model = Base(len(vocabulary) + 1)
    fit.start(model.dit, options.start, norm_names(model.dit))
    times = FlowTimes(shift=SHIFT)

    def velocity(generator: torch.Generator, ids: Tensor, clean: Tensor, references: list[Tensor]) -> dict[str, Tensor]:
        noise = torch.randn(clean.shape, generator=generator)
        t = times(torch.rand(BATCH, generator=generator))
        ids = ids * (torch.rand(BATCH, 1, generator=generator) >= DROP)
        ids = ids[:, : int((ids != 0).sum(1).max().clamp(min=1))]
        noisy = torch.lerp(clean, noise, t[:, None, None, None])
        return {"velocity": (model(noisy, t, ids, references).float() - (noise - clean)).square().mean()}

    def from_caption(step: int) -> dict[str, Tensor]:
        generator = fit.draw(2, step)
        index = torch.randint(len(latents), (BATCH,), generator=generator)
        return velocity(generator, captions[index], latents[index].float(), [])

    def from_references(step: int) -> dict[str, Tensor]:
        """Every fourth step is of captions still; one in seven of the others has two references, as the data have."""
        if step % 4 == 3:
            return {"caption": from_caption(options.steps[0] + step)["velocity"]}
        generator = fit.draw(5, step)
        count = 2 if step % 7 == 0 else 1
        rows = by_count[count]
        rows = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        references = [latents[first[rows] + 1 + n].float() for n in range(count)]
        return velocity(generator, prompts[rows], latents[first[rows]].float(), references)

    in_place = torch.autograd.graph.allow_mutation_on_saved_tensors  # as the host's blocks write
    settings = {"average": 0.999, "around": in_place}
    drawn, seen = options.steps
    record = {"phases": [
        fit.fit("dit", model, from_caption, options.run, steps=drawn, rate=1e-3, warmup=500, **settings),
        fit.fit("dit-references", model, from_references, options.run, steps=seen, rate=7e-4, warmup=200, **settings),
    ]}  # fmt: skip
    # The published files call the norms' weights "scale"; newer hosts rename them on loading.
    weights = {key.replace("_norm.weight", "_norm.scale"): value for key, value in model.dit.state_dict().items()}
    sizes = {name: FLUX[name] for name in SIZES}
    fit.keep(
        options.run / "models" / "diffusion_models" / NAMES["diffusion_models"],
        weights,
        record,
        {"unet_config": json.dumps(sizes)},
    )


class Base(nn.Module):
    def __init__(self, words: int):
        super().__init__()
        self.dit = new_dit()
        self.embed = nn.Embedding(words, CONTEXT_WIDTH)
        self.place = nn.Parameter(torch.randn(WORDS, CONTEXT_WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(CONTEXT_WIDTH, 4, 512, 0.0, "gelu", batch_first=True, norm_first=True)
        self.text = nn.TransformerEncoder(layer, 2, nn.LayerNorm(CONTEXT_WIDTH), enable_nested_tensor=False)

    def forward(self, noisy: Tensor, t: Tensor, ids: Tensor, references: list[Tensor]) -> Tensor:
        """Velocity, as `noisy` (b, c, h, w); t: flow times (b,); ids: words (b, n), 0 = none; references as `noisy`."""
        context = self.text(self.embed(ids) + self.place[: ids.shape[1]])
        return self.dit(noisy, t, context, ref_latents=references or None, ref_latents_method="uxo")


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


def numbers(texts: list[str], vocabulary: dict[str, int]) -> Tensor:
    """(texts, WORDS), 0 = none."""
    out = torch.zeros(len(texts), WORDS, dtype=torch.long)
    for row, text in enumerate(texts):
        found = [vocabulary[word] for word in words(text)][:WORDS]
        out[row, : len(found)] = torch.tensor(found)
    return out


def words(caption: str) -> list[str]:
    """Those that tell something."""
    return [
        word
        for word in re.findall(r"\w+", caption)
        if word not in ("a", "an", "and", "the", "with", "seen", "on", "in")
    ]


if __name__ == "__main__":
    main()
