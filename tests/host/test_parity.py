"""Strength 1/1 is the host's output and 0 the host's without those tokens, bit for bit: for each sampler and batch on
tiny models of the host's own classes, and once on a layer of full width through its own detection and loader."""

import gc

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from subject_dla.loaders.backbones import BACKBONES, backbone_of, backbone_of_keys
from subject_dla.loaders.dit import context_width
from subject_dla.loaders.reference_latents import reference_method
from subject_dla.sampling.patch import apply_stages
from subject_dla.sampling.sample import staged_sample
from subject_dla.sampling.stages import Keyframe, Stages, preset
from subject_dla.tests.small.dit import FAMILIES, build, load, load_trained, on_this_host, tiny

SAMPLERS = ["euler", "dpmpp_2m", "heun", "euler_ancestral", "uni_pc"]  # one-step, multi-step, second-order, ancestral
WAYS = ["KSampler", "SamplerCustomAdvanced", "DualCFGGuider"]  # of the host, that Apply Stages goes before


class Subject:
    """One backbone with conditions that fit it; the latents of its pictures are `side` high and wide."""

    def __init__(self, family, model, side=8):
        self.backbone, self.model, self.side = BACKBONES[family], model, side
        assert backbone_of(self.model) is self.backbone
        self.format = self.model.get_model_object("latent_format")
        assert self.format.latent_channels == self.backbone.latent_channels
        assert self.format.latent_dimensions == self.backbone.latent_dimensions

    @property
    def references(self):
        """(height, width) of the reference latents."""
        return (self.side, self.side - 2), (self.side // 2, self.side)

    def tokens(self, h, w):
        return h * w // self.backbone.patch_size**2

    def layout(self, context, height=None, width=None):
        """(group, tokens) among the keys of joint attention; a reference by its index, padding and the like "other"."""
        image, references = (height or self.side, width or self.side), [self.tokens(*size) for size in self.references]
        if self.backbone.name == "z_image":

            def padding(n):
                return -n % 5

            found = [
                ("context", context + padding(context) + 5 * len(references)),
                ("other", 5 * (len(references) + 1)),
            ]
            for index, n in enumerate(references):
                found += [(index, n), (f"padding {index}", padding(n))]
            return [*found, ("image", self.tokens(*image)), ("other", padding(self.tokens(*image)))]
        if self.backbone.name == "ming_image":
            context += self.direct(context)
        parts = {"context": [("context", context)], "image": [("image", self.tokens(*image))]}
        parts["reference"] = [*enumerate(references)]
        return [part for name in self.backbone.token_order for part in parts[name]]

    def latent(self, h, w, batch=1, seed=1):
        x = torch.randn(batch, self.format.latent_channels, h, w, generator=torch.Generator().manual_seed(seed))
        return x.unsqueeze(2) if self.format.latent_dimensions == 3 else x

    def direct(self, context):
        """Tokens of Ming-Image's `direct_context` beside so many others."""
        return context - 1

    def condition(self, tokens, seed, references=True):
        width = context_width(self.model)
        values = {"pooled_output": None}
        if self.backbone.counts_context:
            values["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
        if self.backbone.name == "ming_image" and self.direct(tokens):
            size = 1, self.direct(tokens), self.model.model.diffusion_model.dim
            values["direct_context"] = torch.randn(size, generator=torch.Generator().manual_seed(seed + 1))
        if references:
            values["reference_latents"] = [self.latent(*size, seed=5 + i) for i, size in enumerate(self.references)]
            if method := reference_method(self.model, "auto"):
                values["reference_latents_method"] = method
        return [[torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)), values]]

    def host(self, positive, negative, sampler="euler", batch=1, cfg=2.5, steps=2, way="KSampler", stages=None):
        """The host's picture; with `stages`, on the model with Apply Stages."""
        model = self.model if stages is None else apply_stages(self.model, stages)
        image = torch.zeros_like(self.latent(self.side, self.side, batch))
        noise = comfy.sample.prepare_noise(image, 7)
        if way == "KSampler":
            settings = (steps, cfg, sampler, "simple", positive, negative, image)
            return comfy.sample.sample(model, noise, *settings, disable_pbar=True, seed=7)
        if way == "DualCFGGuider":
            guider = Guider_DualCFG(model)
            third = self.condition(positive[0][0].shape[1], 6, "reference_latents" in positive[0][1])
            guider.set_conds(positive, negative, third)
            guider.set_cfg(cfg, 1.5)
        else:
            guider = comfy.samplers.CFGGuider(model)
            guider.set_conds(positive, negative)
            guider.set_cfg(cfg)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
        return guider.sample(noise, image, comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=7)

    def staged(self, stages, positive, negative, sampler="euler", batch=1, cfg=2.5, steps=2):
        image = {"samples": torch.zeros_like(self.latent(self.side, self.side, batch))}
        out = staged_sample(self.model, 7, steps, cfg, sampler, "simple", positive, negative, image, 1.0, stages)
        return out["samples"]


def skip_what_the_host_lacks(family):
    """Hosts before 0.33 may not have a family: LongCat-Image is not in 0.3.64 and 0.3.75."""
    if not on_this_host(family):
        pytest.skip("not on this host")


def skip_what_the_host_cannot_build(family):
    """0.3.75 builds LongCat-Image's layers, though it does not know the family; 0.3.64 not even those."""
    try:
        build(family)
    except (TypeError, ModuleNotFoundError):
        pytest.skip("not on this host")


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request):
    skip_what_the_host_lacks(request.param)
    return Subject(request.param, tiny(request.param))


@pytest.mark.shows("parity both", "references off")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_1_and_strength_0_references_equal_the_host(subject, sampler, batch):
    positive, negative = subject.condition(9, 2), subject.condition(9, 3)
    ours = subject.staged(preset("both"), positive, negative, sampler, batch)
    assert ours.isfinite().all() and ours.std() > 0
    assert torch.equal(ours, subject.host(positive, negative, sampler, batch))
    bare = subject.condition(9, 2, False), subject.condition(9, 3, False)
    without = subject.host(*bare, sampler, batch)
    assert torch.equal(subject.staged(preset("mllm_only"), positive, negative, sampler, batch), without)
    assert not torch.equal(ours, without)
    for way in WAYS:
        on, off = (subject.host(*pair, sampler, batch, way=way) for pair in ((positive, negative), bare))
        for stages, expected in ((preset("both"), on), (preset("mllm_only"), off)):
            found = subject.host(positive, negative, sampler, batch, way=way, stages=stages)
            assert torch.equal(found, expected), (way, stages)


@pytest.mark.shows("context off")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_0_context_leaves_nothing_of_it_and_equals_the_host_without_its_keys(subject, sampler, batch):
    conditions = [(subject.condition(9, 2), subject.condition(9, 3, False))]
    conditions += [(subject.condition(30, 44), subject.condition(5, 77, False))]
    one, other = (subject.staged(preset("vae_only"), *pair, sampler, batch) for pair in conditions)
    assert one.isfinite().all() and torch.equal(one, other)
    # equal to the host's own run on one context token (most take no empty context) without its keys and values
    subject_model, removed = subject.model, []
    left = subject.backbone.context_off_tokens
    layout = subject.layout(512 if subject.backbone.name == "flux2" else left)  # the host fills it up

    def attention(func, q, k, v, heads, mask=None, **kwargs):
        joint = sum(count for _, count in layout)
        dim = 2 if kwargs.get("skip_reshape") else 1  # Qwen-Image on 0.3.64 passes (b, n, h d)
        if k.shape[dim] == joint:
            removed.append(1)
            kept = torch.cat([torch.full((count,), name != "context") for name, count in layout])
            k, v = (x.index_select(dim, kept.nonzero().flatten()) for x in (k, v))
        return func(q, k, v, heads, mask=mask, **kwargs)

    try:
        subject.model = subject_model.clone()
        subject.model.model_options["transformer_options"]["optimized_attention_override"] = attention
        one_token = subject.condition(left, 2), subject.condition(left, 3), sampler, batch
        theirs = {way: subject.host(*one_token, cfg=1.0, way=way) for way in WAYS}
    finally:
        subject.model = subject_model
    ours = subject.staged(preset("vae_only"), subject.condition(9, 8), None, sampler, batch, cfg=1.0)
    assert removed and torch.equal(ours, theirs["KSampler"])
    for way, expected in theirs.items():
        conditions = subject.condition(9, 8), subject.condition(9, 3)
        found = subject.host(*conditions, sampler, batch, cfg=1.0, way=way, stages=preset("vae_only"))
        assert torch.equal(found, expected), way


@pytest.mark.shows("strengths")
def test_strengths_near_1_come_near_the_host(subject):
    positive, negative = subject.condition(9, 2), subject.condition(9, 3)
    near = subject.staged(Stages((Keyframe(1, 1 - 1e-6, 1 - 1e-6),)), positive, negative)
    assert torch.allclose(near, subject.host(positive, negative), atol=1e-3)
    half = subject.staged(Stages((Keyframe(1, 0.5, 0.5),)), positive, negative)
    assert (half - near).abs().max() > 1e-3


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_told_by_its_keys(family, prefix):
    skip_what_the_host_cannot_build(family)
    shapes = {prefix + key: tensor.shape for key, tensor in build(family).state_dict().items()}
    assert backbone_of_keys(shapes, prefix) is BACKBONES[family]
    assert backbone_of_keys(shapes, "other.") is None


def test_a_file_of_chroma_is_none_of_these():
    """Its blocks are FLUX.1's, without a pooled vector."""
    keys = {*build("flux").state_dict(), "distilled_guidance_layer.in_proj.weight"}
    for found in (keys, keys - {"vector_in.in_layer.weight"}):
        assert backbone_of_keys(dict.fromkeys(found, ())) is None


@pytest.mark.shows("detected", "parity both", "context off", "references off")
@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_full_width(monkeypatch, family):
    """Once for each family, at the widths of a release: the two identities, and the context left out."""
    skip_what_the_host_lacks(family)
    subject = Subject(family, load(family, monkeypatch), side=4)
    assert context_width(subject.model) == subject.backbone.context_width
    if family == "flux2":  # dev is told by the host; a layer of Klein 4B is run, in a tenth of the time
        subject = Subject(family, load_trained(family, monkeypatch), side=4)
    check_identities(subject)
    del subject
    gc.collect()


def check_identities(subject, reads_references=True):
    """Everything on and references off are the host's pictures, and a context that is off leaves nothing of it."""
    run = {"cfg": 1.0, "steps": 1}
    with_references, without = subject.condition(6, 2), subject.condition(6, 2, False)
    ours, bare = (subject.host(some, some, **run) for some in (with_references, without))
    assert ours.isfinite().all()
    for stages, expected in ((preset("both"), ours), (preset("mllm_only"), bare)):
        assert torch.equal(subject.host(with_references, with_references, **run, stages=stages), expected)
    assert torch.equal(ours, bare) is not reads_references
    off = [subject.staged(preset("vae_only"), subject.condition(*sizes), None, **run) for sizes in ((6, 2), (3, 9))]
    assert off[0].isfinite().all() and torch.equal(*off)
