"""What the DLA costs at InternVL3-8B's size, beside its plain form: all layers, and UniFusion's every third.

    nox -s bench -- dla [--full] [--text 32] [--image 32] [--heads 28] [--rounds 3]

The plain form stacks all layers, and pools text and image tokens apart: `nn.MultiheadAttention` over the layer axis, a
linear score, softmax, weighted sum. *same* is what ours computes (with a norm and a residual) written as plainly; ours
has its weights, and `difference` is between these two. Width, layers and heads are full size everywhere; `--full` runs
2,048 image and 1,500 text tokens in bf16. `dla_memory` is the peak beyond inputs and outputs over the input; with fewer
tokens in chunks of as large a share of the input as at full size. `launches` counts the operations that an accelerator
would run at full size, where each norm counts as seven (newer PyTorch has one for it). Last line: one JSON object.
"""

import argparse
import json
from typing import Any

from ._measure import cpu_peak, device_name, start, time_rounds

LAYERS, WIDTH, CONTEXT = 28, 3584, 4096  # InternVL3-8B, FLUX.1-dev
FULL = {"text": 1500, "image": 2048}


def main(argv: list[str]) -> None:
    """Measures the forms and prints one JSON object. `argv`: the command line without the benchmark's name."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- dla", description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="2,048 image and 1,500 text tokens; needs an accelerator")
    parser.add_argument("--text", type=int, default=32, help="tokens")
    parser.add_argument("--image", type=int, default=32, help="tokens")
    parser.add_argument("--heads", type=int, default=28, help="over the layers; 28 = one for every 128 channels")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)

    device = start(options.full, host=False)
    import torch

    from ...dla import DLAConfig, DualLayerAggregator, Features, MLLMInfo
    from ...dla.pooling import HEAD_SCORED_CHUNK_BYTES

    torch.manual_seed(0)
    tokens = FULL if options.full else {"text": options.text, "image": options.image}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    info = MLLMInfo("InternVL3-8B", "internvl", LAYERS, WIDTH)
    modality = torch.tensor([[0] * tokens["text"] + [1] * tokens["image"]], dtype=torch.uint8)
    hidden = torch.randn(1, LAYERS + 1, modality.shape[1], WIDTH, device=device, dtype=dtype)

    def with_states(hidden: Any, modality: Any) -> Any:
        mask, index = torch.ones_like(modality).bool(), (modality == 1).short() - 1
        return Features(hidden, tuple(range(LAYERS + 1)), modality, index, mask, info)

    features = with_states(hidden, modality)

    def make(
        scores: str = "heads", subset: tuple[int, ...] | None = None, on: Any = device, dtype: torch.dtype = dtype
    ) -> Any:
        config = DLAConfig(info, CONTEXT, heads=options.heads, scores=scores, layer_subset=subset)
        return DualLayerAggregator(config, device=on, dtype=dtype).eval()

    third = tuple(range(0, LAYERS + 1, 3))
    with torch.inference_mode():
        ours, subset = make(), make(subset=third)
        plain = _plain_form(ours, features, normed=False)
        same = _plain_form(ours, features, normed=True)
        subset.load_state_dict(ours.state_dict())
        forms = {"plain": plain, "ours": lambda: ours(features), "subset": lambda: subset(features)}
        if options.full:
            earlier = make("states")
            forms |= {"same": same, "scores from states": lambda: earlier(features)}
        timed = time_rounds(forms, options.rounds, device)
        expected, found = same().float(), ours(features).float()
        torch.backends.mha.set_fastpath_enabled(False)  # which is not counted
        share = HEAD_SCORED_CHUNK_BYTES / (sum(FULL.values()) * (LAYERS + 1) * WIDTH * 2)  # of the input at full size
        chunk = HEAD_SCORED_CHUNK_BYTES if options.full else int(hidden.nbytes * share)
        counted = {"plain": plain, "ours": lambda: ours(features, max_chunk_bytes=chunk)}
        counts = {name: _count(form, device) for name, form in counted.items()}
    full = torch.tensor([[0] * FULL["text"] + [1] * FULL["image"]], dtype=torch.uint8)
    states = torch.empty(1, LAYERS + 1, full.shape[1], WIDTH, device="meta", dtype=torch.bfloat16)
    launches = {
        name: _launches(make(subset=layers, on="meta", dtype=torch.bfloat16), with_states(states, full))
        for name, layers in {"ours": None, "subset": third}.items()
    }
    output = found.numel() * dtype.itemsize
    result = {
        "benchmark": "dla",
        "device": device_name(device),
        "dtype": str(dtype),
        "heads": options.heads,
        "tokens": tokens,
        "dla_time": timed.ratio("ours", "plain"),
        "dla_time_quartiles": timed.spread("ours", "plain"),
        "dla_subset_time": timed.ratio("subset", "plain"),
        "dla_memory": round((counts["ours"][1] - output) / hidden.nbytes, 4),
        "plain_memory": round((counts["plain"][1] - output) / hidden.nbytes, 4),
        "seconds": {name: round(timed.median(name), 4) for name in forms},
        "ratios": {name: timed.ratio(name, "plain") for name in forms},
        "tera_operations": {name: round(flops / 1e12, 3) for name, (flops, _) in counts.items()},
        "launches": launches,
        "input_bytes": hidden.nbytes,
        "difference": float((found - expected).norm() / expected.norm()),
    }
    print(json.dumps(result))


def _plain_form(dla: Any, features: Any, normed: bool) -> Any:
    """The DLA as plainly as possible; with `normed` its poolings get a norm, a residual and the DLA's weights."""
    import torch
    from einops import rearrange
    from torch import nn

    from ...dla.pooling import rms_norm

    heads, project, modules = dla.config.heads, dla.project, []
    for pooling in dla.pooling.values():
        weight = pooling.qk.weight
        attention = nn.MultiheadAttention(WIDTH, heads, batch_first=True, device=weight.device, dtype=weight.dtype)
        score = nn.Linear(WIDTH, 1, bias=False, device=weight.device, dtype=weight.dtype)
        modules.append((attention.eval(), score))
        if not normed:
            continue
        nn.init.ones_(pooling.gate.weight)
        nn.init.normal_(pooling.out.weight, std=WIDTH**-0.5)
        nn.init.normal_(score.weight, std=WIDTH**-0.5)
        of_qkv = [rearrange(p, "(h two d) ... -> (two h d) ...", h=heads, two=2) for p in pooling.qk.parameters()]
        attention.in_proj_weight.copy_(torch.cat([of_qkv[0], pooling.value.weight]))
        attention.in_proj_bias.copy_(torch.cat([of_qkv[1], pooling.value.bias]))
        attention.out_proj.load_state_dict(pooling.out.state_dict())
        of_heads = (score.weight[0].float() @ pooling.out.weight.float()).view(heads, 1, -1)
        of_heads = of_heads @ pooling.value.weight.float().view(heads, -1, WIDTH)
        pooling.score.weight.copy_(torch.cat([score.weight, of_heads[:, 0].to(weight.dtype)]))

    layers = features.hidden_states.unbind(1)
    indices = [(features.modality[0] == kind).nonzero()[:, 0].to(layers[0].device) for kind in (0, 1)]

    def run() -> torch.Tensor:
        states = torch.stack(layers, dim=2)[0]
        out = torch.empty_like(layers[0])
        for index, (attention, score) in zip(indices, modules):
            x = states[index]
            read = rms_norm(x).to(x.dtype) if normed else x
            mixed = attention(read, read, read, need_weights=False)[0]
            scores = score(read + mixed if normed else mixed)
            mixed = x.float() + mixed.float() if normed else mixed
            out[0, index] = (scores.softmax(dim=1) * mixed).sum(dim=1).to(out.dtype)
        return project(out)

    return run


def _launches(dla: Any, features: Any) -> int:
    """Operations on tensors without storage; views and new tensors without values start no kernel."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        kernels = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            name = func.__name__.split(".")[0]
            runs = not func.is_view and not name.startswith(("empty", "new_empty", "detach", "alias"))
            self.kernels += runs and name != "_unsafe_view" and out.device.type == "meta"
            return out

    with torch.no_grad(), Count() as count:
        dla(features)
    return count.kernels


def _count(form: Any, device: Any) -> tuple[int, int]:
    """Operations of a form, and the bytes that it allocates at most beyond those there before, its result included."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        form()
        peak = torch.cuda.max_memory_allocated() - before
        with FlopCounterMode(display=False) as counter:
            form()
        return counter.get_total_flops(), peak
    with FlopCounterMode(display=False) as counter:
        peak = cpu_peak(form)
    return counter.get_total_flops(), peak
