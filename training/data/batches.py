"""From examples to what one pass through the DiT needs; all of it a function of seed and position, so that a resumed
run sees what the uninterrupted one saw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...dla.features import Features
from ...loaders.reference_latents import reference_size
from ..flow import FlowTimes, generator
from ..recipe import Recipe
from .buckets import Order, bucket
from .dataset import Example
from .feature_cache import FeatureSource, stack
from .latent_cache import LatentCache

SHARE, NOISE, TIME, PROMPT, HELD_OUT = range(5)  # streams of random numbers
EMPTY = (" ", ())  # prompt and references on CFG's negative side; in the graph, too, an empty prompt is a space
STRATA = ((0.95, 1.0), (0.85, 0.95), (0.0, 0.85))  # flow times between the paper's thresholds [T]


@dataclass(frozen=True, eq=False)
class Batch:
    """One pass: b examples whose pictures have the same sizes. Latents are the VAE's, on the CPU."""

    condition: str  # "mllm" | "vae" | "both": which tokens the DiT gets
    features: Features | None  # None without MLLM tokens
    pooled: Tensor | None  # (b, p); the stages of sampling keep it, so it stays without MLLM tokens too
    clean: Tensor  # (b, c, h, w) or (b, c, 1, h, w)
    references: tuple[Tensor, ...]  # the same per reference; () without VAE tokens
    noise: Tensor  # as clean
    t: Tensor  # (b,) flow times

    def under(self, condition: str) -> Batch:
        """The same pass with the tokens of one condition; what it lacks must be there."""
        return replace(
            self,
            condition=condition,
            features=None if condition == "vae" else self.features,
            references=() if condition == "mllm" else self.references,
        )


class Batches:
    """The passes of a run over one set of examples."""

    def __init__(
        self,
        examples: Sequence[Example],
        recipe: Recipe,
        latents: LatentCache,
        features: FeatureSource,
        times: FlowTimes,
        placement: str | None,
    ):
        self.examples, self.recipe, self.latents, self.features = tuple(examples), recipe, latents, features
        self.times, self.placement = times, placement
        self.sizes = [self._sizes(example) for example in self.examples]
        self.order = Order(self.sizes, recipe.training.batch_size, recipe.training.seed)

    def _sizes(self, example: Example) -> tuple[tuple[int, int], ...]:
        """(width, height) in px of target and references, all snapped to buckets so that they stack."""
        data = self.recipe.data
        target = bucket(*example.target_size, data.resolution)
        references = [
            reference_size(*size, data.reference_size, self.placement == "uxo") for size in example.reference_sizes
        ]
        return target, *references

    def prepare(self, positions: Iterable[int]) -> None:
        """Encodes what these passes need, while MLLM and VAE are on the device."""
        wanted = []
        for position in positions:
            indices = self.order.at(position)
            wanted += self._prompts(indices, position)
            for index in indices:
                self._latents(index)
        self.features.prefetch(wanted)

    def at(self, position: int) -> Batch:
        """The pass number `position` of the run, counted from 0 over all epochs and processes."""
        indices = self.order.at(position)
        shares = torch.rand(len(indices), generator=generator(self.recipe.training.seed, TIME, position))
        prompts = self._prompts(indices, position)
        batch = self._batch(indices, prompts, self.times(shares), (NOISE, position))
        return batch.under(self._condition(position))

    def held_out(self, count: int) -> list[Batch]:
        """One pass with all tokens for each of the first `count` examples, all encoded; always the same. The pass is at
        noise and flow time of the first of STRATA; `at_stratum` gives the others."""
        passes = []
        for index, example in enumerate(self.examples[:count]):
            prompts = [(example.prompt, example.references)]
            passes.append(self._batch([index], prompts, torch.ones(1), (HELD_OUT, index)))
        return passes

    def at_stratum(self, batch: Batch, index: int, number: int) -> Batch:
        """The held-out pass number `index` at a flow time in STRATA[number], with noise of its own."""
        low, high = STRATA[number]
        draw = generator(self.recipe.training.seed, HELD_OUT, index, number)
        t = (low + (high - low) * torch.rand(1, generator=draw)).clamp(min=0.01)
        return replace(batch, t=t, noise=torch.randn(batch.noise.shape, generator=draw))

    def _batch(self, indices: list[int], prompts: list, t: Tensor, place: tuple[int, ...]) -> Batch:
        """`prompts`: [] = no MLLM tokens."""
        encoded = [self.features.get(*prompt) for prompt in prompts]
        pictures = [self._latents(index) for index in indices]
        clean = torch.stack([rows[0] for rows in pictures])
        pooled = [e.pooled for e in encoded if e.pooled is not None]
        return Batch(
            condition="both",
            features=stack([e.features for e in encoded]) if encoded else None,
            pooled=torch.cat(pooled) if pooled else None,
            clean=clean,
            references=tuple(torch.stack(column) for column in zip(*(rows[1:] for rows in pictures))),
            noise=torch.randn(clean.shape, generator=generator(self.recipe.training.seed, *place)),
            t=t,
        )

    def _latents(self, index: int) -> list[Tensor]:
        example, sizes = self.examples[index], self.sizes[index]
        return [self.latents.get(path, *size) for path, size in zip((example.target, *example.references), sizes)]

    def _condition(self, position: int) -> str:
        draw = torch.rand(1, generator=generator(self.recipe.training.seed, SHARE, position)).item()
        shares = [(name, share) for name, share in self.recipe.shares.items() if share]
        for name, share in shares:
            if draw < share:
                return name
            draw -= share
        return shares[-1][0]

    def _prompts(self, indices: list[int], position: int) -> list[tuple[str, tuple]]:
        """What the MLLM reads: at times nothing, which is the negative side of CFG; [] where nobody needs it."""
        if self._condition(position) == "vae" and self.features.clip is None:
            return []
        draws = torch.rand(len(indices), generator=generator(self.recipe.training.seed, PROMPT, position))
        dropped = (draws < self.recipe.training.drop_prompt).tolist()
        examples = [self.examples[index] for index in indices]
        return [EMPTY if drop else (example.prompt, example.references) for drop, example in zip(dropped, examples)]
