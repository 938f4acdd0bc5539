"""What single DiT families do in their own way: placements a host wants or ignores, and a family without a record."""

import logging

import pytest
import torch
from subject_dla.loaders.reference_latents import add_identity, reference_method
from subject_dla.sampling.stages import preset
from subject_dla.tests.host.test_parity import Subject, skip_what_the_host_lacks
from subject_dla.tests.host.test_regions import with_settings
from subject_dla.tests.host.test_subject_conditioning import TinyVAE, picture
from subject_dla.tests.small.dit import tiny, tiny_flux

METHOD = "reference_latents_method"


def tiny_subject(family):
    skip_what_the_host_lacks(family)
    return Subject(family, tiny(family))


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
