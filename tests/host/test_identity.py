"""Reference images, and their latents: size, crop, placement, what travels beside them, against the host's encoding."""

import sys
from types import SimpleNamespace

import comfy.sd
import pytest
import torch
from subject_dla.loaders import reference_latents
from subject_dla.loaders.backbones import BACKBONES
from subject_dla.loaders.images import collect_images
from subject_dla.loaders.reference_latents import add_identity, reference_size, report_placement, resize
from subject_dla.nodes.encode import SubjectAddIdentity
from subject_dla.tests.host.test_parity import skip_what_the_host_lacks
from subject_dla.tests.small.dit import tiny, tiny_flux
from subject_dla.tests.small.models import host_shapes, random_like

WIDTH = 24


@pytest.fixture(scope="module")
def model():
    return tiny_flux(WIDTH)


@pytest.fixture(scope="module")
def vae():
    """A random VAE in the layout of TAEF1, through the host's own detection."""
    shapes = host_shapes("comfy.taesd.taesd", "TAESD", {"latent_channels": 16})
    return comfy.sd.VAE(sd=random_like(shapes, torch.float32))


def condition(**values):
    return [[torch.zeros(1, 3, WIDTH), {"pooled_output": None, **values}]]


def picture(height, width, count=1, seed=0):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width, height, size, uno, expected", [
    (1024, 768, 0, True, (512, 384)), (400, 300, 0, True, (512, 384)),  # UNO: longest side 512, also enlarged to it
    (300, 200, 0, False, (288, 192)),  # elsewhere nothing is enlarged, edges are cut to whole tokens
    (2048, 2048, 0, False, (1024, 1024)), (4000, 1000, 0, False, (2048, 512)),  # at most one megapixel
    (1000, 500, 640, False, (640, 320)),  # an asked-for longest side
    (3000, 40, 512, True, (512, 16)),  # never less than one token
])  # fmt: skip
def test_size_keeps_the_aspect_ratio(width, height, size, uno, expected):
    assert reference_size(width, height, size, uno) == expected


def test_a_picture_that_fits_is_encoded_as_the_host_encodes_it(model, vae):
    image = picture(64, 48)
    out = add_identity(condition(), model, vae, image, size=64)[0][1]
    assert vae.encode(image).isfinite().all() and torch.equal(out["reference_latents"][0], vae.encode(image))
    assert out["reference_latents_method"] == "uxo"
    assert out["subject_reference_strengths"] == [1.0] and out["subject_reference_masks"] == [None]


def test_nothing_is_stretched(model, vae):
    """A disc stays a disc: resized evenly and cut, width and height of its box stay equal."""
    y, x = torch.meshgrid(torch.arange(300.0), torch.arange(500.0), indexing="ij")
    disc = (((x - 250) ** 2 + (y - 150) ** 2) < 100**2).float()[None].repeat(3, 1, 1)
    out = resize(disc, 240, 144)[0] > 0.5
    rows, columns = out.any(1).sum(), out.any(0).sum()
    assert abs(int(rows) - int(columns)) <= 1 and out.shape == (144, 240)


def test_references_add_up_and_stay_aligned_with_those_of_other_nodes(model, vae):
    foreign = torch.zeros(1, 16, 4, 4)
    first = add_identity(condition(reference_latents=[foreign]), model, vae, picture(64, 64, 2), strength=0.5, size=64)
    mask = torch.zeros(1, 32, 32)
    mask[:, 16:] = 1
    values = add_identity(first, model, vae, picture(32, 64), mask, strength=0.25, size=64)[0][1]
    assert values["reference_latents"][0] is foreign and len(values["reference_latents"]) == 4
    assert values["subject_reference_strengths"] == [1.0, 0.5, 0.5, 0.25]
    masks = values["subject_reference_masks"]
    assert masks[:3] == [None] * 3 and masks[3].shape == (32, 64) and masks[3][0].max() == 0 and masks[3][-1].min() == 1
    assert len(first[0][1]["reference_latents"]) == 3  # what the user had is untouched


def test_each_picture_has_its_region_or_all_have_one(model, vae):
    regions = torch.rand(2, 20, 30)
    for given, expected in ((regions, [*regions]), (regions[0], [regions[0]] * 2), (None, [None] * 2)):
        values = add_identity(condition(), model, vae, picture(64, 64, 2), size=64, region=given)[0][1]
        found = values["subject_reference_regions"]
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("change, words", [
    (dict(image=torch.zeros(1, 1, 1, 3)), ["1"]), (dict(image=torch.zeros(1, 64, 64, 4)), ["4", "alpha"]),
    (dict(image=torch.full((1, 64, 64, 3), float("nan"))), ["NaN"]),
    (dict(image=torch.zeros(11, 64, 64, 3)), ["11", "10"]),
    (dict(mask=torch.zeros(1, 64, 64)), ["mask is black", "invert"]),
    (dict(image=picture(64, 64, 3), mask=torch.ones(2, 64, 64)), ["2 masks", "3 images"]),
    (dict(region=torch.zeros(1, 64, 64)), ["region is black", "invert"]),
    (dict(image=picture(64, 64, 3), region=torch.ones(2, 64, 64)), ["2 regions", "3 images"]),
    (dict(mask=torch.full((1, 64, 64), torch.nan)), ["mask holds", "NaN"]),
    (dict(region=torch.full((1, 64, 64), torch.inf)), ["region holds", "infinite"]),
    (dict(strength=float("nan")), ["strength is nan", ">= 0"]), (dict(strength=-1.0), ["strength is -1", ">= 0"]),
    (dict(placement="nowhere"), ["nowhere", "silently"]),
    (dict(placement="Qwen-Image-Edit 2511"), ["Qwen-Image-Edit 2511", "silently"]),  # another family's
])  # fmt: skip
def test_bad_references_are_refused_in_words(model, vae, change, words):
    given = dict(image=picture(64, 64), size=64) | change
    with pytest.raises(ValueError) as error:
        add_identity(condition(), model, vae, **given)
    assert all(word.lower() in str(error.value).lower() for word in words), error.value


def test_omnigen2_takes_five(model, vae, monkeypatch):
    monkeypatch.setattr("subject_dla.loaders.reference_latents.backbone_of", lambda m: BACKBONES["omnigen2"])
    with pytest.raises(ValueError, match="at most 5.*makes 6"):
        add_identity(condition(), model, vae, picture(64, 64, 6), size=64)
    with pytest.raises(ValueError, match="OmniGen2 places references itself"):
        add_identity(condition(), model, vae, picture(64, 64), size=64, placement="uxo")


@pytest.mark.parametrize("choice, method", [("UNO, USO", "uxo"), ("Kontext", "offset"), ("auto", "uxo")])
def test_a_choice_by_the_models_name_is_its_placement(model, vae, choice, method):
    out, expected = (
        add_identity(condition(), model, vae, picture(64, 64), placement=p)[0][1] for p in (choice, method)
    )
    assert out["reference_latents_method"] == method
    assert torch.equal(out["reference_latents"][0], expected["reference_latents"][0])


KONTEXT, USO = "flux1-dev-kontext_fp8_scaled.safetensors", "uso-flux1-dit-lora-v1.safetensors"
EDIT = "qwen_image_edit_{}_fp8mixed.safetensors"


@pytest.mark.parametrize("family, method, files, wanted", [
    ("flux", "uxo", [KONTEXT], [(KONTEXT, "offset or index", "'Kontext'")]), ("flux", "offset", [KONTEXT], []),
    ("flux", "index", ["Flux/fluxKontext_v1.gguf"], []),
    ("flux", "index_timestep_zero", [KONTEXT], [(KONTEXT, "offset", "index_timestep_zero")]),
    ("flux", "offset", ["flux1-dev.safetensors", USO], [(USO, "is for uxo", "'UNO, USO'")]),
    ("flux", "index", ["UNO/dit_lora.safetensors"], [("UNO/dit_lora", "is for uxo", "get index")]),
    ("flux", "uxo", [USO, "flux1-dev.safetensors"], []),
    ("flux", "offset", ["flux1-dev-unofficial.safetensors", "musou.safetensors"], []),
    ("flux2", "offset", [USO], []), ("qwen_image", None, [EDIT.format(2509), USO], []),
    ("qwen_image", None, [EDIT.format(2511)], [("2511_fp8", "is for index_timestep_zero", "2511'")]),
    ("qwen_image", "index_timestep_zero", [EDIT.format(2511)], []),
])  # fmt: skip
def test_a_file_whose_name_wants_another_placement_is_reported(monkeypatch, caplog, family, method, files, wanted):
    skip_what_the_host_lacks(family)
    sent = []
    server = SimpleNamespace(client_id="me", send_progress_text=lambda *text, sid: sent.append((*text, sid)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    values = {"reference_latents": [torch.zeros(1, 16, 4, 4)]} | (
        {"reference_latents_method": method} if method else {}
    )
    report_placement(tiny(family), condition(**values), files, "7")
    ((text, node, client),) = sent
    assert (node, client) == ("7", "me") and text.startswith(f"Placement: {method or ''}")
    assert len(caplog.messages) == len(wanted) == text.count("Warning")
    for message, words in zip(caplog.messages, wanted):
        assert all(word in message and word in text for word in words), message
    report_placement(tiny(family), condition(), files, "7")
    assert len(sent) == 1  # there is no reference


@pytest.mark.parametrize("reads, words", [(True, "does not know the diffusion model Flux"), (False, "does not read")])
def test_what_is_not_known_of_a_family_is_shown_on_the_node(monkeypatch, reads, words):
    sent = []
    monkeypatch.setattr(reference_latents, "show_on_node", lambda *text: sent.append(text))
    monkeypatch.setattr(reference_latents, "reads_references", lambda module: reads)
    model = tiny("flux")
    monkeypatch.setitem(model.model.model_config.unet_config, "image_model", "nameless")
    report_placement(model, condition(reference_latents=[torch.zeros(1, 16, 4, 4)]), [KONTEXT], "7")
    ((text, node),) = sent
    assert node == "7" and words in text
    assert text.startswith(("Placement: offset\nWarning: ", "Placement: the model's own\nWarning: "))  # ≤ 0.3.64


def test_a_2511_file_that_tells_the_host_its_placement_needs_no_choice(caplog, monkeypatch):
    model = tiny("qwen_image")
    monkeypatch.setattr(model.model.diffusion_model, "default_ref_method", "index_timestep_zero", raising=False)
    report_placement(model, condition(reference_latents=[torch.zeros(1, 16, 4, 4)]), [EDIT.format(2511)])
    assert not caplog.text


def test_the_node_reads_the_names_off_the_queued_graph(model, vae, caplog, monkeypatch):
    graph = {
        "1": {"inputs": {"unet_name": KONTEXT, "weight_dtype": "default"}},
        "2": {"inputs": {"model": ["1", 0], "lora_name": "style.safetensors", "strength_model": 1.0}},
        "9": {"inputs": {"model": ["2", 0], "placement": "auto"}},
    }
    hidden = SimpleNamespace(prompt=graph, unique_id="9")
    monkeypatch.setattr(SubjectAddIdentity, "hidden", hidden)
    given = condition(), model, vae, picture(64, 64)
    (out,) = SubjectAddIdentity.execute(*given).result
    assert out[0][1]["reference_latents_method"] == "uxo"  # auto does not follow a name: saved workflows keep theirs
    assert KONTEXT in caplog.text and "get uxo" in caplog.text
    caplog.clear()
    SubjectAddIdentity.execute(*given, placement="Kontext")
    assert not caplog.text


def test_a_batch_is_several_references_and_order_is_kept():
    first, second = picture(40, 60, 2), picture(80, 30)
    images = collect_images(first, None, second)
    assert [tuple(image.shape) for image in images] == [(40, 60, 3), (40, 60, 3), (80, 30, 3)]
    assert torch.equal(images[1], first[1]) and torch.equal(images[2], second[0])
    assert collect_images(None, required=False) == []
    assert len(collect_images(picture(28, 28, 10))) == 10
    assert collect_images(picture(30, 30).half())[0].dtype == torch.float32


@pytest.mark.parametrize("sockets, words", [
    ((None, None), ["No reference image", "image_1"]), ((None, picture(1, 1)), ["image_2", "1 x 1 px", "28"]),
    ((picture(30, 30, 8), picture(30, 30, 3)), ["11 reference images", "10"]),
    ((torch.rand(1, 30, 30, 4),), ["image_1", "4 channels", "SplitImageWithAlpha"]),
    ((torch.rand(1, 30, 30, 1),), ["image_1", "greyscale"]), ((torch.rand(1, 30, 30, 2),), ["image_1", "2 channels"]),
    ((torch.full((1, 30, 30, 3), torch.nan),), ["image_1", "2700 values", "NaN"]),
    ((torch.cat((picture(30, 30), picture(30, 30) / 0)),), ["image_1", "number 2", "infinite"]),
    ((picture(30, 30) * 255,), ["image_1", "255", "0 to 1"]), ((picture(28, 6000),), ["image_1", "6000 x 28", "Crop"]),
    ((torch.rand(1, 30, 30),), ["image_1", "(1, 30, 30)", "MaskToImage"]),
])  # fmt: skip
def test_each_bad_image_has_its_own_error(sockets, words):
    with pytest.raises(ValueError) as error:
        collect_images(*sockets)
    assert all(word in str(error.value) for word in words), error.value
