"""What a picture must be, and the one error for a picture that is not."""

SMALLEST = 28  # px a side: one token of Qwen2.5-VL's vision tower (14 px patches, merged 2 x 2)
SLIMMEST = 200  # longest side / shortest side; what the MLLMs' own preprocessing accepts at most


class ImageError(ValueError):
    """A picture that cannot be read or used, and what to do about it."""
