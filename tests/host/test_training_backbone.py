"""Gradients through the host's DiTs (tiny, and once a layer of full width), and a LoRA that the host reads."""

import gc
import json

import comfy.ldm.flux.math
import comfy.model_management
import comfy.sd
import pytest
import torch
from subject_dla.dla.context import Context
from subject_dla.loaders.backbones import BACKBONES, TRAINED
from subject_dla.loaders.dit import load_dit
from subject_dla.sampling.guider import StagedGuider
from subject_dla.sampling.stages import preset
from subject_dla.tests.host.test_parity import skip_what_the_host_lacks
from subject_dla.tests.small.dit import build, load_trained, tiny, tiny_flux
from subject_dla.tests.small.models import random_like
from subject_dla.tests.small.training import small_family
from subject_dla.training.dit.frozen import FrozenDiT, GradientError
from subject_dla.training.dit.lora import LoRA


class Problem:
    """A loss of one DiT: two prompts of unequal length (or the shorter), a reference, flow times of their own."""

    def __init__(self, model, family, side=16, batch=2):
        self.backbone, self.family = FrozenDiT(model), BACKBONES[family]
        self.backbone.load()
        frames, side = (1,) * (self.family.latent_dimensions - 2), side * self.family.patch_size // 2
        draw = torch.Generator().manual_seed(0)
        shape = (batch, self.backbone.latent_channels, *frames)
        self.noisy, self.target = (torch.randn(*shape, side, side, generator=draw) for _ in range(2))
        self.reference = torch.randn(*shape, side // 2, side * 3 // 4, generator=draw)
        self.tokens = torch.randn(batch, 7, self.backbone.context_width, generator=draw)
        self.mask = torch.ones(batch, 7, dtype=torch.bool)
        self.mask[-1, 5:] = False
        self.t = torch.tensor([0.7, 0.3])[-batch:]
        self.draw = draw

    def velocity(self, tokens, mask=None, rows=slice(None), references=True):
        mask = self.mask if mask is None else mask
        none = torch.zeros(mask.shape, dtype=torch.uint8)
        context = Context(tokens, mask, none, none.to(torch.int16)) if tokens is not None else None
        references = [self.reference[rows]] if references else []
        values = {"method": self.family.default_placement, "guidance": 1.0 if self.family.takes_guidance else None}
        return self.backbone.velocity(self.noisy[rows], self.t[rows], context, references, **values)

    def loss(self, tokens):
        return (self.velocity(tokens) - self.target).square().mean()

    def gradients(self, checkpointing, parameters=()):
        self.backbone.checkpointing = checkpointing
        tokens = self.tokens.clone().requires_grad_()
        for parameter in parameters:
            parameter.grad = None
        with self.backbone.gradients():
            self.loss(tokens).backward()
        return [tokens.grad] + [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


FAMILIES = [backbone.name for backbone in TRAINED]


@pytest.fixture(scope="module", params=FAMILIES)
def problem(request):
    skip_what_the_host_lacks(request.param)
    with torch.inference_mode():  # as a node of the host loads it
        model = tiny(request.param)
    return Problem(model, request.param)


def difference(loss, point, direction, size=1e-2):
    with torch.no_grad():
        return (loss(point + size * direction) - loss(point - size * direction)) / (2 * size)


@pytest.mark.shows("trains")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_of_the_context(problem, checkpointing):
    (gradient,) = problem.gradients(checkpointing)
    assert gradient[-1, 5:].abs().max() == 0  # padding has no say
    directions = [gradient / gradient.norm() * 30]
    directions += [torch.randn(gradient.shape, generator=problem.draw) for _ in range(2 * len(gradient) - 1)]
    found = torch.stack([difference(problem.loss, problem.tokens, d) for d in directions])
    ours = torch.stack([(gradient * d).sum() for d in directions])
    assert (found - ours).norm() / found.norm() < 1e-2


@pytest.mark.long
@pytest.mark.parametrize("family", [
    pytest.param(name, marks=pytest.mark.shows("trains", family="klein" if name == "flux2" else name))
    for name in FAMILIES
])  # fmt: skip
def test_gradient_of_the_context_at_full_width(monkeypatch, family):
    skip_what_the_host_lacks(family)
    with torch.inference_mode():
        model = load_trained(family, monkeypatch)
    batch = 1 if BACKBONES[family].pads_context else 2  # a context of 512 tokens takes its time
    test_gradient_of_the_context(Problem(model, family, side=8, batch=batch), True)
    del model
    gc.collect()


def test_gradients_of_a_lora_and_the_host_reads_it(problem, tmp_path):
    backbone = problem.backbone
    lora = backbone.lora = LoRA(backbone.dit, problem.family, 4, alpha=2.0)
    lora.attach()
    try:
        bare = problem.velocity(problem.tokens).detach()
        parameters = list(lora.parameters())
        with torch.no_grad():
            for parameter in (pair.B for pair in lora.pairs.values()):
                parameter.normal_(0, 0.05, generator=problem.draw)
        plain, again = problem.gradients(False, parameters), problem.gradients(True, parameters)
        for a, b in zip(plain, again):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-6 * float(a.abs().max()) + 1e-9)
        # the last block of Qwen-Image makes text that nothing reads
        assert sum(float(g.abs().sum()) > 0 for g in plain) >= len(plain) - 4

        start = [p.detach().clone() for p in parameters]
        gradients = plain[1:]
        scale = sum(g.square().sum() for g in gradients).sqrt()

        def loss(shift):
            for p, s, g in zip(parameters, start, gradients):
                p.data = s + shift * g / scale
            return problem.loss(problem.tokens)

        found = difference(loss, torch.zeros(()), torch.ones(()), 3e-2)
        assert abs(found - scale) / scale < 2e-2
        for p, s in zip(parameters, start):
            p.data = s
        with torch.no_grad():
            ours = problem.velocity(problem.tokens)
        assert not torch.allclose(ours, bare, atol=1e-3)
    finally:
        lora.detach()
        backbone.lora = None

    lora.save(tmp_path / "lora.safetensors")
    weights = comfy.utils.load_torch_file(str(tmp_path / "lora.safetensors"), safe_load=True)
    patched, _ = comfy.sd.load_lora_for_models(backbone.patcher, None, weights, 1.0, 0)
    assert len(patched.patches) == len(lora.parts)
    problem.backbone = FrozenDiT(patched)
    try:
        problem.backbone.load()
        with torch.no_grad():
            theirs = problem.velocity(problem.tokens)
        assert torch.allclose(theirs, ours, atol=2e-4 * float(ours.abs().max()))
    finally:
        patched.unpatch_model()
        problem.backbone = backbone
        backbone.load()


@torch.no_grad()
def test_padding_is_not_there(problem):
    both = problem.velocity(problem.tokens)
    alone = problem.velocity(problem.tokens[1:, :5], torch.ones(1, 5, dtype=torch.bool), slice(1, 2))
    assert torch.allclose(both[1:], alone, atol=2e-4 * float(alone.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("mllm, vae, name", [(1, 1, "both"), (1, 0, "mllm_only"), (0, 1, "vae_only")])
def test_what_is_trained_is_what_is_sampled(problem, mllm, vae, name):
    """One Euler step from noise is the whole way along the velocity."""
    backbone, tokens = problem.backbone, problem.tokens[:1]
    values = {"reference_latents": [problem.reference[:1]], "pooled_output": None}
    if problem.family.takes_guidance:
        values |= {"reference_latents_method": problem.family.default_placement, "guidance": 1.0}
    if problem.family.counts_context:
        values["attention_mask"] = torch.ones(1, 7, dtype=torch.long)
    guider = StagedGuider(backbone.patcher, preset(name))
    guider.set_conds([[tokens, values]])
    guider.set_cfg(1.0)
    noise, sampler = problem.noisy[:1], comfy.samplers.sampler_object("euler")
    sampled = guider.sample(noise, torch.zeros_like(noise), sampler, torch.tensor([1.0, 0.0]), disable_pbar=True)
    problem.t = torch.ones(2)
    mask = torch.ones(1, 7, dtype=torch.bool)
    velocity = problem.velocity(tokens if mllm else None, mask, slice(0, 1), bool(vae))
    problem.t = torch.tensor([0.7, 0.3])
    assert torch.allclose(noise - velocity, backbone.latent(sampled), atol=2e-4 * float(velocity.abs().max()))


def test_the_cache_of_qwen_image_2_1_is_off_in_training():
    """The host fills it while it samples; training passes go through all tokens, those before the picture too."""
    skip_what_the_host_lacks("qwen_image21")
    with torch.inference_mode():
        model = tiny("qwen_image21")
    problem, lengths = Problem(model, "qwen_image21"), []
    test_what_is_trained_is_what_is_sampled(problem, 1, 1, "both")
    hook = problem.backbone.dit.transformer_blocks[0].register_forward_pre_hook(
        lambda _, inputs: lengths.append(inputs[0].shape[1])
    )
    problem.gradients(False)
    hook.remove()
    assert lengths == [7 + 4 * 6 + 8 * 8, 5 + 4 * 6 + 8 * 8]  # context, reference, picture
    assert problem.backbone.dit.prefix_cache is None


@pytest.mark.shows("trains", found="refused")
@pytest.mark.parametrize("family", [name for name in BACKBONES if name not in FAMILIES])
def test_a_family_that_is_not_trained_is_refused(family):
    skip_what_the_host_lacks(family)
    with pytest.raises(ValueError, match=r"Training needs FLUX\.1, .*Load one of these"):
        FrozenDiT(tiny(family))


@pytest.mark.parametrize("broken", ["no gradient", "wrong gradient"])
def test_a_host_without_right_gradients_is_refused(monkeypatch, broken):
    model = tiny_flux()
    FrozenDiT(model)
    original = comfy.ldm.flux.math.apply_rope

    def kernel(q, k, angles):
        if broken == "no gradient":
            return original(q.detach(), k.detach(), angles)
        return tuple(x + 0.5 * (x - x.detach()) for x in original(q, k, angles))

    monkeypatch.setattr(comfy.ldm.flux.math, "apply_rope", kernel)
    with pytest.raises(GradientError, match="0.14"):
        FrozenDiT(model)


def test_blocks_get_their_forward_back(monkeypatch):
    backbone = FrozenDiT(tiny_flux())
    block = backbone.dit.double_blocks[0]
    with pytest.raises(KeyError), backbone.gradients():
        assert "forward" in vars(block)
        raise KeyError
    assert "forward" not in vars(block)


def test_mixed_precision_is_computed_again_as_it_was():
    problem = Problem(tiny_flux(), "flux")
    (full,), whole = problem.gradients(False), problem.loss

    def mixed(tokens):
        with torch.autocast("cpu", torch.bfloat16):
            return whole(tokens)

    problem.loss = mixed
    (kept,), (again,) = problem.gradients(False), problem.gradients(True)
    assert torch.equal(kept, again) and not torch.equal(kept, full)
    assert (kept - full).norm() / full.norm() < 0.05


def test_weights_that_a_lora_had_patched_are_trained_through():
    """A picture with a LoRA before, in the same server: the host puts the weights back when it loads them anew."""
    with torch.inference_mode():
        model = tiny_flux()
        drawn, key = model.clone(), "diffusion_model.double_blocks.0.txt_attn.qkv.weight"
        weight = model.model.state_dict()[key]
        before = weight.clone()
        assert drawn.add_patches({key: ("diff", (torch.ones_like(weight),))}) == [key]
        comfy.model_management.load_models_gpu([drawn])
        assert not torch.equal(model.model.state_dict()[key], before)
    problem = Problem(model, "flux")
    assert torch.equal(model.model.state_dict()[key], before)
    assert problem.gradients(False)[0].isfinite().all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_stored_in_fp8(tmp_path_factory, checkpointing):
    models = small_family(tmp_path_factory.getbasetemp() / "small-family")
    with torch.inference_mode():
        model = load_dit(models["diffusion_model"], "fp8_e4m3fn")
    problem = Problem(model, "flux")
    assert problem.backbone.dit.double_blocks[0].img_attn.qkv.weight.dtype == torch.float8_e4m3fn
    test_gradient_of_the_context(problem, checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_int8_files_are_those_of_their_dequantised_weights(checkpointing):
    """As the official template of Qwen-Image 2.1 names them: rows with scales, rotated."""
    skip_what_the_host_lacks("qwen_image21")
    from comfy.quant_ops import QuantizedTensor

    how = {"convrot": True, "convrot_groupsize": 256}
    sizes = {"num_attention_heads": 2, "context_in_dim": 24, "num_layers": 2}
    plain = random_like(build("qwen_image21", sizes).state_dict())
    stored = dict(plain)
    for key in [key for key in plain if "blocks" in key and plain[key].ndim == 2]:
        weight = QuantizedTensor.from_float(plain[key], "TensorWiseINT8Layout", per_channel=True, **how)
        text = json.dumps({"format": "int8_tensorwise", **how})
        plain[key], stored[key] = weight.dequantize(), weight._qdata
        stored[f"{key}_scale"] = weight._params.scale
        stored[key.replace("weight", "comfy_quant")] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with torch.inference_mode():
        models = [comfy.sd.load_diffusion_model_state_dict(weights) for weights in (plain, stored)]
    problems = [Problem(model, "qwen_image21") for model in models]
    assert isinstance(problems[1].backbone.dit.transformer_blocks[0].attn.to_q.weight, QuantizedTensor)
    theirs, ours = (problem.gradients(checkpointing)[0] for problem in problems)
    assert (ours - theirs).norm() < 0.05 * theirs.norm()
