"""Subject Conditioning gives bit for bit what the chain of single nodes gives, and a latent that the model samples."""

import asyncio

import comfy.sample
import pytest
import torch
from subject_dla.dla import DLAConfig, DualLayerAggregator
from subject_dla.loaders.backbones import BACKBONES
from subject_dla.loaders.dla import DLA
from subject_dla.loaders.host import fit_latent
from subject_dla.loaders.mllm.huggingface import load_folder
from subject_dla.loaders.subject_conditioning import canvas_size
from subject_dla.nodes import SubjectExtension
from subject_dla.tests.small.dit import FAMILIES, TinyVAE, on_this_host, tiny
from subject_dla.tests.small.mllm import build_qwen25vl

NODES = {node.__name__: node for node in asyncio.run(SubjectExtension().get_node_list())}
WIDTH = 64  # of the MLLM
CONTEXT = {"flux": 24, "longcat_image": 3584, "flux2": 24, "qwen_image": 24, "omnigen2": 24, "krea2": 24,
           "mage_flow": 2560, "joyimage": 24, "boogu": 24, "z_image": 24}  # fmt: skip
STOCK = {"qwen_image": {"joint_attention_dim": WIDTH}, "flux2": {"context_in_dim": WIDTH}}  # without a DLA


@pytest.fixture(scope="module")
def mllm(tmp_path_factory):
    return load_folder(build_qwen25vl(tmp_path_factory.mktemp("one-node") / "qwen", width=WIDTH, dtype=torch.float32))


def make_dla(mllm, family):
    config = DLAConfig(mllm.info, CONTEXT[family], family, heads=4)
    torch.manual_seed(3)
    module = DualLayerAggregator(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return DLA(config, module.state_dict(), "tiny.safetensors")


def picture(height, width, seed=0, count=1):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


IMAGES = {"image_1": picture(96, 64), "image_3": picture(64, 80, 1, count=2)}
MASKS = {"mask_3": torch.ones(1, 64, 80).triu(), "region_1": torch.ones(1, 8, 8).tril()}


def chain(model, vae, mllm, prompt, images, masks=MASKS, dla=None, pooled_from=None, read=True, **reference):
    """The single nodes, as the shared workflows connect them."""
    (features,) = NODES["SubjectEncode"].execute(mllm, prompt, dla=dla, **images if read else {}).result
    (out,) = NODES["SubjectAggregateLayers"].execute(features, dla, pooled_from=pooled_from).result
    for name, image in images.items():
        mask, region = (masks.get(name.replace("image", kind)) for kind in ("mask", "region"))
        (out,) = NODES["SubjectAddIdentity"].execute(out, model, vae, image, mask, region=region, **reference).result
    return out


def assert_same(found, expected):
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for pair in zip(found, expected):
            assert_same(*pair)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    else:
        assert found == expected


CASES = [*((family, True) for family in FAMILIES), *((family, False) for family in STOCK)]


@pytest.mark.parametrize("family, with_dla", CASES, ids=lambda value: {True: "dla", False: "stock"}.get(value, value))
def test_it_is_the_chain_of_single_nodes_and_samples(mllm, family, with_dla):
    if not on_this_host(family):
        pytest.skip("not on this host")
    model = tiny(family, **({} if with_dla else STOCK[family]))
    vae, dla = TinyVAE(BACKBONES[family]), make_dla(mllm, family) if with_dla else None
    pooled = [[torch.zeros(1, 1, 1), {"pooled_output": torch.full((1, 8), 0.5)}]] if family == "flux" else None
    reference = {"strength": 0.5, "size": 64}
    one = NODES["SubjectConditioning"].execute(
        model, vae, mllm, "a (red:1.3) fox", "", dla=dla, pooled_from=pooled, width=64, height=48, batch_size=2,
        **IMAGES, **MASKS, **reference,
    )  # fmt: skip
    positive, negative, latent = one.result
    assert vae.encoded == 3  # once for both
    assert_same(positive, chain(model, vae, mllm, "a (red:1.3) fox", IMAGES, dla=dla, pooled_from=pooled, **reference))
    # a stock model's negative is read with the images, a DLA's alone: what the shared workflows do
    assert_same(negative, chain(model, vae, mllm, "", IMAGES, dla=dla, read=not with_dla, **reference))
    assert not torch.equal(positive[0][0][:, -3:], negative[0][0][:, -3:])

    family = BACKBONES[family]  # the host's empty latents have no frames: its sampling puts them in
    theirs = torch.zeros(2, family.latent_channels, 48 // family.latent_downscale, 64 // family.latent_downscale)
    assert_same(latent["samples"], fit_latent(model, {"samples": theirs}))
    noise = comfy.sample.prepare_noise(latent["samples"], 7)
    out = comfy.sample.sample(
        model, noise, 1, 2.0, "euler", "simple", positive, negative, latent["samples"], disable_pbar=True, seed=7
    )
    assert out.shape == latent["samples"].shape and out.isfinite().all()


def test_without_images_and_negative(mllm):
    model, vae = tiny("qwen_image", **STOCK["qwen_image"]), TinyVAE(BACKBONES["qwen_image"])
    positive, negative, latent = (
        NODES["SubjectConditioning"].execute(model, vae, mllm, "a fox", "blurry", encode_negative=False).result
    )
    assert_same(positive, chain(model, vae, mllm, "a fox", {}))
    assert not negative[0][0].any() and negative[0][0].shape == positive[0][0].shape
    assert latent["samples"].shape == (1, 16, 1, 128, 128)


def test_an_mllm_for_text_alone_reads_no_images(mllm, monkeypatch):
    """As OmniGen2's: the images are reference latents alone."""
    model, vae = tiny("omnigen2"), TinyVAE(BACKBONES["omnigen2"])
    dla = make_dla(mllm, "omnigen2")
    monkeypatch.setattr(mllm, "reads_images", False)
    positive, _, _ = NODES["SubjectConditioning"].execute(model, vae, mllm, "a fox", dla=dla, width=64, **IMAGES).result
    assert_same(positive, chain(model, vae, mllm, "a fox", IMAGES, {}, dla, read=False))


@pytest.mark.parametrize("ratio, asked, expected", [
    (1.0, (0, 0), (1024, 1024)), (1.5, (0, 0), (1248, 832)), (0.5, (0, 0), (720, 1456)),
    (1.5, (768, 0), (768, 512)), (1.5, (0, 512), (768, 512)), (3.0, (500, 300), (496, 304)), (30.0, (64, 0), (64, 16)),
])  # fmt: skip
def test_the_canvas_fits_the_first_reference(ratio, asked, expected):
    assert canvas_size(ratio, *asked) == expected


@pytest.mark.parametrize("change, words", [
    ({"mask_2": torch.ones(1, 64, 64)}, ["mask_2", "image_2"]),
    ({"region_2": torch.ones(1, 64, 64)}, ["region_2 is connected", "image_2"]),
    ({"image_2": torch.zeros(1, 64, 64, 4)}, ["image_2", "alpha"]),
    ({"mask_3": torch.zeros(1, 64, 64)}, ["image_3", "mask is black"]),
    ({"placement": "nowhere"}, ["nowhere", "silently"]),
    ({"pooled_from": [[torch.zeros(1, 1, 1), {}]]}, ["pooled_from", "CLIP-L"]),
    ({"model": "narrow"}, ["64 wide", "24 wide", "Qwen-Image", "qwen"]),
    ({"dla": "flux"}, ["DLA 'tiny.safetensors'", "for flux", "qwen_image"]),
])  # fmt: skip
def test_what_does_not_fit_is_named(mllm, change, words):
    given = {"model": tiny("qwen_image", **({} if change.get("model") else STOCK["qwen_image"])), "mllm": mllm}
    given |= {"vae": TinyVAE(BACKBONES["qwen_image"]), "prompt": "a fox", **IMAGES}
    given |= {key: value for key, value in change.items() if key != "model"}
    if "dla" in change:
        given["dla"] = make_dla(mllm, "flux")
    with pytest.raises(ValueError) as error:
        NODES["SubjectConditioning"].execute(**given)
    assert all(word.lower() in str(error.value).lower() for word in words), error.value
