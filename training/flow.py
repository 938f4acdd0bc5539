"""Flow matching: which flow times are trained on, the noisy latent, and the loss.

Flow time t is 1 for noise and 0 for the image, as the host's sigma: x_t = (1 - t) x_0 + t noise, and the DiT predicts
the velocity noise - x_0. Source: our choice; the loss of the paper is not known to us.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TIMES = ("logit_normal", "uniform")
WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")


@dataclass(frozen=True)
class FlowTimes:
    """Distribution of the flow times: that of `times`, then the DiT's shift t -> s t / (1 + (s - 1) t)."""

    times: str = "logit_normal"  # of mean 0 and deviation 1, or "uniform"
    shift: float = 1.0  # s; FLUX calls its logarithm the shift

    def __call__(self, share: Tensor) -> Tensor:
        """Maps uniform numbers in (0, 1) to flow times (same shape), monotonically."""
        share = share.double().clamp(1e-6, 1 - 1e-6)
        if self.times == "logit_normal":
            share = torch.special.ndtri(share).sigmoid()
        return (self.shift * share / (1 + (self.shift - 1) * share)).float()


def generator(seed: int, *key: int) -> torch.Generator:
    """Makes a CPU generator from a seed and a key (stream, position, ...) alone: resuming needs no RNG state."""
    state = seed & (2**64 - 1)
    for number in key:  # splitmix64 steps: neighbouring keys give unrelated streams
        state = (state + 0x9E3779B97F4A7C15 * (number + 1)) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return torch.Generator().manual_seed(state)


def noisy(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Returns x_t for flow times t (b,)."""
    t = t.reshape(-1, *[1] * (clean.ndim - 1)).to(clean)
    return (1 - t) * clean + t * noise


def weight(t: Tensor, weighting: str) -> Tensor:
    """Returns the loss weights (b,) of flow times t (b,).

    "none" = 1, which the logit-normal times already concentrate; "sigma_sqrt" = t^-2 and "cosmap" as in SD3.

    Source: arXiv 2403.03206, section 3.1.
    """
    if weighting == "sigma_sqrt":
        return t**-2.0
    if weighting == "cosmap":
        return 2 / (torch.pi * (1 - 2 * t + 2 * t**2))
    return torch.ones_like(t)


def losses(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Returns the mean square errors (b,) of the predicted velocity, in fp32."""
    return (velocity.float() - (noise - clean).float()).square().flatten(1).mean(dim=1)
