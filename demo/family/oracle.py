"""The measure of the demo's pictures: a small network that reads a toy's view and traits from a picture.

Trained on renders (demo/family/train_oracle.py); its own errors on renders it has not seen are the floor of every figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .world import COLOURS, DECALS, KINDS, PARTS, PATTERNS, Toy

TRAITS = {
    "kind": KINDS, **{part: tuple(COLOURS) for part in PARTS}, "decal": DECALS, "decal_colour": tuple(COLOURS),
    "pattern": PATTERNS,
}  # fmt: skip
COARSE = ("kind", *PARTS)
FINE = ("decal", "decal_colour", "pattern")


@dataclass(frozen=True)
class Reading:
    """angles (n, 2): azimuth and polar in degrees. traits: name -> (n,) indices into TRAITS[name]. probabilities: the
    same with those of each value (n, values)."""

    angles: Tensor
    traits: dict[str, Tensor]
    probabilities: dict[str, Tensor]

    def right(self, names: tuple[str, ...], toys: list[Toy]) -> Tensor:
        """(n,) share of these traits that are the toy's."""
        hits = [
            self.traits[name] == torch.tensor([TRAITS[name].index(getattr(toy, name)) for toy in toys])
            for name in names
        ]
        return torch.stack(hits).float().mean(0)


class Oracle(nn.Module):
    """(n, 3, 112, 112) in 0..1 -> (n, outputs): sine and cosine of the azimuth, polar / 45, logits of the traits."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 144)):
        super().__init__()

        def block(before: int, after: int) -> list[nn.Module]:
            return [
                nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU(),
                nn.Conv2d(after, after, 3, 1, 1), nn.BatchNorm2d(after), nn.ReLU(),
            ]  # fmt: skip

        self.body = nn.Sequential(*(part for pair in zip((3, *widths), widths) for part in block(*pair)))
        # A view is told by where things are, a decal by that it is there at all, wherever.
        self.view = nn.Sequential(nn.Flatten(), nn.Linear(49 * widths[-1], 96), nn.GELU(), nn.Linear(96, 3))
        self.traits = nn.Sequential(nn.Linear(2 * widths[-1], 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, sum(map(len, TRAITS.values()))))  # fmt: skip

    def forward(self, pictures: Tensor) -> Tensor:
        features = self.body(pictures.sub(0.5).mul(4))
        anywhere = torch.cat((features.amax((2, 3)), features.mean((2, 3))), 1)
        return torch.cat((self.view(features), self.traits(anywhere)), 1)

    @torch.no_grad()
    def read(self, pictures: Tensor) -> Reading:
        out = torch.cat([self(part) for part in pictures.split(64)])
        azimuth = torch.rad2deg(torch.atan2(out[:, 0], out[:, 1])) % 360
        logits = out[:, 3:].split([len(values) for values in TRAITS.values()], 1)
        probabilities = {name: part.softmax(1) for name, part in zip(TRAITS, logits)}
        traits = {name: part.argmax(1) for name, part in probabilities.items()}
        return Reading(torch.stack((azimuth, out[:, 2] * 45), 1), traits, probabilities)


def truth(shown: list) -> tuple[Tensor, Tensor]:
    """Indices of traits (n, traits), and sine, cosine and polar / 45 (n, 3)."""
    labels = torch.tensor([[values.index(getattr(p.toys[0], name)) for name, values in TRAITS.items()] for p in shown])
    azimuth = torch.deg2rad(torch.tensor([p.view.azimuth for p in shown]))
    polar = torch.tensor([p.view.polar for p in shown]) / 45
    return labels, torch.stack((azimuth.sin(), azimuth.cos(), polar), 1)


def load_oracle(path: Path) -> Oracle:
    model = Oracle().eval()
    model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return model
