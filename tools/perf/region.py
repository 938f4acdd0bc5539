"""What regions cost: one step of a model call's attention with them, beside none and beside a dense mask.

    nox -s bench -- region [--tokens 1024] [--repeats 5]

FLUX's attention (24 heads of 128) on this machine's device over 512 context tokens, a square picture of `tokens` and
two references of the same size, each read by one half of the picture; all forms in one run, medians. "Soft" has a seam
a quarter of the picture wide between the halves. Last line: one JSON object.
"""

import argparse
import json
from math import isqrt

from ._measure import device_name, start, time_rounds


def main(argv: list[str]) -> None:
    """Measures the forms and prints one JSON object. `argv`: the command line without the benchmark's name."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- region", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024, help="of the picture (4096 = 1024 px), a square number")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)

    device = start()
    import torch

    from ...loaders.host import exact_attention
    from ...sampling.attention import KeyStrengthAttention, Regions

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    plain = exact_attention()
    heads, width, context, side = 24, 128, 512, isqrt(options.tokens)
    tokens = side * side
    keys = context + 3 * tokens
    image, *references = (slice(start, start + tokens) for start in range(context, keys, tokens))
    q, k, v = (torch.randn(1, heads, keys, width, device=device, dtype=dtype) for _ in range(3))
    across = (torch.arange(side) + 0.5) / side

    def region(seam: float) -> tuple[KeyStrengthAttention, torch.Tensor]:
        """Our override, and the dense mask of the same; seam: width of the soft edge, in shares of the picture."""
        left = (0.5 + (0.5 - across) / max(seam, 1e-9)).clamp(0, 1).repeat(side, 1).flatten()
        weights = torch.stack((left, 1 - left))[None].log()
        mask = torch.zeros(keys, keys)
        for span, weight in zip(references, weights[0]):
            mask[image, span] = weight[:, None]
        override = KeyStrengthAttention(torch.zeros(1, keys), 1, device, regions=Regions(image, references, weights))
        return override, mask.to(device, dtype)[None, None]

    (hard, hard_mask), (soft, soft_mask) = region(0), region(0.25)
    forms = {
        "plain": lambda: plain(q, k, v, heads, skip_reshape=True),
        "hard": lambda: hard(plain, q, k, v, heads, skip_reshape=True),
        "soft": lambda: soft(plain, q, k, v, heads, skip_reshape=True),
        "dense_mask": lambda: plain(q, k, v, heads, mask=soft_mask, skip_reshape=True),
    }
    timed = time_rounds(forms, options.repeats, device)
    with_hard = plain(q, k, v, heads, mask=hard_mask, skip_reshape=True)
    result = {
        "benchmark": "region",
        "device": device_name(device),
        "dtype": str(dtype),
        "tokens": tokens,
        "keys": keys,
        "plain_seconds": round(timed.median("plain"), 4),
        **{f"{name}_ratio": timed.ratio(name, "plain", 3) for name in forms if name != "plain"},
        "hard_difference": float((forms["hard"]() - with_hard).abs().max()),
        "soft_difference": float((forms["soft"]() - forms["dense_mask"]()).abs().max()),
        **{
            f"{name}_peak_ratio": round(timed.peak[name] / timed.peak["plain"], 3)
            for name in timed.peak
            if name != "plain"
        },
    }
    print(json.dumps(result))
