"""Orient Anything V1 under ComfyUI's model management: small, base and large, with 180 or 360 rotation bins, all told
by the shapes in the file. The backbone is the host's DINOv2.

V2 is not read: see web/docs/SubjectLoadOrientation.md for why.
"""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.image_encoders.dino2 import Dinov2Model
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...common.files import save_tensors
from ...dla.checkpoint import STARTS
from ...evaluation.orientation import (
    SIDE,
    Angles,
    OrientationHead,
    decode,
    fold_head,
    head_shapes,
    prepare,
    rotation_bins,
    without_subject,
)
from .. import folders

SIZES = {384: ("small", 12), 768: ("base", 12), 1024: ("large", 24)}  # DINOv2 by width: name, layers
HEAD_WIDTH, PATCH = 64, 14
GRID = SIDE // PATCH  # 16 patches a side
BACKBONE, HEAD = "dinov2.", "down_sampler."
POSITIONS = BACKBONE + "embeddings.position_embeddings"
UNREAD = ("num_batches_tracked", "mask_token")  # training's; may be missing
CHUNK = 16  # pictures at a time
SOURCE = "Orient Anything V1, https://github.com/SpatialVision/Orient-Anything, CC BY 4.0"


class OrientationCheckpointError(ValueError):
    """A file that is no usable Orient Anything V1. The text names file, key, what was found, what was expected, and the
    way out."""

    def __init__(self, path: str | Path, problem: str):
        super().__init__(f"Orientation file '{Path(path).name}': {problem}")


class OrientationModel:
    """The ORIENTATION_MODEL socket: Orient Anything V1 that the host loads and offloads. It computes in fp32, as
    published, since an angle is the highest of hundreds of logits.

    name: its file. size: "small", "base" or "large". rotation_bins: 180 or 360. patcher: the host's ModelPatcher.
    """

    def __init__(self, state: Mapping[str, Tensor], name: str = ""):
        """`state` holds checked weights under the published keys (see read_state)."""
        self.name = name
        out, width = state[HEAD + "net1.0.weight"].shape
        self.size, layers = SIZES[width]
        self.rotation_bins = rotation_bins(out)
        self.load_device = comfy.model_management.get_torch_device()
        offload_device = comfy.model_management.unet_offload_device()
        network = OrientationNetwork(
            width, layers, out, device=offload_device, dtype=torch.float32, operations=comfy.ops.manual_cast
        )
        patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
        self.patcher = patcher(network, load_device=self.load_device, offload_device=offload_device)
        dynamic = getattr(self.patcher, "is_dynamic", lambda: False)()  # such leaves have no weights to copy into
        network.load_state_dict(inference_state(state), assign=dynamic)
        network.eval().requires_grad_(False)

    def logits(self, pixels: Tensor) -> Tensor:
        """(N, 3, 224, 224) of `prepare` to (N, out) fp32 on the CPU."""
        width = self.patcher.model.head.net1.in_features
        memory = min(len(pixels), CHUNK) * (GRID**2 + 1) * width * 4 * 16  # the MLP is four wide; a few copies
        comfy.model_management.load_models_gpu([self.patcher], memory_required=memory)
        with torch.inference_mode():
            parts = [self.patcher.model(part.to(self.load_device)).float().cpu() for part in pixels.split(CHUNK)]
        return torch.cat(parts)

    def estimate(self, images: list[Tensor], masks: list[Tensor | None] | None = None) -> Angles:
        """Orientations of the subjects of N pictures, each (H, W, 3) in 0..1; on the CPU.

        masks: one per picture, (h, w) of any size, 1 = subject; None: the whole picture. Where some masks are empty,
        because a subject was not found, the whole picture is read and the confidence is 0, so that reports leave it
        out and count it. Raises ValueError for no picture, for other than N masks, and if all masks are empty.
        """
        if not images:
            raise ValueError("No picture to read an orientation from, expected at least one. Connect an IMAGE.")
        masks = [None] * len(images) if masks is None else list(masks)
        if len(masks) != len(images):
            raise ValueError(f"{len(masks)} masks for {len(images)} pictures, expected one mask per picture.")
        empty = without_subject(images, masks)
        if len(empty) == len(images):
            prepare(images[0], masks[0])  # raises, and says what is wrong with it
        masks = [None if number in empty else mask for number, mask in enumerate(masks)]
        angles = decode(self.logits(torch.stack([prepare(*pair).cpu() for pair in zip(images, masks)])))
        kept = torch.tensor([float(number not in empty) for number in range(len(images))])
        return replace(angles, confidence=angles.confidence * kept)


class OrientationNetwork(nn.Module):
    """(B, 3, 224, 224) to (B, out) logits: DINOv2's CLS token, then the head."""

    def __init__(self, width: int, layers: int, out: int, *, device=None, dtype=None, operations=nn):
        super().__init__()
        self.backbone = _backbone(width, layers, device, dtype, operations)
        positions = torch.empty(1, GRID**2 + 1, width, device=device, dtype=dtype)  # the host never interpolates them
        self.backbone.embeddings.position_embeddings = nn.Parameter(positions)
        self.head = OrientationHead(width, out, device=device, dtype=dtype, operations=operations)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.backbone(pixels)[2])


def list_orientations() -> list[str]:
    """Names of the files under models/orientation."""
    return folders.files("orientation")


def load_orientation(name: str, save_copy: bool = False) -> OrientationModel:
    """The model in that file under models/orientation. `save_copy`: of a .pt, write a .safetensors beside it, unless
    there is one. Raises ValueError if the file is not there or no usable Orient Anything V1."""
    path = folders.find("orientation", name)
    state = read_state(path)
    model = OrientationModel(state, name)
    copy = path.with_suffix(".safetensors")
    if save_copy and not copy.exists():
        try:
            save_tensors(copy, state, {"source": SOURCE, "converted_from": path.name})
            logging.info("Load Orientation: wrote %s", copy)
        except OSError as error:  # the model is there all the same
            logging.warning("Load Orientation: could not write %s (%s)", copy, error)
    return model


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pt or .safetensors under their published keys, on the CPU. All keys, shapes, dtypes and values
    are checked; pickled code is refused, never run. Raises OrientationCheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise OrientationCheckpointError(path, "is not there or is a folder, expected one .pt or .safetensors file.")
    if path.stat().st_size == 0:
        raise OrientationCheckpointError(path, "is empty (0 bytes). Download it again.")
    pickled = path.suffix.lower() == ".pt"
    with open(path, "rb") as file:
        start = file.read(64)
    if pickled or start[8:9] != b"{":  # where a .safetensors begins after its length, whose bytes can be any
        for magic, what in STARTS:
            own = pickled and magic in (b"PK\x03\x04", b"\x80\x02")  # torch writes these: zip, and pickle before 1.6
            if start.lstrip().startswith(magic) and not own:
                kind = ".pt" if pickled else ".safetensors"
                raise OrientationCheckpointError(path, f"is {what}, expected a {kind} file. Download it again.")
    state = _read_pickle(path) if pickled else _read_safetensors(path)
    for key, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            count = int((~value.isfinite()).sum())
            raise OrientationCheckpointError(
                path, f"{key} has {count} of {value.numel()} values that are NaN or infinite. Download it again."
            )
    return state


def inference_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published keys to those of OrientationNetwork, fp32: positions for 224 px, the head's norms folded in."""
    backbone = {key.removeprefix(BACKBONE): value.float() for key, value in state.items() if key.startswith(BACKBONE)}
    backbone["embeddings.position_embeddings"] = bake_positions(state[POSITIONS].float())
    width = backbone["layernorm.weight"].numel()
    backbone.setdefault("embeddings.mask_token", torch.zeros(1, width))
    head = fold_head({key.removeprefix(HEAD): value for key, value in state.items() if key.startswith(HEAD)})
    return {"backbone." + key: value for key, value in backbone.items()} | {"head." + k: v for k, v in head.items()}


def bake_positions(positions: Tensor) -> Tensor:
    """(1, 1 + n * n, width) position embeddings to (1, 257, width) as DINOv2 in transformers has them at 224 px.

    The authors' transformers, 4.38, samples at 37 / 16.1 instead of 37 / 16, less than a quarter of a patch apart.
    """
    cls, patches = positions[:, :1], positions[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    grid = rearrange(patches, "1 (h w) c -> 1 c h w", h=side)
    grid = nn.functional.interpolate(grid, size=(GRID, GRID), mode="bicubic", align_corners=False)
    return torch.cat((cls, rearrange(grid, "1 c h w -> 1 (h w) c")), dim=1)


def _backbone(width: int, layers: int, device, dtype, operations) -> Dinov2Model:
    config = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": width // HEAD_WIDTH,
        "layer_norm_eps": 1e-6,
        "use_swiglu_ffn": False,
    }
    return Dinov2Model(config, dtype, device, operations)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise OrientationCheckpointError(
            path,
            "holds more than tensors, expected a state dict; code in a file is never run "
            f"({str(error).splitlines()[0]:.160}). Download the published file, or save its tensors alone.",
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise OrientationCheckpointError(path, f"cannot be read ({text:.160}). Download it again.") from None
    if not isinstance(state, Mapping) or not state:
        raise OrientationCheckpointError(
            path, f"holds {type(state).__name__}, expected a state dict of tensors. Download it again."
        )
    strange = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if strange:
        key, value = strange[0], state[strange[0]]
        raise OrientationCheckpointError(
            path,
            f"holds {type(value).__name__} under {key!r}, expected tensors alone. "
            "Save the state dict itself, not a training checkpoint around it.",
        )
    _check_keys(path, {key: (tuple(value.shape), value.dtype.is_floating_point) for key, value in state.items()})
    return {key: value.clone().contiguous() for key, value in state.items()}  # tensors of a .pt may share memory


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            found = {
                key: (tuple(part.get_shape()), part.get_dtype() in ("F64", "F32", "F16", "BF16"))
                for key, part in slices.items()
            }
            _check_keys(path, found)
            return {key: file.get_tensor(key) for key in slices}
    except SafetensorError as error:
        raise OrientationCheckpointError(path, f"cannot be read ({error}). Download it again.") from None


def _check_keys(path: Path, found: Mapping[str, tuple[tuple[int, ...], bool]]) -> None:
    """Raises unless keys, shapes and dtypes (shape, whether floating) are those of one of the published layouts."""
    cls, first = BACKBONE + "embeddings.cls_token", HEAD + "net1.0.weight"
    if cls not in found or first not in found or len(found[first][0]) != 2:
        raise OrientationCheckpointError(path, f"is no Orient Anything V1: {_what_is_it(found)}")
    width, out = found[cls][0][-1], found[first][0][0]
    if width not in SIZES:
        known = ", ".join(f"{width} ({name})" for width, (name, _) in SIZES.items())
        raise OrientationCheckpointError(
            path, f"{cls} is {width} wide, expected {known}. Take one of the published files."
        )
    try:
        rotation_bins(out)
    except ValueError as error:
        raise OrientationCheckpointError(path, f"{first}: {error} Take one of the published files.") from None
    size, layers = SIZES[width]
    backbone = _backbone(width, layers, "meta", None, nn).state_dict()
    expected = {BACKBONE + key: tuple(value.shape) for key, value in backbone.items()}
    expected |= {HEAD + key: shape for key, shape in head_shapes(width, out).items()}
    missing = [key for key in expected if key not in found and not key.endswith(UNREAD)]
    extra = [key for key in found if key not in expected]
    what = f"Orient Anything V1 {size} ({layers} layers)"
    if missing:
        also = f" It has {extra[0]!r} instead: it was written by other code." if extra else ""
        raise OrientationCheckpointError(
            path, f"{len(missing)} key(s) of {what} are missing, such as {missing[0]!r}.{also} Download it again."
        )
    if extra:
        raise OrientationCheckpointError(
            path, f"{len(extra)} key(s) do not belong to {what}, such as {extra[0]!r}. Download it again."
        )
    for key, (shape, floating) in found.items():
        if shape != expected[key]:
            raise OrientationCheckpointError(
                path,
                f"{key} has shape {list(shape)}, expected {list(expected[key])} for {what}. Download it again.",
            )
        if not floating and not key.endswith(UNREAD):
            raise OrientationCheckpointError(path, f"{key} does not hold floating-point numbers. Download it again.")


def _what_is_it(keys: Mapping) -> str:
    """A guess at what a file without Orient Anything's keys is, and what to do."""
    if any(key.startswith("vggt.") for key in keys):
        return "it is Orient Anything V2, another network. Take a V1 file, small, base or large."
    if any("lora" in key.lower() for key in keys):
        return "it looks like a LoRA. Put it into models/loras."
    if any(key.startswith("encoder.layer.") or key.startswith("blocks.") for key in keys):
        return "it looks like DINOv2 alone, without the head. Take Orient Anything's own file."
    for prefix in ("module.", "model.", "state_dict."):
        if any(key.startswith(prefix + BACKBONE) for key in keys):
            return f"its keys begin with {prefix!r}, since it was saved from inside another module. Take that off."
    return f"its first key is {next(iter(keys), None)!r}, expected keys under {BACKBONE!r} and {HEAD!r}."
