"""What single DiT families do in their own way: placements a host wants or ignores, and a family without a record."""

import gc
import logging
from math import log
from types import SimpleNamespace

import comfy_extras.nodes_flux as nodes_flux
import pytest
import torch
from comfy.ldm.chroma.model import Chroma
from comfy.ldm.flux.model import Flux
from subject_dla.loaders import reference_latents
from subject_dla.loaders.backbones import pixel_family
from subject_dla.loaders.dit import context_width
from subject_dla.loaders.host import reads_references
from subject_dla.loaders.reference_latents import add_identity, reference_method
from subject_dla.nodes.encode import SubjectAddIdentity
from subject_dla.nodes.sample import SubjectImageGuidance, SubjectStagedGuider
from subject_dla.nodes.stages import SubjectApplyStages
from subject_dla.sampling import patch
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
    token_weights,
    with_settings,
)
from subject_dla.tests.host.test_subject_conditioning import TinyVAE, picture
from subject_dla.tests.small.dit import FAMILIES, load, tiny, tiny_chroma, tiny_flux
from subject_dla.training.dit.frozen import FrozenDiT

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


def test_where_the_host_counts_the_references_tokens_it_is_believed():
    """Krea 2 reads one frame's number of tokens of a reference that has two."""
    subject = tiny_subject("krea2")
    latents = [torch.cat((one, one + 1), 2) for one in subject.condition(9, 2)[0][1]["reference_latents"]]
    bare = [with_settings(subject.condition(9, seed), reference_latents=latents) for seed in (2, 3)]
    settings = {STRENGTHS: [0.5, 1.5], MASKS: [SOFT.T.contiguous(), None], REGIONS: [LEFT, SOFT]}
    ours = subject.staged(preset("both"), *(with_settings(c, **settings) for c in bare))
    bias = dense(subject, 9, [LEFT, SOFT], (1, 0.5, 1.5), settings[MASKS])
    subject.model = textbook(subject.model, {(i, len(bias)): bias for i in (0, 1)})
    theirs = subject.host(*bare)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_mage_flow_places_by_index_whatever_is_set():
    subject = tiny_subject("mage_flow")
    assert reference_method(subject.model, "auto") is None and reference_method(subject.model, "index") == "index"
    full = subject.condition(9, 2)
    named = with_settings(full, **{METHOD: "index"})
    assert torch.equal(subject.host(full, full), subject.host(named, named))


@pytest.mark.shows("detected", found="reported", family="unknown")
def test_a_family_without_a_record_is_reported_where_references_are_added(monkeypatch, caplog):
    subject = Subject("flux", tiny_flux(24))
    bare = subject.condition(9, 2, False)
    vae = TinyVAE(subject.backbone)
    with caplog.at_level(logging.WARNING):
        add_identity(bare, subject.model, vae, picture(64, 64))
        assert not caplog.records
        monkeypatch.setitem(subject.model.model.model_config.unet_config, "image_model", "nameless")
        out = add_identity(bare, subject.model, vae, picture(64, 64))
    assert len(out[0][1]["reference_latents"]) == 1
    assert "does not know the diffusion model Flux" in caplog.text and "FLUX.2" in caplog.text


@pytest.mark.shows("detected", found="reported", family="reads none")
def test_a_model_that_reads_no_references_is_reported_too(monkeypatch, caplog):
    assert not reads_references(Chroma.__new__(Chroma)) and reads_references(Flux.__new__(Flux))
    subject = Subject("flux", tiny_flux(24))
    bare, full = subject.condition(9, 2, False), subject.condition(9, 2)
    for module in (reference_latents, patch):
        monkeypatch.setattr(module, "reads_references", lambda model: False)
    with caplog.at_level(logging.WARNING):
        add_identity(bare, subject.model, TinyVAE(subject.backbone), picture(64, 64))
        assert "Flux, as this ComfyUI runs it, does not read reference latents" in caplog.text
        caplog.clear()
        subject.staged(preset("both"), bare, None, cfg=1.0)
        assert not caplog.records
        subject.staged(preset("both"), full, None, cfg=1.0)
        assert "Staged Sampler: the diffusion model Flux" in caplog.text


@pytest.fixture(params=["unknown", "reads none"])
def foreign(request, monkeypatch):
    """A subject on a model of no family of ours: the host's FLUX.1 by another name, or Chroma."""
    subject = Subject("flux", tiny_flux(24))
    if request.param == "unknown":
        monkeypatch.setitem(subject.model.model.model_config.unet_config, "image_model", "nameless")
    else:
        subject.model = tiny_chroma()
    return subject


@pytest.mark.shows("parity both", "context off", "references off")
def test_other_families_run_with_strengths_0_and_1(foreign):
    check_identities(foreign, reads_references=reads_references(foreign.model.model.diffusion_model))


@pytest.mark.shows("strengths", "regions", "trains", found="refused")
def test_other_families_have_no_strengths_between_regions_or_training(foreign):
    full = foreign.condition(9, 2)
    regions = with_settings(full, **{REGIONS: [LEFT, None]})
    for stages, positive in ((Stages((Keyframe(1, 0.5, 1),)), full), (preset("both"), regions)):
        with pytest.raises(ValueError, match="token layout"):
            foreign.staged(stages, positive, None)
    with pytest.raises(ValueError, match="Training needs FLUX.1"):
        FrozenDiT(foreign.model)


@pytest.mark.shows("detected", "parity both", "context off", "references off", family="klein")
@pytest.mark.parametrize("size", KLEIN)
def test_klein_is_flux_2_at_its_own_widths(monkeypatch, size):
    if not hasattr(nodes_flux, "FluxKVCache"):
        pytest.skip("not on this host")
    subject = Subject("flux2", load("flux2", monkeypatch, KLEIN[size]), side=4)
    assert context_width(subject.model) == KLEIN[size]["context_in_dim"]
    check_identities(subject)
    del subject
    gc.collect()


# The host's cache of the references' keys and values, and a placement that it is used with: on FLUX.1, LongCat-Image
# and FLUX.2 dev 0.33.0 itself fails with index_timestep_zero and two conditions in a batch.
CACHED = dict.fromkeys(("klein", "krea2", "qwen_image", "mage_flow"), "index_timestep_zero")
CACHED |= dict.fromkeys(("flux", "flux2", "longcat_image"), "index")
UNCACHED = [name for name in FAMILIES if name not in (*CACHED, "qwen_image21")]  # which has one of its own


def kv_cached(model):
    if not hasattr(nodes_flux, "FluxKVCache"):
        pytest.skip("not on this host")
    return nodes_flux.FluxKVCache.execute(model).result[0]


@pytest.fixture(scope="module", params=CACHED)
def cached(request):
    """A subject on a model with that cache, and on one without."""
    family, sizes = request.param, {}
    if family == "klein":
        family, sizes = "flux2", {"guidance_embed": False, "depth_single_blocks": 1}
    subject, plain = tiny_subject(family, **sizes), tiny_subject(family, **sizes)
    subject.placement, subject.model = CACHED[request.param], kv_cached(plain.model)
    return subject, plain


def pair_of(subject):
    """Positive and negative, with the placement that the cache is used with."""
    return [with_settings(subject.condition(9, seed), **{METHOD: subject.placement}) for seed in (2, 3)]


@pytest.mark.shows("K/V cache", found="none")
@pytest.mark.parametrize("family", UNCACHED)
def test_the_hosts_kv_cache_changes_nothing_where_a_family_does_not_read_it(family):
    subject = tiny_subject(family)
    pair = [subject.condition(9, seed) for seed in (2, 3)]
    plain = subject.host(*pair)
    subject.model = kv_cached(subject.model)
    assert torch.equal(subject.host(*pair), plain)


@pytest.mark.shows("K/V cache", "parity both", "references off", "context off")
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
    other = [with_settings(subject.condition(n, 30 + n), **{METHOD: subject.placement}) for n in (6, 4)]
    off.append(subject.staged(preset("vae_only"), *other, batch=batch, steps=4))
    assert torch.equal(*off)


@pytest.mark.shows("K/V cache", "strengths", "regions")
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


@pytest.mark.shows("K/V cache")
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


VISION, CAPTIONS = "clip_vision_outputs", "reference_latents_text_embeds"
SEEN = (3, 2), (2, 2)  # rows and columns of SigLIP's tokens of each reference
CAPTION = 7, 4, 6  # tokens; one more than references, which 0.33.0 itself takes only in a batch of one


def omni(subject, seed, captions=3):
    """A condition as Z-Image Omni's encode node makes it."""
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(1, rows * columns, 12, generator=generator) for rows, columns in SEEN]
    sizes = [[(3, rows * 16, columns * 16)] for rows, columns in SEEN]
    outputs = [SimpleNamespace(last_hidden_state=s, image_sizes=size) for s, size in zip(states, sizes)]
    captions = [torch.randn(1, tokens, 24, generator=generator) for tokens in CAPTION[:captions]]
    return with_settings(subject.condition(9, seed), **{VISION: outputs, CAPTIONS: captions})


def without_first(conditioning):
    return [
        [tokens, {key: found[1:] if isinstance(found, list) else found for key, found in values.items()}]
        for tokens, values in conditioning
    ]


@pytest.mark.parametrize("batch, cfg, captions", [(1, 1.0, 3), (3, 2.5, 2)])
def test_z_image_omni_with_siglip_and_captions(batch, cfg, captions):
    subject = tiny_subject("z_image")
    pair, bare = (
        [omni(subject, seed, captions) for seed in (2, 3)],
        [subject.condition(9, seed, False) for seed in (2, 3)],
    )
    run = {"batch": batch, "cfg": cfg}
    whole = subject.host(*pair, **run)
    assert torch.equal(subject.staged(preset("both"), *pair, **run), whole)
    assert not torch.equal(whole, subject.host(*(subject.condition(9, seed) for seed in (2, 3)), **run))
    assert torch.equal(subject.staged(preset("mllm_only"), *pair, **run), subject.host(*bare, **run))
    off = [[with_settings(c, **{CAPTIONS: captions}) for c in pair] for captions in (pair[1][0][1][CAPTIONS], None)]
    pictures = [subject.staged(preset("vae_only"), *conditions, **run) for conditions in off]
    assert torch.equal(*pictures) and not torch.equal(pictures[0], whole)
    gone = [with_settings(c, **{STRENGTHS: [0.0, 1.0]}) for c in pair]
    second = subject.host(*map(without_first, pair), **run)
    assert torch.equal(subject.staged(preset("both"), *gone, **run), second)


@pytest.mark.parametrize("batch, cfg, captions", [(1, 1.0, 3), (3, 2.5, 2)])
def test_z_image_omnis_strengths_masks_and_regions_are_textbook_attention(batch, cfg, captions):
    """SigLIP's tokens of a reference follow its strength, mask and region; so do the blocks that refine the image."""
    subject = tiny_subject("z_image")
    bare = [omni(subject, seed, captions) for seed in (2, 3)]
    masks, regions, strengths = [SOFT.T.contiguous(), None], [LEFT, SOFT], [0.5, 1.5]
    pair = [with_settings(c, **{STRENGTHS: strengths, MASKS: masks, REGIONS: regions}) for c in bare]
    ours = subject.staged(Stages((Keyframe(1, 0.6, 1),)), *pair, batch=batch, cfg=cfg)

    grids = [*SEEN, *((h // 2, w // 2) for h, w in subject.references)]
    context = 10 + 5 + 10 + 10 * (captions == 3)  # 7, 4, 9 and 6 tokens, padded to fives
    columns, readers = [torch.full((context,), log(0.6))], []
    for index, grid in enumerate(grids):
        count, mask, strength = grid[0] * grid[1], masks[index % 2], strengths[index % 2]
        logs = torch.full((count + -count % 5,), log(strength))
        if mask is not None:
            weight = torch.nn.functional.interpolate(mask[None, None], size=grid, mode="area").flatten()
            logs[:count] = (strength * weight).log()
        start = sum(map(len, columns))
        readers.append((index % 2, slice(start, start + len(logs))))
        columns.append(logs)
        if index == 1:
            columns.append(torch.zeros(5))  # the image's own, of padding
    image = slice(sum(map(len, columns)), sum(map(len, columns)) + 16)
    columns.append(torch.zeros(20))
    columns = torch.cat(columns)
    bias = columns.repeat(len(columns), 1)
    for index, span in readers:
        bias[image, span] += token_weights(subject, regions[index]).log()[:, None]
    refined, seen = bias[-45:, -45:], bias[context:-45, context:-45]
    calls = {(i, len(one)): one for one in (bias, refined, seen) for i in (0, 1)}
    assert len(bias) == context + 65 and len(seen) == 20
    subject.model = textbook(subject.model, calls)
    theirs = subject.host(*bare, batch=batch, cfg=cfg)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("sizes", [{}, {"pad_tokens_multiple": 5}])
def test_ming_image_reads_each_frame_of_a_reference_by_itself(sizes):
    """With padding as Ming-Image Layer has it, too; against textbook attention, in the blocks that refine the image."""
    subject = tiny_subject("ming_image", **sizes)
    latents = subject.condition(9, 2)[0][1]["reference_latents"]
    latents[0] = torch.cat((latents[0], latents[0] + 1), 2)
    bare = [with_settings(subject.condition(9, seed), reference_latents=latents) for seed in (2, 3)]
    pair = [with_settings(c, **{STRENGTHS: [0.5, 1.5], MASKS: [SOFT.T.contiguous(), None], REGIONS: [LEFT, SOFT]})
            for c in bare]  # fmt: skip
    ours = subject.staged(Stages((Keyframe(1, 0.6, 1),)), *pair, batch=3)

    grids = [[side // 2 for side in size] for size in subject.references]
    masked = torch.nn.functional.interpolate(SOFT.T[None, None], size=grids[0], mode="area").flatten()
    spans = [torch.full((9 + 8,), log(0.6)), torch.zeros(16), *[(0.5 * masked).log()] * 2]
    spans.append(torch.full((grids[1][0] * grids[1][1],), log(1.5)))
    multiple = sizes.get("pad_tokens_multiple", 1)
    spans[0] = torch.nn.functional.pad(spans[0], (0, -17 % multiple), value=log(0.6))
    spans.append(torch.zeros(-sum(map(len, spans[1:])) % multiple))
    starts = torch.tensor([0, *map(len, spans)]).cumsum(0).tolist()
    bias = torch.cat(spans).repeat(starts[-1], 1)
    for index, region in ((2, LEFT), (3, LEFT), (4, SOFT)):
        weight = token_weights(subject, region).log()[:, None]
        bias[starts[1] : starts[2], starts[index] : starts[index + 1]] += weight
    refined = bias[starts[1] :, starts[1] :]
    subject.model = textbook(subject.model, {(i, len(one)): one for one in (bias, refined) for i in (0, 1)})
    theirs = subject.host(*bare, batch=3)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def named_flux3(model, where):
    """The host's FLUX.1 under a name of FLUX 3, in one of the places where a host may have it."""
    host = model.model
    if where == "config":
        host.model_config.unet_config["image_model"] = "flux3"
    elif where == "class of the config":
        host.model_config.__class__ = type("Flux3Klein", (type(host.model_config),), {})
    elif where == "class":
        host.__class__ = type("Flux3", (type(host),), {})
    else:
        module = host.diffusion_model
        names = {"name": ("Flux3", type(module).__module__), "module": ("Model", "comfy.ldm.flux_3.model")}[where]
        module.__class__ = type(names[0], (type(module),), {"__module__": names[1]})
    return model


@pytest.fixture(params=["config", "class of the config", "class", "name", "module"])
def flux3(request):
    subject = Subject("flux", tiny_flux(24))
    named_flux3(subject.model, request.param)
    return subject


REFUSED = "FLUX 3 .* is refused.*source of it could not be read"


@pytest.mark.shows("detected", "context off", "references off", "strengths", family="flux3", found="refused")
@pytest.mark.parametrize("name", ["mllm_only", "vae_only", "semantics_first", "half"])
def test_flux_3_is_refused_before_sampling_by_every_node_that_stages(flux3, name):
    stages = Stages((Keyframe(1, 0.5, 1),)) if name == "half" else preset(name)
    full = flux3.condition(9, 2)
    with pytest.raises(ValueError, match=REFUSED):
        SubjectApplyStages.execute(flux3.model, "both", "flow_time", 0.9, 0.8, stages=stages)
    with pytest.raises(ValueError, match=REFUSED):
        SubjectStagedGuider.execute(flux3.model, full, stages, 1.0)
    with pytest.raises(ValueError, match=REFUSED):
        flux3.staged(stages, full, None, cfg=1.0)
    with pytest.raises(ValueError, match=REFUSED):
        SubjectImageGuidance.execute(flux3.model, 1.5)
    with pytest.raises(ValueError, match="Training needs FLUX.1"):
        FrozenDiT(flux3.model)


@pytest.mark.shows("parity both", family="flux3")
def test_flux_3_with_all_on_is_the_hosts_picture(flux3):
    full = flux3.condition(9, 2)
    expected = flux3.host(full, full)
    assert torch.equal(flux3.host(full, full, stages=preset("both")), expected)
    assert torch.equal(flux3.staged(preset("both"), full, full), expected)


@pytest.mark.shows("regions", "strengths", "trains", family="flux3", found="refused")
def test_references_of_flux_3_come_from_the_hosts_nodes(flux3):
    with pytest.raises(ValueError, match=REFUSED + ".*ComfyUI's own nodes"):
        SubjectAddIdentity.execute(
            flux3.condition(9, 2, False), flux3.model, TinyVAE(flux3.backbone), picture(64, 64), strength=1.0
        )
    for settings in ({STRENGTHS: [0.5, 1.0]}, {REGIONS: [LEFT, None]}):
        with pytest.raises(ValueError, match=REFUSED):
            flux3.staged(preset("both"), with_settings(flux3.condition(9, 2), **settings), None, cfg=1.0)
    with pytest.raises(ValueError, match="Training needs FLUX.1"):
        FrozenDiT(flux3.model)


@pytest.mark.parametrize("name, title", [("HiDreamO1", "HiDream-O1"), ("SenseNovaU15", "SenseNova")])
def test_families_that_read_pixels_have_no_vae_tokens_to_add(name, title, monkeypatch, caplog):
    subject = Subject("flux", tiny_flux(24))
    bare, full = subject.condition(9, 2, False), subject.condition(9, 2)
    model = SimpleNamespace(model=type(name, (), {"diffusion_model": subject.model.model.diffusion_model})())
    with pytest.raises(ValueError, match=f"{title} reads reference images as patches of pixels and has no VAE"):
        add_identity(bare, model, TinyVAE(subject.backbone), picture(64, 64))
    assert pixel_family(subject.model) is None
    monkeypatch.setattr(patch, "pixel_family", lambda model: title)
    subject.staged(preset("semantics_first"), full, None, cfg=1.0)
    assert f"Staged Sampler: {title} reads reference images as patches of pixels" in caplog.text


@pytest.mark.parametrize("key", ["conditioning_llama3", "text_input_ids"])
def test_a_prompt_that_is_read_beside_the_context_is_not_left_half_on(key, monkeypatch):
    """As HiDream's from Llama, of a family without a record."""
    subject = Subject("flux", tiny_flux(24))
    pair = [with_settings(subject.condition(9, seed), **{key: torch.zeros(1, 3)}) for seed in (2, 3)]
    assert subject.staged(preset("vae_only"), *pair).isfinite().all()  # FLUX.1 does not read it
    monkeypatch.setitem(subject.model.model.model_config.unet_config, "image_model", "hidream")
    assert subject.staged(preset("semantics_first"), *pair).isfinite().all()
    with pytest.raises(ValueError, match=f"stage without MLLM tokens.*reads the prompt .*from {key}.*semantics_first"):
        subject.staged(preset("vae_only"), *pair)
