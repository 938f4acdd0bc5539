"""Orient Anything V1's network (arXiv 2412.18605): DINOv2's CLS token, a head, and logits to angles.

The backbone is the host's DINOv2; the host is imported only where one is built.

Azimuth 0: the subject's front faces the camera; 90: its front points to the left of the picture. Polar: how far the
camera is above the subject. Rotation: how far the picture is turned, counter-clockwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from ..preprocessing import DINO

SIZES = {384: ("small", 12), 768: ("base", 12), 1024: ("large", 24)}  # DINOv2 by width: name, layers
AZIMUTHS, POLARS, ROTATIONS = 360, 180, (180, 360)  # one logit per degree; rotation: the first files, `ronormsigma1`
CONFIDENCES = 2
HEAD_WIDTH, PATCH = 64, 14
GRID = DINO.crop // PATCH  # 16 patches a side
BACKBONE, HEAD = "dinov2.", "down_sampler."  # of the published keys
POSITIONS = BACKBONE + "embeddings.position_embeddings"


@dataclass(frozen=True, eq=False)
class Angles:
    """Orientations of N subjects, each field (N,) float, in degrees but for the confidence."""

    azimuth: Tensor  # 0 to 360, 360 excluded
    polar: Tensor  # -90 to 90
    rotation: Tensor  # -90 to 90, or -180 to 180 by the layout
    confidence: Tensor  # 0 to 1: that the subject has a front at all

    def __len__(self) -> int:
        return len(self.azimuth)

    def rows(self) -> list[tuple[float, float, float, float]]:
        """(azimuth, polar, rotation, confidence) of each subject."""
        columns = (self.azimuth, self.polar, self.rotation, self.confidence)
        return list(zip(*(column.tolist() for column in columns)))


class OrientationNetwork(nn.Module):
    """(B, 3, 224, 224) to (B, out) logits: DINOv2's CLS token, then the head."""

    def __init__(self, width: int, layers: int, out: int, *, device=None, dtype=None, operations=nn):
        super().__init__()
        self.backbone = build_backbone(width, layers, device, dtype, operations)
        positions = torch.empty(1, GRID**2 + 1, width, device=device, dtype=dtype)  # the host never interpolates them
        self.backbone.get_submodule("embeddings").register_parameter("position_embeddings", nn.Parameter(positions))
        self.head = OrientationHead(width, out, device=device, dtype=dtype, operations=operations)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels of `preprocess_subject` to logits."""
        return self.head(self.backbone(pixels)[2])


class OrientationHead(nn.Module):
    """(B, width) CLS tokens to (B, out) logits.

    Published as Linear, BatchNorm, ReLU, Linear, BatchNorm; the norms are in the linear layers here (see `_fold_head`),
    which is the same at inference and leaves two layers that a host can cast and offload.
    """

    def __init__(self, width: int, out: int, *, device=None, dtype: torch.dtype | None = None, operations=nn):
        super().__init__()
        self.net1 = operations.Linear(width, out, device=device, dtype=dtype)
        self.net2 = operations.Linear(out, out, device=device, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens to logits."""
        return self.net2(self.net1(tokens).relu())


def build_backbone(width: int, layers: int, device, dtype, operations) -> nn.Module:
    """The host's DINOv2 of this width."""
    from comfy.image_encoders.dino2 import Dinov2Model

    config = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // HEAD_WIDTH}
    return Dinov2Model({**config, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False}, dtype, device, operations)


def published_shapes(width: int, layers: int, out: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a published file."""
    backbone = build_backbone(width, layers, "meta", None, nn).state_dict()
    shapes = {BACKBONE + key: tuple(value.shape) for key, value in backbone.items()}
    for name, columns in (("net1", width), ("net2", out)):
        shapes[f"{HEAD}{name}.0.weight"] = (out, columns)
        for key in ("0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
            shapes[f"{HEAD}{name}.{key}"] = (out,)
        shapes[f"{HEAD}{name}.1.num_batches_tracked"] = ()
    return shapes


def inference_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys to those of OrientationNetwork, fp32: positions for 224 px, the head's norms folded in."""
    backbone = {key.removeprefix(BACKBONE): value.float() for key, value in state.items() if key.startswith(BACKBONE)}
    backbone["embeddings.position_embeddings"] = resize_positions(state[POSITIONS].float(), GRID)
    width = backbone["layernorm.weight"].numel()
    backbone.setdefault("embeddings.mask_token", torch.zeros(1, width))
    return {"backbone." + key: value for key, value in backbone.items()} | _fold_head(state)


def rotation_bins(out: int) -> int:
    """How many of `out` logits are for rotation; ValueError unless `out` is one of the two published numbers."""
    bins = out - AZIMUTHS - POLARS - CONFIDENCES
    if bins not in ROTATIONS:
        known = " or ".join(str(AZIMUTHS + POLARS + bins + CONFIDENCES) for bins in ROTATIONS)
        raise ValueError(f"{out} logits found, expected {known} (Orient Anything V1).")
    return bins


def decode(logits: Tensor) -> Angles:
    """(N, out) logits to angles: the highest of each angle's bins of 1 degree, softmax of the last two as confidence.

    The 360-bin layout's rotation is from -180 to 180, the other's from -90 to 90. Raises ValueError for another `out`.
    """
    logits = logits.float()
    bins = rotation_bins(logits.shape[-1])
    azimuth, polar, rotation, confidence = logits.split((AZIMUTHS, POLARS, bins, CONFIDENCES), dim=-1)
    return Angles(
        azimuth=azimuth.argmax(-1).float(),
        polar=polar.argmax(-1).float() - POLARS // 2,
        rotation=rotation.argmax(-1).float() - bins // 2,
        confidence=confidence.softmax(-1)[..., 0],
    )


def _fold_head(state: Mapping[str, Tensor], epsilon: float = 1e-5) -> dict[str, Tensor]:
    """The published head's weights as those of OrientationHead, fp32; `epsilon` is BatchNorm's, torch's default."""
    folded = {}
    for name in ("net1", "net2"):
        weight, bias, scale, shift, mean, variance = (
            state[f"{HEAD}{name}.{key}"].double()
            for key in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")
        )
        factor = scale / (variance + epsilon).sqrt()
        folded[f"head.{name}.weight"] = (weight * factor[:, None]).float()
        folded[f"head.{name}.bias"] = ((bias - mean) * factor + shift).float()
    return folded


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """(1, 1 + n * n, width) position embeddings to (1, 1 + side * side, width), as DINOv2 in transformers does it."""
    # The authors' transformers, 4.38, samples at 37 / 16.1 instead of 37 / 16, less than a quarter of a patch apart.
    grid = rearrange(positions[:, 1:], "1 (h w) c -> 1 c h w", h=round((positions.shape[1] - 1) ** 0.5))
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :1], rearrange(grid, "1 c h w -> 1 (h w) c")), dim=1)
