"""The memory estimate against what autograd keeps and the allocator hands out, in the host's own DiTs on the CPU."""

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.ops
import pytest
import torch
from subject_dla.dla import DLAConfig, DualLayerAggregator, MLLMInfo
from subject_dla.loaders.backbones import BACKBONES, TRAINED
from subject_dla.tests.host.test_parity import skip_what_the_host_lacks
from subject_dla.tests.small import dit
from subject_dla.tests.small.dit import KLEIN
from subject_dla.training.dit import flops, memory
from subject_dla.training.dit.checkpointing import in_place, recomputed
from subject_dla.training.dit.lora import LoRA
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

FAMILIES = [backbone.name for backbone in TRAINED]
DEEP = {
    "flux": {"depth": 19, "depth_single_blocks": 38}, "qwen_image": {"num_layers": 60},
    "omnigen2": {"num_layers": 32, "num_refiner_layers": 2}, "flux2": {"depth": 5, "depth_single_blocks": 20},
    "qwen_image21": {"num_layers": 32},
}  # fmt: skip
NARROW = {
    "flux": {"hidden_size": 512, "num_heads": 4, "depth": 3, "depth_single_blocks": 3},
    "flux2": {"hidden_size": 512, "num_heads": 4, "depth": 3, "depth_single_blocks": 3},
    "qwen_image": {"num_attention_heads": 4, "num_layers": 3},
    "omnigen2": {"hidden_size": 480, "num_attention_heads": 4, "num_kv_heads": 2, "num_layers": 3},
    "qwen_image21": {"num_attention_heads": 4, "num_layers": 3},
}
TOKENS, SIDE, REFERENCE = 40, 16, 8  # context tokens; 16 x 16 image tokens (a picture of 256 px) and 8 x 8


@pytest.fixture(autouse=True)
def in_training(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "in_training", True, raising=False)


def build(family, sizes=(), device="cpu", dtype=torch.float32, operations=None):
    """The host's class with frozen weights of zero: what is kept does not depend on them."""
    skip_what_the_host_lacks(family)
    sizes = (KLEIN if family == "flux2" else {}) | dict(sizes)
    module = dit.build(family, sizes, dtype, operations).requires_grad_(False)
    if device != "meta":
        zeros = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in module.state_dict().items()}
        module.load_state_dict(zeros, assign=True)
    return module


def run(family, module, tokens=TOKENS, side=SIDE, reference=REFERENCE, dtype=torch.float32):
    """A forward pass with gradients to the context tokens, with the attention that GPUs use."""

    def attention(_, *args, **kwargs):
        return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)

    draw = torch.Generator().manual_seed(0)
    backbone = BACKBONES[family]
    frames, channels = (1,) * (backbone.latent_dimensions - 2), backbone.latent_channels

    def random(*shape):
        return torch.randn(*shape, generator=draw).to(dtype)

    side, reference = side * backbone.patch_size, reference * backbone.patch_size
    more = {"ref_latents": [random(1, channels, *frames, reference, reference)]}
    more["transformer_options"] = {"optimized_attention_override": attention}
    if backbone.takes_guidance:
        more |= {"y": random(1, 768), "guidance": torch.tensor([3.5], dtype=dtype)}
    if backbone.counts_context:
        more["num_tokens"] = tokens
    context = random(1, tokens, backbone.training.context_width or backbone.context_width).requires_grad_()
    return module(random(1, channels, *frames, side, side), torch.tensor([0.5], dtype=dtype), context, **more)


def kept(module, lora, forward) -> int:
    """Bytes that autograd keeps, each version of each storage once, without those of weights."""
    weights = [*module.parameters(), *(lora.parameters() if lora is not None else [])]
    weights = {p.untyped_storage().data_ptr() for p in weights}
    sizes, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            alive.append(tensor)  # so that no other gets its address
            sizes[storage.data_ptr(), tensor._version] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    assert out.requires_grad
    return sum(sizes.values())


def estimated(family, module, rank, checkpointing, tokens=TOKENS, side=SIDE, reference=REFERENCE, weight=4, compute=4):
    pixels = {"resolution": side * 16, "references": 1, "reference_side": reference * 16}
    settings = {"context_tokens": tokens, "lora_rank": rank, "weight_bytes": weight, "compute_bytes": compute}
    backbone, settings = BACKBONES[family], pixels | settings | {"checkpointing": checkpointing}
    return memory.estimate(backbone, sizes=backbone.training.measure(module), **settings).parts


@pytest.mark.parametrize("rank", [0, pytest.param(512, marks=pytest.mark.long)])
@pytest.mark.parametrize("family", FAMILIES)
def test_count_of_activations_is_what_autograd_keeps(family, rank):
    module = build(family, () if rank else NARROW[family])  # full width once
    lora = LoRA(module, BACKBONES[family], rank) if rank else None
    if lora is not None:
        lora.attach()
    found = kept(module, lora, lambda: run(family, module))
    # hosts differ: newer ones share OmniGen2's keys among heads without copying them
    assert 0.97 < estimated(family, module, rank, False)["activations"] / found < 1.1


@pytest.mark.long
def test_autograd_keeps_weights_that_are_cast_up_for_the_arithmetic():
    module = build("flux", dtype=torch.float8_e4m3fn, operations=comfy.ops.manual_cast)
    for part in module.modules():  # as the host loads them: norm scales stay in the dtype of the arithmetic
        for name, tensor in part._parameters.items():
            if tensor is not None and tensor.ndim == 1:
                part._parameters[name] = torch.nn.Parameter(tensor.to(torch.bfloat16), requires_grad=False)
    lora = LoRA(module, BACKBONES["flux"], 16)
    lora.attach()
    found = kept(module, lora, lambda: run("flux", module, dtype=torch.bfloat16))
    parts = [estimated("flux", module, 16, False, weight=w, compute=2)["activations"] for w in (1, 2)]
    assert parts[0] == pytest.approx(found, rel=0.05)
    assert parts[0] > 8 * parts[1]


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("family", [
    pytest.param(name, marks=[pytest.mark.long] * (name in ("flux", "flux2"))) for name in FAMILIES
])  # fmt: skip
def test_peak_of_forward_and_backward_pass(family, checkpointing):
    module, shape = build(family, NARROW[family]), {"tokens": 128, "side": 24, "reference": 12}
    lora = LoRA(module, BACKBONES[family], 16)
    lora.attach()
    blocks = [block for name in BACKBONES[family].training.blocks for block in getattr(module, name)]

    def step():
        lora.zero_grad(set_to_none=True)
        with recomputed(blocks, lora.inside) if checkpointing else in_place():
            run(family, module, **shape).square().mean().backward()

    step()
    lora.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        step()
    now = peak = 0
    events = [event for event in log.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    parts = estimated(family, module, 16, checkpointing, **shape)
    step_alone = sum(parts[name] for name in ("activations", "one block again", "gradients in a block"))
    assert 0.95 < step_alone / peak < 1.2


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_count_of_operations_is_that_of_torch(family, checkpointing):
    module, training = build(family, NARROW[family]), BACKBONES[family].training
    blocks = [block for name in training.blocks for block in getattr(module, name)]
    lora = LoRA(module, BACKBONES[family], 1)
    lora.attach()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it counts no others on the CPU
        with recomputed(blocks, lora.inside) if checkpointing else in_place():
            run(family, module).square().mean().backward()
    settings = {"resolution": SIDE * 16, "reference_side": REFERENCE * 16, "context_tokens": TOKENS}
    settings |= {"sizes": training.measure(module), "checkpointing": checkpointing}
    assert flops.flops(BACKBONES[family], **settings) == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_and_lora_parameters_are_those_of_the_host_s_class(family):
    training, module = BACKBONES[family].training, build(family, device="meta")
    assert training.measure(build(family, DEEP[family], device="meta")) == training.sizes
    found = sum(p.numel() for p in LoRA(module, BACKBONES[family], 4).parameters())
    assert estimated(family, module, 4, True)["LoRA"] == 4 * found


def test_estimate_follows_its_settings():
    def total(**settings):
        return memory.estimate(BACKBONES["flux"], **settings).total

    assert total() < total(checkpointing=False) < total(checkpointing=False, batch_size=2)
    assert total(weight_bytes=1) < total() and total(optimizer="adamw8bit") < total()
    assert total(weight_bytes=1, checkpointing=False) > total(checkpointing=False)  # casts are kept
    assert total(references=0) < total() < total(references=2)
    assert total(resolution=(512, 1024)) == total(resolution=(1024, 512)) < total()
    with pytest.raises(ValueError, match="'longcat_image', expected one of flux, flux2, omnigen2"):
        memory.estimate(BACKBONES["longcat_image"])
    with pytest.raises(ValueError, match="'lion', expected one of adamw"):
        memory.estimate(BACKBONES["flux"], optimizer="lion")


def test_estimate_is_of_the_dla_s_form():
    def parts(**changes):
        dla = DLAConfig(MLLMInfo("", "", 28, 3584), 4096, heads=28, **changes)
        found = memory.estimate(BACKBONES["flux"], dla=dla).parts
        count = sum(p.numel() for p in DualLayerAggregator(dla, device="meta").parameters())
        assert found["gradients"] == 4 * count and found["DLA"] == 6 * count
        return found["DLA's pooling"]

    assert parts() < parts(scores="states") == parts(pooling="linear") and parts(modalities="last") == 0
    assert parts(layer_subset=(0, 14, 28)) < parts()
    assert memory.estimate(BACKBONES["flux"]).parts["DLA's pooling"] == parts()  # a new one


def test_a_card_is_given_only_what_fits_it():
    small, large = memory.fits().strip().split("\n\n")
    words = {"bf16": 2, "fp8": 1}
    for line in large.splitlines()[2:]:
        name, trained, side, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        family = next(b for b in TRAINED if b.training.release == name)
        rank = int(trained.partition("LoRA ")[2] or 0)
        for card, cell in zip(memory.CARDS, cells):
            settings = {"weight_bytes": 1, "optimizer": "adamw8bit"}  # where nothing fits, not even this does
            if cell != "no":
                weight, optimizer, *_ = cell.split(", ")
                optimizer = optimizer.lower().replace("8-bit adamw", "adamw8bit")
                settings = {"weight_bytes": words[weight], "optimizer": optimizer}
            again = cell == "no" or "checkpointing" in cell
            step = memory.estimate(family, resolution=int(side), lora_rank=rank, checkpointing=again, **settings)
            assert (step.total <= card * 2**30 * 0.94) is (cell != "no"), (line, card)
    assert len(small.splitlines()) == len(large.splitlines()) == 2 + 6 * len(FAMILIES)
