"""What a picture must be, and the one error for a picture that is not."""

from torch import Tensor

SMALLEST = 28  # px a side: one token of Qwen2.5-VL's vision tower (14 px patches, merged 2 x 2)
SLIMMEST = 200  # longest side / shortest side; what the MLLMs' own preprocessing accepts at most


class ImageError(ValueError):
    """A picture that cannot be read or used, and what to do about it."""


def check_values(image: Tensor, where: str) -> None:
    """Raises ImageError for a picture whose values are NaN, infinite, or far outside 0..1; `where`: its name."""
    if not bool(image.isfinite().all()):
        wrong = int((~image.isfinite()).sum())
        raise ImageError(
            f"{where} holds values that are NaN or infinite ({wrong} of {image.numel()}), expected 0 to 1. The node"
            " that made it has failed (often a VAE decode in fp16: decode in fp32 or bf16)."
        )
    low, high = float(image.min()), float(image.max())
    if low < -1 or high > 2:  # room for the overshoot of a decode or an upscaler
        raise ImageError(f"{where} has values from {low:.3g} to {high:.3g}, expected 0 to 1. Divide by 255 first?")
