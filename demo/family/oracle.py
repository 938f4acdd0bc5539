"""The oracle: a small network that reads a toy's view and traits from a picture, to measure the demo's pictures.

Trained on renders (demo/family/train_oracle.py); its errors on renders of held-out toys are the floor of every metric.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .world import COLOURS, DECALS, KINDS, PARTS, PATTERNS, Picture, Toy

TRAITS = {
    "kind": KINDS, **{part: tuple(COLOURS) for part in PARTS}, "decal": DECALS, "decal_colour": tuple(COLOURS),
    "pattern": PATTERNS,
}  # fmt: skip
COARSE = ("kind", *PARTS)
FINE = ("decal", "decal_colour", "pattern")


@dataclass(frozen=True)
class Reading:
    """What the oracle reads in n pictures.

    Args:
        angles: (n, 2) azimuth and polar angle in degrees.
        traits: By trait, (n,) indices into TRAITS[trait].
    """

    angles: Tensor
    traits: dict[str, Tensor]

    def accuracy(self, names: tuple[str, ...], toys: list[Toy]) -> Tensor:
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
        # A view shows in the positions of features, a decal in their presence at any position.
        self.view = nn.Sequential(nn.Flatten(), nn.Linear(49 * widths[-1], 96), nn.GELU(), nn.Linear(96, 3))
        values = sum(map(len, TRAITS.values()))
        self.traits = nn.Sequential(nn.Linear(2 * widths[-1], 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, values))

    def forward(self, pictures: Tensor) -> Tensor:
        """See the class."""
        features = self.body(pictures.sub(0.5).mul(4))
        pooled = torch.cat((features.amax((2, 3)), features.mean((2, 3))), 1)
        return torch.cat((self.view(features), self.traits(pooled)), 1)

    @torch.no_grad()
    def read(self, pictures: Tensor) -> Reading:
        """View and traits of pictures (n, 3, 112, 112) in 0..1."""
        out = torch.cat([self(part) for part in pictures.split(64)])
        azimuth = torch.rad2deg(torch.atan2(out[:, 0], out[:, 1])) % 360
        traits = {name: logits.argmax(1) for name, logits in split_logits(out, tuple(TRAITS)).items()}
        return Reading(torch.stack((azimuth, out[:, 2] * 45), 1), traits)


def split_logits(out: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """By trait, the logits (n, values) in outputs (n, 3 + values of these traits) that begin with the view's three."""
    return dict(zip(names, out[:, 3:].split([len(TRAITS[name]) for name in names], 1)))


def labels(pictures: list[Picture]) -> tuple[Tensor, Tensor]:
    """Trait indices (n, traits), and sine and cosine of the azimuth and polar / 45 (n, 3), of one-toy pictures."""
    toys = [picture.toys[0] for picture in pictures]
    traits = torch.tensor([[values.index(getattr(toy, name)) for name, values in TRAITS.items()] for toy in toys])
    azimuth = torch.deg2rad(torch.tensor([picture.view.azimuth for picture in pictures]))
    polar = torch.tensor([picture.view.polar for picture in pictures]) / 45
    return traits, torch.stack((azimuth.sin(), azimuth.cos(), polar), 1)


def load_oracle(path: Path) -> Oracle:
    """The oracle in fp32, for inference."""
    model = Oracle().eval()
    model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return model
