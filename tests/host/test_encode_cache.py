"""What encoders made of references is used again for the next prompt, and never for another picture or model."""

import asyncio
import gc

import pytest
import torch
from subject_dla.loaders import encode_cache
from subject_dla.loaders.backbones import BACKBONES
from subject_dla.loaders.encode_cache import VAE_LATENTS, EncodeCache, encode_reference
from subject_dla.loaders.mllm.huggingface import load_folder
from subject_dla.nodes import SubjectExtension
from subject_dla.tests.small.dit import TinyVAE, tiny
from subject_dla.tests.small.mllm import build_qwen25vl

NODES = {node.__name__: node for node in asyncio.run(SubjectExtension().get_node_list())}


def picture(height, width, seed=0):
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(seed))


class SmallVAE(TinyVAE):
    """With a weight, and what its encode gives depends on it."""

    def __init__(self, backbone):
        super().__init__(backbone)
        self.first_stage_model.scale = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def encode(self, pixels):
        return super().encode(pixels) * self.first_stage_model.scale


def test_a_new_prompt_on_the_same_references_encodes_none(tmp_path):
    """In either node, for the negative, too; a picture, size or mask more is another matter."""
    model = tiny("qwen_image", joint_attention_dim=64)
    vae = SmallVAE(BACKBONES["qwen_image"])
    mllm = load_folder(build_qwen25vl(tmp_path / "qwen", width=64, dtype=torch.float32))
    images = {"image_1": picture(96, 64), "image_2": picture(64, 80, 1)}

    def run(prompt):
        return NODES["SubjectConditioning"].execute(model, vae, mllm, prompt, "", width=64, height=64, **images).result

    first = run("a fox")[0][0][1]["reference_latents"]
    assert vae.encoded == 2
    second = run("a cat asleep")[0][0][1]["reference_latents"]
    assert vae.encoded == 2
    (identity,) = (
        NODES["SubjectAddIdentity"].execute([[torch.zeros(1, 1, 64), {}]], model, vae, images["image_2"]).result
    )
    assert vae.encoded == 2
    third = identity[0][1]["reference_latents"]
    for kept, fresh in zip([*second, *third], [*first, first[1]], strict=True):
        assert torch.equal(kept, fresh) and kept.data_ptr() != fresh.data_ptr()
    NODES["SubjectAddIdentity"].execute([[torch.zeros(1, 1, 64), {}]], model, vae, images["image_2"], size=48)
    assert vae.encoded == 3


def test_latents_belong_to_pixels_vae_and_weights():
    vae, other = (SmallVAE(BACKBONES["flux"]) for _ in range(2))
    mine, theirs = picture(64, 64), picture(64, 64, 1)
    first = encode_reference(vae, mine)
    assert torch.equal(encode_reference(vae, mine.clone()), first) and vae.encoded == 1
    encode_reference(vae, mine).zero_()  # the caller's own: nothing kept changes
    assert torch.equal(encode_reference(vae, mine), first) and vae.encoded == 1
    assert not torch.equal(encode_reference(vae, theirs), first) and vae.encoded == 2
    encode_reference(other, mine)
    assert other.encoded == 1
    vae.first_stage_model.scale.data = torch.full((1,), 2.0)  # weights swapped under the same object
    assert torch.equal(encode_reference(vae, mine), first * 2) and vae.encoded == 3


def test_a_model_that_is_freed_frees_what_it_made():
    VAE_LATENTS.clear()
    vae, other = (SmallVAE(BACKBONES["flux"]) for _ in range(2))
    size = encode_reference(vae, picture(64, 64)).nbytes
    encode_reference(other, picture(64, 64))
    assert VAE_LATENTS.bytes == 2 * size
    del vae
    gc.collect()
    assert VAE_LATENTS.bytes == size


def test_bytes_are_bounded_and_the_least_used_leave_first():
    class Model:
        pass

    cache, model, made = EncodeCache(3 * 400), Model(), []

    def get(name):
        return cache.get(model, name, lambda: made.append(name) or [torch.zeros(100)])

    for name in ("a", "b", "c", "a", "d", "a", "c", "b"):
        get(name)
        assert cache.bytes <= cache.limit
    assert made == ["a", "b", "c", "d", "b"]
    cache.get(model, "large", lambda: [torch.zeros(301)])  # not kept, and drives nothing out
    assert cache.bytes == 3 * 400
    cache.get(model, None, lambda: [torch.zeros(1)])
    assert cache.bytes == 3 * 400


@pytest.mark.parametrize("other", [torch.zeros(2, 3), torch.zeros(6), torch.zeros(3, 2, dtype=torch.bfloat16)])
def test_content_is_values_shape_and_dtype(other):
    assert encode_cache.content(torch.zeros(3, 2)) == encode_cache.content(torch.zeros(2, 3).T)
    assert encode_cache.content(torch.zeros(3, 2)) != encode_cache.content(other)
