"""Full-width one-layer models through the host's own detection and loaders: 1/1 is the host's output and 0 the host's
without those tokens, bit for bit."""

import gc

import pytest
import torch
from subject_dla.loaders.backbones import BACKBONES, backbone_of
from subject_dla.loaders.dit import context_width
from subject_dla.sampling.stages import Keyframe, Stages, preset
from subject_dla.tests.small.dit import load

SAMPLERS = ["euler", "dpmpp_2m", "heun", "euler_ancestral"]  # one-step, multi-step, second-order, ancestral


class Subject:
    """One backbone with conditions that fit it."""

    def __init__(self, family, monkeypatch):
        self.backbone = BACKBONES[family]
        self.model = load(family, monkeypatch)
        assert backbone_of(self.model) is self.backbone
        self.format = self.model.get_model_object("latent_format")
        assert context_width(self.model) == self.backbone.context_width
        assert self.format.latent_channels == self.backbone.latent_channels

    def latent(self, h, w, batch=1, seed=1):
        x = torch.randn(batch, self.format.latent_channels, h, w, generator=torch.Generator().manual_seed(seed))
        return x.unsqueeze(2) if self.format.latent_dimensions == 3 else x

    def condition(self, tokens, seed, references=True):
        width = context_width(self.model)
        values = {"pooled_output": None}
        if self.backbone.counts_context:
            values["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
        if references:
            values["reference_latents"] = [self.latent(8, 6, seed=5), self.latent(4, 8, seed=6)]
            if self.backbone.default_placement:
                values["reference_latents_method"] = self.backbone.default_placement
        return [[torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)), values]]

    def host(self, positive, negative, sampler="euler", batch=1, cfg=2.5, steps=2):
        import comfy.sample

        image = torch.zeros_like(self.latent(8, 8, batch))
        return comfy.sample.sample(
            self.model,
            comfy.sample.prepare_noise(image, 7),
            steps,
            cfg,
            sampler,
            "simple",
            positive,
            negative,
            image,
            disable_pbar=True,
            seed=7,
        )

    def staged(self, stages, positive, negative, sampler="euler", batch=1, cfg=2.5, steps=2):
        from subject_dla.sampling.sample import staged_sample

        image = {"samples": torch.zeros_like(self.latent(8, 8, batch))}
        return staged_sample(self.model, 7, steps, cfg, sampler, "simple", positive, negative, image, 1.0, stages)[
            "samples"
        ]


@pytest.fixture(scope="module", params=["flux", "qwen_image", "omnigen2"])
def subject(request):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Subject(request.param, monkeypatch)
    gc.collect()


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


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_0_context_leaves_nothing_of_it(subject, sampler, batch):
    one = subject.staged(preset("vae_only"), subject.condition(9, 2), subject.condition(9, 3, False), sampler, batch)
    other = subject.staged(
        preset("vae_only"), subject.condition(30, 44), subject.condition(5, 77, False), sampler, batch
    )
    assert one.isfinite().all() and torch.equal(one, other)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_0_context_equals_the_host_without_its_keys(subject, sampler, batch):
    """The host's own run on one context token (it takes no empty context) whose keys and values are left out."""
    subject_model, removed = subject.model, []

    def attention(func, q, k, v, heads, mask=None, **kwargs):
        joint = 1 + 16 + 12 + 8
        if k.shape[2] == joint:
            removed.append(1)
            k, v = k[:, :, 1:], v[:, :, 1:]
        return func(q, k, v, heads, mask=mask, **kwargs)

    try:
        subject.model = subject_model.clone()
        subject.model.model_options["transformer_options"]["optimized_attention_override"] = attention
        theirs = subject.host(subject.condition(1, 2), subject.condition(1, 3), sampler, batch, cfg=1.0)
    finally:
        subject.model = subject_model
    assert removed
    assert torch.equal(
        subject.staged(preset("vae_only"), subject.condition(9, 8), None, sampler, batch, cfg=1.0), theirs
    )


def test_strengths_near_1_come_near_the_host(subject):
    positive, negative = subject.condition(9, 2), subject.condition(9, 3)
    near = subject.staged(Stages((Keyframe(1, 1 - 1e-6, 1 - 1e-6),)), positive, negative)
    assert torch.allclose(near, subject.host(positive, negative), atol=1e-3)
    half = subject.staged(Stages((Keyframe(1, 0.5, 0.5),)), positive, negative)
    assert (half - near).abs().max() > 1e-3


def test_flux2(monkeypatch):
    subject = Subject("flux2", monkeypatch)
    positive = subject.condition(6, 2)
    ours = subject.staged(preset("both"), positive, None, cfg=1.0)
    assert ours.isfinite().all() and torch.equal(ours, subject.host(positive, positive, cfg=1.0))
    bare = subject.condition(6, 2, False)
    assert torch.equal(subject.staged(preset("mllm_only"), positive, None, cfg=1.0), subject.host(bare, bare, cfg=1.0))
    off = [
        subject.staged(preset("vae_only"), subject.condition(n, seed), None, cfg=1.0, steps=1)
        for n, seed in ((6, 2), (3, 9))
    ]
    assert off[0].isfinite().all() and torch.equal(*off)
