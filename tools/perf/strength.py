"""What a strength between 0 and 1 costs: the forms of `sampling/key_bias.py` beside plain attention.

    nox -s bench -- strength [--tokens 2304] [--repeats 5]

FLUX's attention (24 heads of 128) on this machine's device, all forms in one run, medians. Last line: one JSON object.
"""

import argparse
import json
from functools import partial

from ._measure import device_name, start, time_rounds


def main(argv: list[str]) -> None:
    """Measures the forms and prints one JSON object. `argv`: the command line without the benchmark's name."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- strength", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--tokens", type=int, default=2304, help="keys and queries (4608 = 1024 px with 512 context tokens)"
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)

    device = start()
    import torch

    from ...loaders.host import exact_attention
    from ...sampling.key_bias import attention_with_key_bias, runs_of

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads, width = 24, 128
    q, k, v = (torch.randn(1, heads, options.tokens, width, device=device, dtype=dtype) for _ in range(3))
    rows = torch.zeros(1, options.tokens)
    rows[:, : options.tokens // 8] = -0.7
    plain, runs = exact_attention(), runs_of(rows)
    # a kernel takes masks in the queries' dtype
    biases = {"channels": rows.to(device), "mask": rows.to(device, dtype)}

    def biased(form: str | None) -> torch.Tensor:
        bias = biases.get(form, biases["channels"])
        return attention_with_key_bias(plain, q, k, v, heads, bias, runs=runs, form=form)

    forms = {"plain": lambda: plain(q, k, v, heads, skip_reshape=True)}
    forms |= {name: partial(biased, name) for name in ("parts", "mask", "channels")} | {"chosen": partial(biased, None)}
    if device.type == "cuda":  # what the runs' kernel takes where PyTorch chooses another one for plain attention
        forms["flash"] = lambda: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    timed = time_rounds(forms, options.repeats, device)
    result = {
        "benchmark": "strength",
        "device": device_name(device),
        "dtype": str(dtype),
        "tokens": options.tokens,
        "plain_backend": torch._fused_sdp_choice(q, k, v),  # 1 flash, 2 memory efficient, 3 cuDNN
        "plain_seconds": round(timed.median("plain"), 4),
        **{f"{name}_ratio": timed.ratio(name, "plain", 3) for name in forms if name != "plain"},
        "max_difference": max(float((forms["channels"]() - forms[name]()).abs().max()) for name in ("parts", "mask")),
    }
    result |= {
        f"{name}_peak_ratio": round(timed.peak[name] / timed.peak["plain"], 3) for name in timed.peak if name != "plain"
    }
    print(json.dumps(result))
