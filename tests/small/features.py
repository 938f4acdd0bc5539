"""Random features with given modalities."""

import torch

from ...dla import Features, Modality


def random_features(modality, info, layers=None, mask=None, dtype=torch.float32, scale=1.0, **more) -> Features:
    """modality: (B, T) rows of Modality; all layers and tokens by default; scale: of channel 3."""
    modality = torch.as_tensor(modality, dtype=torch.uint8)
    layers = tuple(range(info.layers + 1)) if layers is None else layers
    shape = (len(modality), len(layers), modality.shape[1], info.width)
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    hidden[..., 3] *= scale
    index = torch.where(modality == Modality.IMAGE, 0, -1).to(torch.int16)
    mask = torch.as_tensor(mask if mask is not None else torch.ones_like(modality)).bool()
    return Features(hidden.to(dtype), layers, modality, index, mask, info, **more)
