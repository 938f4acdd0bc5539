"""What a new prompt costs for references that were encoded before: MLLM and VAE.

    nox -s bench -- encode [--full] [--repeats 5]

One reference of 1024 px. By default a Qwen2.5-VL of a quarter of the 7B's widths and depths, vision tower and decoder
alike, in fp32; with `--full` InternVL3-8B and Qwen3-VL-4B at full size, bf16, random weights. `reencode` is a new
prompt over the first encoding, `over_one_pass` over a whole pass with nothing kept; with several models, the worst.
`vae_encodes` counts the VAE's encodes for the second prompt on one reference. Last line: one JSON object.
"""

import argparse
import json
import tempfile
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ._measure import device_name, operations, start, time_rounds

FULL = {"InternVL3-8B": {"image_size": 448, "tiles": 4}, "Qwen3-VL-4B": {"image_size": 1024}}
SMALL = {"Qwen2.5-VL / 4": {"image_size": 1024}}
PROMPT = "the same person, number {}, reads a newspaper on a bench in an autumn park, golden evening light, film grain"


def main(argv: list[str]) -> None:
    """Measures and prints one JSON object. `argv`: the command line without the benchmark's name."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- encode", description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="models at full size, on an accelerator")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    device = start(options.full)

    from ._models import random_mllm

    models: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in (FULL if options.full else SMALL).items():
            mllm = random_mllm(name, Path(folder, name.replace("/", "of")))
            models[name] = _measure(mllm, settings, options.repeats, device)
            del mllm
    result = {
        "benchmark": "encode",
        "device": device_name(device),
        "full": options.full,
        "reencode": max(model["reencode"] for model in models.values()),
        "over_one_pass": max(model["over_one_pass"] for model in models.values()),
        "vae_encodes": float(_vae_encodes()),
        "models": models,
    }
    print(json.dumps(result))


def _measure(mllm: Any, settings: dict[str, int], repeats: int, device: Any) -> dict[str, Any]:
    """Times and counts of one MLLM."""
    import torch

    from ...loaders.encode_cache import MLLM_STATES

    image, numbers = torch.rand(1024, 1024, 3, generator=torch.Generator().manual_seed(0)), count()

    def encode(prompt: str = "") -> Any:
        return mllm.encode(prompt or PROMPT.format(next(numbers)), [image], **settings)

    def first() -> Any:
        MLLM_STATES.clear()
        return encode()

    def one_pass() -> Any:
        MLLM_STATES.clear()
        with patch.object(mllm, "_prefix_end", lambda *_: 0):
            return encode()

    first()
    kept = encode("a fox").hidden_states
    MLLM_STATES.clear()
    features = encode("a fox")
    equal = torch.equal(features.hidden_states, kept)
    if not equal:
        raise SystemExit("Features differ from those of a first encoding.")
    del kept, features
    # forms take turns forwards and backwards: what "again" finds is what "first" or "again" left
    timed = time_rounds({"one_pass": one_pass, "first": first, "again": encode}, repeats, device)
    features = encode()
    prefix = int((features.image_index[0] >= 0).nonzero().max()) + 1
    return {
        "reencode": timed.ratio("again", "first"),
        "over_one_pass": timed.ratio("again", "one_pass"),
        "first_over_one_pass": timed.ratio("first", "one_pass"),
        "seconds": {form: round(timed.median(form), 4) for form in timed.seconds},
        "equal": equal,
        "layers": len(features.layers),
        "prefix_tokens": prefix,
        "suffix_tokens": features.hidden_states.shape[2] - prefix,
        "bytes_kept": MLLM_STATES.bytes,
        "operations": {"first": operations(first), "again": operations(encode)},
    }


def _vae_encodes() -> int:
    """Encodes of FLUX's VAE for a second prompt on one reference, through Add Identity's call."""
    import torch

    from ...loaders.reference_latents import add_identity
    from ...tests.small import dit
    from ._models import random_vae

    model, vae, image, calls = dit.tiny("flux"), random_vae("flux"), torch.rand(1, 256, 256, 3), []
    encode = vae.first_stage_model.encode
    vae.first_stage_model.encode = lambda *args, **kwargs: calls.append(1) or encode(*args, **kwargs)
    for tokens in (torch.zeros(1, 4, 24), torch.ones(1, 6, 24)):
        before = len(calls)
        add_identity([[tokens, {}]], model, vae, image)
    return len(calls) - before
