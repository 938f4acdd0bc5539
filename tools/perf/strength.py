"""What a strength between 0 and 1 costs: our channels form and an attention mask, beside plain attention.

    nox -s bench -- strength [--tokens 2304] [--repeats 5]

FLUX's attention (24 heads of 128) on this machine's device, all forms in one run, medians. Last line: one JSON object.
"""

import argparse
import json

from ._measure import device_name, start, time_rounds


def main(argv: list[str]) -> None:
    """Measures the three forms and prints one JSON object. `argv`: the command line without the benchmark's name."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- strength", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--tokens", type=int, default=2304, help="keys and queries (4608 = 1024 px with 512 context tokens)"
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)

    device = start()
    import torch
    from comfy.ldm.modules.attention import optimized_attention, optimized_attention_masked

    from ...sampling.attention import attention_with_key_bias

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads, width = 24, 128
    q, k, v = (torch.randn(1, heads, options.tokens, width, device=device, dtype=dtype) for _ in range(3))
    bias = torch.zeros(1, options.tokens, device=device)
    bias[:, : options.tokens // 8] = -0.7
    mask = bias.to(dtype)[:, None, None].expand(1, 1, options.tokens, options.tokens)
    forms = {
        "plain": lambda: optimized_attention(q, k, v, heads, skip_reshape=True),
        "channels": lambda: attention_with_key_bias(optimized_attention, q, k, v, heads, bias),
        "mask": lambda: optimized_attention_masked(q, k, v, heads, mask=mask, skip_reshape=True),
    }
    timed = time_rounds(forms, options.repeats, device)
    result = {
        "benchmark": "strength",
        "device": device_name(device),
        "dtype": str(dtype),
        "tokens": options.tokens,
        "plain_seconds": round(timed.median("plain"), 4),
        "channels_ratio": timed.ratio("channels", "plain", 3),
        "mask_ratio": timed.ratio("mask", "plain", 3),
        "max_difference": float((forms["channels"]() - forms["mask"]()).abs().max()),
    }
    result |= {
        f"{name}_peak_ratio": round(timed.peak[name] / timed.peak["plain"], 3) for name in timed.peak if name != "plain"
    }
    print(json.dumps(result))
