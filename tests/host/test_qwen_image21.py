"""Qwen-Image 2.1, whose references have places inside the context, with the host's prefix cache and without."""

import pytest
import torch
from subject_dla.loaders import host, qwen_image21
from subject_dla.loaders.backbones import BACKBONES
from subject_dla.loaders.conditioning import WITH_IMAGES, add_context_with_images
from subject_dla.loaders.dit import dit_of
from subject_dla.loaders.qwen_image21 import encode_for_stages
from subject_dla.loaders.reference_latents import add_identity
from subject_dla.sampling.image_guidance import apply_image_guidance
from subject_dla.sampling.stages import Keyframe, Stages, preset
from subject_dla.tests.host.test_mllm_encoders import WIDTH, build_clip
from subject_dla.tests.host.test_parity import Subject, skip_what_the_host_lacks
from subject_dla.tests.host.test_regions import LEFT, MASKS, REGIONS, SOFT, STRENGTHS, dense, textbook, with_settings
from subject_dla.tests.host.test_subject_conditioning import TinyVAE, picture
from subject_dla.tests.small.dit import tiny

SLOTS = "image_slots"
FAMILY = {"family": "qwen_image21"}
PLACES = [2, 5]  # context tokens before each reference
TOKENS = 9
BOTH_PLACED_LAST = [TOKENS, TOKENS]
HALF = Stages((Keyframe(1, 0.7, 0.5),))


@pytest.fixture(scope="module", params=["auto", "off"])
def subject(request):
    """On a model with the host's prefix cache, and on one without."""
    skip_what_the_host_lacks("qwen_image21")
    found = Subject("qwen_image21", tiny("qwen_image21"))
    found.model.model_options["transformer_options"]["qwen_image21_cache"] = {"device": request.param}
    return found


def placed(subject, seed, places=PLACES, tokens=TOKENS):
    """As TextEncodeQwenImage21 makes it with a VAE: vision tokens left out, and where they were."""
    return with_settings(subject.condition(tokens, seed), **{SLOTS: list(places)})


def with_images(subject, seed):
    """The same without a VAE: with vision tokens."""
    return subject.condition(TOKENS + 6, seed + 50, False)


def pieces(subject):
    """(start, end) of each piece of the sequence."""
    first, second = (subject.tokens(*size) for size in subject.references)
    sizes = [PLACES[0], first, PLACES[1] - PLACES[0], second, TOKENS - PLACES[1], subject.tokens(8, 8)]
    ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    return [*zip(ends, ends[1:])]


@pytest.mark.shows("K/V cache", "parity both", "context off", **FAMILY)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_strength_1_is_the_hosts_picture_and_so_is_a_run_without_the_context(subject, sampler, batch):
    pair = placed(subject, 2), placed(subject, 3)
    whole = subject.host(*pair, sampler, batch)
    assert torch.equal(subject.staged(preset("both"), *pair, sampler, batch), whole)
    last = [placed(subject, seed, BOTH_PLACED_LAST) for seed in (2, 3)]
    assert not torch.equal(subject.host(*last, sampler, batch), whole)  # the places matter
    empty = subject.condition(0, 2), subject.condition(0, 3)
    theirs = subject.host(*empty, sampler, batch)
    assert torch.equal(subject.staged(preset("vae_only"), *pair, sampler, batch), theirs)
    other = placed(subject, 22, [0, 4], 6), placed(subject, 23, [6, 6], 6)
    assert torch.equal(subject.staged(preset("vae_only"), *other, sampler, batch), theirs)


@pytest.mark.shows("K/V cache", "references off", **FAMILY)
@pytest.mark.parametrize("name", ["mllm_only", "semantics_first", "two_stage", "paper"])
def test_a_stage_without_references_needs_a_context_that_holds_the_images(subject, name):
    pair = placed(subject, 2), placed(subject, 3)
    with pytest.raises(ValueError, match="Put Encode Qwen-Image 2.1 for Stages in the place"):
        subject.staged(preset(name), *pair)
    kept = [add_context_with_images(c, with_images(subject, seed)) for c, seed in zip(pair, (2, 3))]
    with pytest.raises(ValueError, match="nothing of it would be left"):  # each condition
        subject.staged(preset(name), kept[0], pair[1])
    ours = subject.staged(preset(name), *kept, steps=4)
    if name == "mllm_only":
        assert torch.equal(ours, subject.host(with_images(subject, 2), with_images(subject, 3), steps=4))
    assert ours.isfinite().all() and torch.equal(subject.staged(preset("both"), *kept), subject.host(*pair))
    changed = [[torch.zeros_like(tokens), values] for tokens, values in kept[1]]
    with pytest.raises(ValueError, match="changed behind Encode Qwen-Image 2.1 for Stages"):
        subject.staged(preset(name), kept[0], changed)


def test_references_that_follow_a_context_with_images_can_be_left_out(subject):
    """As Add Identity adds them to a conditioning that was encoded without a VAE."""
    bare = with_images(subject, 2)
    added = add_identity(bare, subject.model, TinyVAE(subject.backbone), picture(70, 100))
    assert added[0][1]["reference_latents"][0].shape[-2:] == (4, 6)  # 64 x 96 px
    assert torch.equal(subject.staged(preset("mllm_only"), added, None, cfg=1.0), subject.host(bare, bare, cfg=1.0))
    assert torch.equal(subject.staged(preset("both"), added, None, cfg=1.0), subject.host(added, added, cfg=1.0))


def test_a_reference_of_strength_0_goes_with_its_place(subject):
    whole = placed(subject, 2)
    ours = subject.staged(preset("both"), with_settings(whole, **{STRENGTHS: [0, 1]}), None, cfg=1.0)
    latents = whole[0][1]["reference_latents"]
    one = with_settings(whole, reference_latents=latents[1:], **{SLOTS: PLACES[1:]})
    assert torch.equal(ours, subject.host(one, one, cfg=1.0))
    with pytest.raises(ValueError, match="reference's strength above 0"):
        subject.staged(preset("both"), with_settings(whole, **{STRENGTHS: [0, 0]}), None, cfg=1.0)


@pytest.mark.shows("K/V cache", "strengths", "regions", **FAMILY)
@pytest.mark.parametrize("batch", [1, 3])
def test_strengths_masks_and_regions_are_textbook_attention_in_each_piece(subject, batch):
    settings = {STRENGTHS: [0.5, 1.5], MASKS: [SOFT.T.contiguous(), None]}
    bare, regions = [placed(subject, seed) for seed in (2, 3)], ([LEFT, SOFT], [None, LEFT])
    pair = [with_settings(c, **settings, **{REGIONS: found}) for c, found in zip(bare, regions)]
    ours = subject.staged(Stages((Keyframe(1, 0.6, 1),)), *pair, batch=batch)
    biases = {}
    for index, found in enumerate(regions):
        bias = dense(subject, TOKENS, found, (0.6, 0.5, 1.5), settings[MASKS])  # context, references, image
        ends = torch.tensor([0, TOKENS, *(subject.tokens(*size) for size in subject.references)]).cumsum(0).tolist()
        context, *references, image = (torch.arange(*span) for span in zip(ends, [*ends[1:], len(bias)]))
        texts = context.tensor_split(PLACES)
        order = torch.cat([texts[0], references[0], texts[1], references[1], texts[2], image])
        biases |= {(index, end): bias[order][:, order][start:end, :end] for start, end in pieces(subject)}
    plain, subject.model = subject.model, textbook(subject.model, biases)
    try:
        theirs = subject.host(*bare, batch=batch)
    finally:
        subject.model = plain
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


SCHEDULES = {
    "strengths": (Keyframe(0, 1, 0.5), Keyframe(0.5, 1, 1)),
    "back": (Keyframe(0, 1, 1), Keyframe(0.3, 0.5, 1), Keyframe(0.6, 1, 1)),
    "context off": (Keyframe(0, 0.8, 1), Keyframe(0.5, 0, 1)),
    "blend": (Keyframe(0, 1, 0.2, "linear"), Keyframe(0.9, 1, 1)),
}


@pytest.mark.shows("K/V cache", **FAMILY)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_prefix_cache_holds_what_the_strengths_of_the_stage_make(name):
    """Pictures with it and without are equal; what is before the picture is computed once in a stage."""
    skip_what_the_host_lacks("qwen_image21")
    subject, pictures, counts = Subject("qwen_image21", tiny("qwen_image21")), [], []
    block = dit_of(subject.model.model).transformer_blocks[0]
    for device in ("off", "auto"):
        subject.model.model_options["transformer_options"]["qwen_image21_cache"] = {"device": device}
        calls = []
        handle = block.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[0].shape[1]))
        pair = placed(subject, 2), placed(subject, 2)  # the same tokens
        pair = pair[0], with_settings(pair[1], **{STRENGTHS: [1, 0.7]})
        pictures.append(subject.staged(Stages(SCHEDULES[name], "steps"), *pair, steps=6))
        handle.remove()
        counts.append(sum(length != subject.tokens(8, 8) for length in calls))
    assert torch.equal(*pictures)
    assert counts == [6, {"strengths": 2, "back": 3, "context off": 2, "blend": 6}[name]]
    assert dit_of(subject.model.model).prefix_cache is None  # nothing is left of the run


def test_what_leaves_references_out_by_itself_needs_the_images_too(subject):
    pair = placed(subject, 2), placed(subject, 3)
    plain, subject.model = subject.model, apply_image_guidance(subject.model, 2.0)
    try:
        with pytest.raises(ValueError, match="remove Image Guidance"):
            subject.host(*pair)
        kept = [add_context_with_images(c, with_images(subject, seed)) for c, seed in zip(pair, (2, 3))]
        assert subject.host(*kept).isfinite().all()
    finally:
        subject.model = plain


def test_the_node_encodes_as_the_hosts_does_with_and_without_a_vae(monkeypatch):
    skip_what_the_host_lacks("qwen_image21")
    clip = build_clip(monkeypatch, "QwenImage21TEModel")
    subject = Subject("qwen_image21", tiny("qwen_image21", context_in_dim=WIDTH))
    vae, images = TinyVAE(subject.backbone), {"image_1": picture(64, 96), "image_2": picture(96, 64)}
    sockets = images["image_1"], None, images["image_2"].repeat(1, 1, 1, 1)
    *pair, latent = encode_for_stages(clip, vae, "a fox", "blurred", [*sockets], 96)
    encode = host.qwen_image21_encoder()
    whole = encode(clip, "a fox", "blurred", vae=vae, images=images, resolution=96)
    text = encode(clip, "a fox", "blurred", images=images, resolution=96)
    assert latent["samples"].shape == whole[2]["samples"].shape
    assert [len(c[0][1][SLOTS]) for c in pair] == [2, 2] and SLOTS not in text[0][0][1]
    vision = sum(height * width // 4 for height, width in (r.shape[-2:] for r in pair[0][0][1]["reference_latents"]))
    assert text[0][0][0].shape[1] == pair[0][0][0].shape[1] + vision
    assert torch.equal(subject.staged(preset("both"), *pair), subject.host(*whole[:2]))
    assert torch.equal(subject.staged(preset("mllm_only"), *pair), subject.host(*text[:2]))
    assert subject.staged(preset("paper"), *pair, steps=4).isfinite().all()
    *bare, _ = encode_for_stages(clip, vae, "a fox", "", [None], 96)
    assert torch.equal(subject.staged(preset("mllm_only"), *bare), subject.host(*bare))


def test_references_seen_before_are_not_encoded_again(monkeypatch):
    """Whatever the prompt; tokens and latents are bit for bit those of the host's node, which keeps nothing."""
    skip_what_the_host_lacks("qwen_image21")
    clip, encode, seen = build_clip(monkeypatch, "QwenImage21TEModel"), host.qwen_image21_encoder(), []
    backbone, sockets = BACKBONES["qwen_image21"], [picture(64, 96), picture(96, 64, 1)]
    calls = [("a fox", sockets, 2), ("an owl", sockets, 2), ("", sockets[:1], 2), ("an owl", [picture(64, 96, 2)], 3),
             ("a fox", sockets, 3)]  # fmt: skip
    cold = []
    for prompt, images, _ in calls:
        named = {f"image_{number}": image for number, image in enumerate(images, 1)}
        options = {"images": named, "resolution": 96}
        whole, text = encode(clip, prompt, "", vae=TinyVAE(backbone), **options), encode(clip, prompt, "", **options)
        cold.append([(*one[0], *other[0]) for one, other in zip(whole[:2], text[:2])])
    vae, transformer = TinyVAE(backbone), clip.cond_stage_model.qwen3vl_8b.transformer
    transformer.visual.register_forward_pre_hook(lambda *_: seen.append(1))
    for (prompt, images, count), expected in zip(calls, cold):
        *pair, _ = encode_for_stages(clip, vae, prompt, "", images, 96)
        assert len(seen) == vae.encoded == count and "preprocess_embed" not in vars(transformer)
        for ((tokens, values),), (context, theirs, with_images, _) in zip(pair, expected):
            assert torch.equal(tokens, context) and torch.equal(values[WITH_IMAGES].tokens, with_images)
            assert all(map(torch.equal, values["reference_latents"], theirs["reference_latents"]))
            assert len(values["reference_latents"]) == len(images)


def test_the_node_says_which_host_it_needs(monkeypatch):
    monkeypatch.setattr(qwen_image21, "qwen_image21_encoder", lambda: None)
    with pytest.raises(ValueError, match="expected 0.37 or later"):
        encode_for_stages(None, None, "a fox", "", [], 1024)
