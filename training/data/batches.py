"""From examples to the inputs of one pass through the DiT.

Each pass is planned once, by a function of the seed and its position alone, so that a resumed run sees what an
uninterrupted one sees. The plan is then used to encode ahead and to assemble the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy
import torch
from torch import Tensor

from ...common.images import ImageError
from ...common.picture_files import PictureFile
from ...dla.features import Features
from ...loaders.reference_latents import reference_size
from ..flow import FlowTimes, generator
from ..recipe import Recipe
from .buckets import Order, Sizes, bucket, snapped
from .examples import Examples
from .feature_cache import FeatureSource, Prompt, stack
from .latent_cache import LatentCache

CONDITION, NOISE, TIME, PROMPT, HELD_OUT = range(5)  # streams of random numbers, see flow.generator
EMPTY = (" ", ())  # prompt and references on CFG's negative side: a space, no images
BINS = ((0.95, 1.0), (0.85, 0.95), (0.0, 0.85))  # flow times between the paper's thresholds


@dataclass(frozen=True, eq=False)
class PassPlan:
    """What one pass through the DiT consists of, decided before anything is encoded."""

    indices: tuple[int, ...]  # of the b examples; their images have the same sizes
    condition: str  # "mllm" | "vae" | "both": which tokens the DiT gets
    prompts: tuple[Prompt, ...]  # what the MLLM encodes for each example; () = nothing
    t: Tensor  # (b,) flow times
    noise_key: tuple[int, ...]  # of flow.generator: stream and position


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs of one pass. Latents are the VAE's, on the CPU."""

    features: Features | None  # None without MLLM tokens
    pooled: Tensor | None  # (b, p); staged sampling keeps it, so it stays without MLLM tokens too
    clean: Tensor  # (b, c, h, w) or (b, c, 1, h, w)
    references: tuple[Tensor, ...]  # the same per reference; () without VAE tokens
    noise: Tensor  # as clean
    t: Tensor  # (b,) flow times

    def under(self, condition: str) -> Batch:
        """Returns the same pass with the tokens of one condition; the tokens must be there."""
        return replace(
            self,
            features=None if condition == "vae" else self.features,
            references=() if condition == "mllm" else self.references,
        )


class Batches:
    """The passes of a run over one set of examples."""

    def __init__(
        self,
        examples: Examples,
        recipe: Recipe,
        latents: LatentCache,
        features: FeatureSource,
        times: FlowTimes,
        placement: str | None,
        reference_grid: int = 16,  # px, see Backbone.reference_grid
    ):
        self.examples, self.recipe, self.latents, self.features = examples, recipe, latents, features
        self.times, self.placement, self.seed = times, placement, recipe.training.seed
        self.problems: list[str] = []  # a line for each example that was drawn and turned out to be damaged
        data, uno, index = recipe.data, placement == "uxo", examples.index

        def shown(pictures):
            return numpy.stack([index.width[pictures], index.height[pictures]], 1)

        self.sizes = Sizes(
            snapped(shown(index.target[examples.sample]), lambda w, h: bucket(w, h, data.resolution)),
            snapped(
                shown(examples.references),
                lambda w, h: reference_size(w, h, data.reference_size, uno, reference_grid),
            ),
            examples.ends,
        )
        self.order = Order(self.sizes.keys(), recipe.training.batch_size, self.seed)

    def plan(self, position: int) -> PassPlan:
        """Plans pass number `position` of the run, counted from 0 over all epochs and processes."""
        indices = [self._sound(index) for index in self.order.at(position)]

        def draw(stream: int, count: int) -> Tensor:
            return torch.rand(count, generator=generator(self.seed, stream, position))

        condition = _choose(self.recipe.shares, draw(CONDITION, 1).item())
        dropped = (draw(PROMPT, len(indices)) < self.recipe.training.drop_prompt).tolist()
        examples = [self.examples[index] for index in indices]
        # without MLLM tokens the prompt is encoded only for the pooled vector
        prompts = tuple(EMPTY if drop else (e.prompt, e.references) for drop, e in zip(dropped, examples))
        prompts = () if condition == "vae" and self.features.clip is None else prompts
        return PassPlan(tuple(indices), condition, prompts, self.times(draw(TIME, len(indices))), (NOISE, position))

    def plan_held_out(self, count: int) -> list[PassPlan]:
        """Plans one pass with all tokens for each of the first `count` examples; `at_bin` sets their flow times."""
        return [
            PassPlan((index,), "both", ((example.prompt, example.references),), torch.ones(1), (HELD_OUT, number))
            for number, index in enumerate(map(self._sound, range(min(count, len(self.examples)))))
            for example in [self.examples[index]]
        ]

    def encode(self, plans: Iterable[PassPlan]) -> None:
        """Encodes what these passes need, first by the VAE, then by the MLLM, each on the device in turn."""
        plans = list(plans)
        self.latents.prefetch(image for plan in plans for index in plan.indices for image in self._images(index))
        self.features.prefetch([prompt for plan in plans for prompt in plan.prompts])

    def load(self, plan: PassPlan) -> Batch:
        """Assembles the inputs of a planned pass; encodes what has not been encoded yet."""
        encoded = [self.features.get(*prompt) for prompt in plan.prompts]
        latents = [self._latents(index) for index in plan.indices]
        clean = torch.stack([rows[0] for rows in latents])
        pooled = [e.pooled for e in encoded if e.pooled is not None]
        return Batch(
            features=stack([e.features for e in encoded]) if encoded else None,
            pooled=torch.cat(pooled) if pooled else None,
            clean=clean,
            references=tuple(torch.stack(column) for column in zip(*(rows[1:] for rows in latents))),
            noise=torch.randn(clean.shape, generator=generator(self.seed, *plan.noise_key)),
            t=plan.t,
        ).under(plan.condition)

    def at_bin(self, batch: Batch, index: int, number: int) -> Batch:
        """Returns held-out pass number `index` at a flow time in BINS[number]; time and noise are always the same."""
        low, high = BINS[number]
        draw = generator(self.seed, HELD_OUT, index, number)
        t = (low + (high - low) * torch.rand(1, generator=draw)).clamp(min=0.01)
        return replace(batch, t=t, noise=torch.randn(batch.noise.shape, generator=draw))

    def _sound(self, index: int) -> int:
        """An example, or where a picture of it does not decode, the next one of the same sizes that does.

        It is a function of the data, so a resumed run takes the same one. Raises ImageError where there is none.
        """
        tried = [index]
        while problem := self.examples.damage(tried[-1]):
            line = f"{self.examples[tried[-1]].source or self.examples.subject(tried[-1])}: {problem}"
            if line not in self.problems:
                self.problems.append(line)
            tried.append(self.order.next(tried[-1]))
            if tried[-1] == index:
                raise ImageError(f"No example of the sizes {self.sizes[index]} can be read. {line}")
        return tried[-1]

    def _latents(self, index: int) -> list[Tensor]:
        return [self.latents.get(*image) for image in self._images(index)]

    def _images(self, index: int) -> list[tuple[PictureFile, int, int]]:
        """(path, width, height) of an example's target and references."""
        example, sizes = self.examples[index], self.sizes[index]
        return [(path, *size) for path, size in zip((example.target, *example.references), sizes)]


def _choose(shares: dict[str, float], draw: float) -> str:
    """The condition into whose share of 0..1 a uniform number falls."""
    possible = [(name, share) for name, share in shares.items() if share]
    for name, share in possible:
        if draw < share:
            return name
        draw -= share
    return possible[-1][0]
