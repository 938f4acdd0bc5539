"""What single DiT families do in their own way: placements a host wants or ignores, and a family without a record."""

import gc
import logging

import comfy_extras.nodes_flux as nodes_flux
import pytest
import torch
from subject_dla.loaders.dit import context_width
from subject_dla.loaders.reference_latents import add_identity, reference_method
from subject_dla.sampling.patch import PREDICT_NOISE
from subject_dla.sampling.stages import Keyframe, Stages, preset
from subject_dla.tests.host.test_parity import Subject, check_identities, skip_what_the_host_lacks
from subject_dla.tests.host.test_regions import (
    LEFT,
    MASKS,
    REGIONS,
    SOFT,
    STRENGTHS,
    context_of,
    dense,
    textbook,
    with_settings,
)
from subject_dla.tests.host.test_subject_conditioning import TinyVAE, picture
from subject_dla.tests.small.dit import load, tiny, tiny_flux

METHOD = "reference_latents_method"
KLEIN = {  # context width, and sizes other than FLUX.2 dev's
    "4B": dict(context_in_dim=7680, hidden_size=3072, num_heads=24, guidance_embed=False),
    "9B": dict(context_in_dim=12288, hidden_size=4096, num_heads=32, guidance_embed=False),
}


def tiny_subject(family, **sizes):
    skip_what_the_host_lacks(family)
    return Subject(family, tiny(family, **sizes))


def test_krea_2_reads_references_only_with_a_placement_and_is_refused_without_one():
    subject = tiny_subject("krea2")
    bare, full = subject.condition(9, 2, False), subject.condition(9, 2)
    without = with_settings(full, **{METHOD: None})
    assert torch.equal(subject.host(without, without, cfg=1.0), subject.host(bare, bare, cfg=1.0))  # as the host does
    for name in ("both", "two_stage"):
        with pytest.raises(ValueError, match="Krea 2 reads reference latents only.*positive.*index_timestep_zero"):
            subject.staged(preset(name), without, None, cfg=1.0)
    expected = subject.host(bare, bare, cfg=1.0)
    assert torch.equal(subject.staged(preset("mllm_only"), without, None, cfg=1.0), expected)
    subject.model = subject.model.clone()  # as the host's FluxKVCache does
    subject.model.add_object_patch("diffusion_model.default_ref_method", "index_timestep_zero")
    assert torch.equal(subject.staged(preset("both"), without, None, cfg=1.0), subject.host(full, full, cfg=1.0))


def test_krea_2_takes_both_placements_and_auto_is_its_workflows():
    subject = tiny_subject("krea2")
    assert reference_method(subject.model, "auto") == "index_timestep_zero"
    pictures = []
    for method in ("index", "index_timestep_zero"):
        full = with_settings(subject.condition(9, 2), **{METHOD: reference_method(subject.model, method)})
        pictures.append(subject.host(full, full, cfg=1.0))
        assert torch.equal(subject.staged(preset("both"), full, None, cfg=1.0), pictures[-1])
    assert not torch.equal(*pictures)
    with pytest.raises(ValueError, match="does not know the placement 'offset'"):
        reference_method(subject.model, "offset")


def test_mage_flow_places_by_index_whatever_is_set():
    subject = tiny_subject("mage_flow")
    assert reference_method(subject.model, "auto") is None and reference_method(subject.model, "index") == "index"
    full = subject.condition(9, 2)
    named = with_settings(full, **{METHOD: "index"})
    assert torch.equal(subject.host(full, full), subject.host(named, named))


def test_a_family_without_a_record_is_reported_where_references_are_added(monkeypatch, caplog):
    subject = Subject("flux", tiny_flux(24))
    bare = subject.condition(9, 2, False)
    vae = TinyVAE(subject.backbone)
    with caplog.at_level(logging.WARNING):
        add_identity(bare, subject.model, vae, picture(64, 64))
        assert not caplog.records
        monkeypatch.setitem(subject.model.model.model_config.unet_config, "image_model", "flux3")
        out = add_identity(bare, subject.model, vae, picture(64, 64))
    assert len(out[0][1]["reference_latents"]) == 1
    assert "does not know the diffusion model Flux" in caplog.text and "FLUX.2" in caplog.text


@pytest.mark.parametrize("size", KLEIN)
def test_klein_is_flux_2_at_its_own_widths(monkeypatch, size):
    if not hasattr(nodes_flux, "FluxKVCache"):
        pytest.skip("not on this host")
    subject = Subject("flux2", load("flux2", monkeypatch, KLEIN[size]), side=4)
    assert context_width(subject.model) == KLEIN[size]["context_in_dim"]
    check_identities(subject)
    del subject
    gc.collect()


# on FLUX.1, LongCat-Image and FLUX.2 dev 0.33.0 itself fails with this cache and two conditions in a batch
@pytest.fixture(scope="module", params=["flux2", "krea2"])
def cached(request):
    """A subject on a model with the host's cache of the references' keys and values, and on one without."""
    if not hasattr(nodes_flux, "FluxKVCache"):
        pytest.skip("not on this host")
    klein = {"guidance_embed": False, "depth_single_blocks": 1} if request.param == "flux2" else {}
    subject, plain = tiny_subject(request.param, **klein), tiny_subject(request.param, **klein)
    subject.model = nodes_flux.FluxKVCache.execute(plain.model).result[0]
    return subject, plain


def pair_of(subject):
    """Positive and negative, with the placement that the cache sets."""
    return [with_settings(subject.condition(9, seed), **{METHOD: "index_timestep_zero"}) for seed in (2, 3)]


@pytest.mark.parametrize("batch", [1, 3])
def test_with_the_kv_cache_strength_1_is_the_hosts_picture_and_0_the_one_without(cached, batch):
    subject, plain = cached
    pair, bare = pair_of(subject), [subject.condition(9, seed, False) for seed in (2, 3)]
    whole = subject.host(*pair, batch=batch, steps=4)
    assert torch.equal(subject.staged(preset("both"), *pair, batch=batch, steps=4), whole)
    assert not torch.equal(plain.host(*pair, batch=batch, steps=4), whole)  # what the cache keeps is not exact
    without = subject.staged(preset("mllm_only"), *pair, batch=batch, steps=4)
    assert torch.equal(without, plain.host(*bare, batch=batch, steps=4))
    off = [subject.staged(preset("vae_only"), *pair_of(subject), batch=batch, steps=4)]
    other = [with_settings(subject.condition(n, 30 + n), **{METHOD: "index_timestep_zero"}) for n in (6, 4)]
    off.append(subject.staged(preset("vae_only"), *other, batch=batch, steps=4))
    assert torch.equal(*off)


@pytest.mark.parametrize("batch", [1, 3])
def test_strengths_masks_and_regions_with_the_kv_cache_are_textbook_attention(cached, batch):
    """Where the references' keys come from the cache, there are no queries of theirs."""
    subject, _ = cached
    settings = {STRENGTHS: [0.5, 1.5], MASKS: [SOFT.T.contiguous(), None], REGIONS: [LEFT, SOFT]}
    bare = pair_of(subject)
    pair = [with_settings(c, **settings) for c in bare]
    ours = subject.staged(Stages((Keyframe(1, 0.6, 1),)), *pair, batch=batch, steps=4)
    bias = dense(subject, context_of(subject, 9), [LEFT, SOFT], (0.6, 0.5, 1.5), settings[MASKS])
    plain, subject.model = subject.model, textbook(subject.model, {(i, len(bias)): bias for i in (0, 1)})
    theirs = subject.host(*bare, batch=batch, steps=4)
    subject.model = plain
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_the_keys_that_are_kept_are_those_of_the_stage(cached):
    """A stage of one step reads nothing of the cache."""
    subject, plain = cached
    pair = pair_of(subject)
    for first, second in (((1, 0), (1, 1)), ((1, 1), (1, 0.5)), ((1, 0.5), (0, 1)), ((0.5, 1), (1, 1))):
        stages = Stages((Keyframe(0, *first), Keyframe(0.5, *second)), "steps")
        ours, theirs = (s.staged(stages, *pair, steps=2) for s in (subject, plain))
        assert torch.equal(ours, theirs)
    calls, kept = [], subject.model.model_options["transformer_options"]["patches"]["attn1_patch"][0]

    def counted(executor, *args, **kwargs):
        calls.append(len(kept.cache))
        return executor(*args, **kwargs)

    subject.model.add_wrapper_with_key(PREDICT_NOISE, "counted", counted)
    subject.staged(Stages((Keyframe(0, 1, 1), Keyframe(0.5, 1, 0.5)), "steps"), *pair, steps=4)
    assert [count > 0 for count in calls] == [False, True, False, True]
