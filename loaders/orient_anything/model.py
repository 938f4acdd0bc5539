"""Orient Anything V1 under ComfyUI's model management."""

import logging
from collections.abc import Mapping
from dataclasses import replace

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor

from ...common.files import save_tensors
from ...common.masks import empty_masks
from .. import folders
from ..host import make_patcher
from ..preprocessing import preprocess_subject
from .checkpoint import read_state
from .network import GRID, HEAD, SIZES, Angles, OrientationNetwork, decode, inference_state, rotation_bins

CHUNK = 16  # pictures at a time
SOURCE = "Orient Anything V1, https://github.com/SpatialVision/Orient-Anything, CC BY 4.0"


class OrientationModel:
    """The ORIENTATION_MODEL socket: Orient Anything V1 that the host loads and offloads.

    It computes in fp32, as published, since an angle is the highest of hundreds of logits. name: its file. size:
    "small", "base" or "large". rotation_bins: 180 or 360. patcher: the host's ModelPatcher.
    """

    def __init__(self, state: Mapping[str, Tensor], name: str = ""):
        """`state` holds checked weights under the published keys (see checkpoint.read_state)."""
        self.name = name
        out, width = state[HEAD + "net1.0.weight"].shape
        self.size, layers = SIZES[width]
        self.rotation_bins = rotation_bins(out)
        self.load_device = comfy.model_management.get_torch_device()
        offload_device = comfy.model_management.unet_offload_device()
        settings = dict(device=offload_device, dtype=torch.float32, operations=comfy.ops.manual_cast)
        network = OrientationNetwork(width, layers, out, **settings)
        self.patcher = make_patcher(network, self.load_device, offload_device, inference_state(state))

    def logits(self, pixels: Tensor) -> Tensor:
        """(N, 3, 224, 224) of `preprocess_subject` to (N, out) fp32 on the CPU."""
        width = self.patcher.model.head.net1.in_features
        memory = min(len(pixels), CHUNK) * (GRID**2 + 1) * width * 4 * 16  # the MLP is four wide; a few copies
        comfy.model_management.load_models_gpu([self.patcher], memory_required=memory)
        with torch.inference_mode():
            parts = [self.patcher.model(part.to(self.load_device)).float().cpu() for part in pixels.split(CHUNK)]
        return torch.cat(parts)

    def estimate(self, images: list[Tensor], masks: list[Tensor | None] | None = None) -> Angles:
        """Angles in degrees, on the CPU, of the subjects of N pictures (H, W, 3) in 0..1.

        Each may have a mask, (h, w) of any size, 1 = subject. Where some masks are empty, because a subject was not
        found, the whole picture is read and the confidence is 0, so that reports leave it out and count it.

        Raises ValueError for no picture, other than N masks, or where all masks are empty.
        """
        if not images:
            raise ValueError("No picture to read an orientation from, expected at least one. Connect an IMAGE.")
        masks = [None] * len(images) if masks is None else list(masks)
        if len(masks) != len(images):
            raise ValueError(f"{len(masks)} masks for {len(images)} pictures, expected one mask per picture.")
        empty = empty_masks(images, masks)
        if len(empty) == len(images):
            preprocess_subject(images[0], masks[0])  # raises, and says what is wrong with it
        masks = [None if number in empty else mask for number, mask in enumerate(masks)]
        pixels = torch.stack([preprocess_subject(*pair).cpu() for pair in zip(images, masks)])
        angles = decode(self.logits(pixels))
        found = torch.tensor([float(number not in empty) for number in range(len(images))])
        return replace(angles, confidence=angles.confidence * found)


def load_orientation(name: str, save_copy: bool = False) -> OrientationModel:
    """The model in that file under models/orientation.

    save_copy: of a .pt, write a .safetensors beside it, unless there is one. Raises ValueError if the file is not there
    or is no usable Orient Anything V1.
    """
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
