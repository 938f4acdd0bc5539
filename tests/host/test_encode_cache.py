"""What encoders made of references is used again for the next prompt, and never for another picture or model."""

import asyncio
import gc
import random
import sys
import threading
from functools import partial

import comfy.model_management
import comfy.sd
import pytest
import torch
import transformers
from subject_dla.loaders import encode_cache
from subject_dla.loaders.backbones import BACKBONES
from subject_dla.loaders.encode_cache import MLLM_STATES, VAE_LATENTS, EncodeCache, encode_reference
from subject_dla.loaders.mllm.huggingface import load_folder
from subject_dla.nodes import SubjectExtension
from subject_dla.tests.small.dit import TinyVAE, tiny
from subject_dla.tests.small.mllm import (
    build_gemma4,
    build_internvl,
    build_internvl35,
    build_qwen3vl,
    build_qwen25vl,
    build_qwen35,
)
from subject_dla.tests.small.models import host_shapes, random_like

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


@torch.inference_mode()  # as hosts run nodes
def test_a_latent_of_tiles_is_not_kept(caplog):
    """The host's second way where memory runs out, once: the next prompt has the whole picture's latent again."""
    shapes = host_shapes("comfy.taesd.taesd", "TAESD", {"latent_channels": 16})
    vae = comfy.sd.VAE(sd=random_like(shapes, torch.float32))
    image, encoder, calls = picture(640, 640), vae.first_stage_model.encode, []

    def out_of_memory_once(pixels):
        calls.append(tuple(pixels.shape))
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("Allocation on device")
        return encoder(pixels)

    vae.first_stage_model.encode = out_of_memory_once
    tiled = encode_reference(vae, image)
    assert "tiled VAE encoding" in caplog.text and len(calls) > 3 and not vars(vae).keys() & {"encode_tiled_"}
    used = len(calls)
    whole = encode_reference(vae, image)
    assert len(calls) == used + 1 and tiled.shape == whole.shape and not torch.equal(tiled, whole)
    assert torch.equal(encode_reference(vae, image), whole) and len(calls) == used + 1
    assert torch.equal(whole, vae.encode(image))


def convolutions(vae):
    return [module for module in vae.first_stage_model.modules() if isinstance(module, torch.nn.Conv2d)]


def other_input(vae):
    vae.process_input = lambda image: image


def seamless(vae):
    plain = convolutions(vae)[0]._conv_forward
    convolutions(vae)[0]._conv_forward = lambda *arguments: 2 * plain(*arguments)


def padding(vae):
    for module in convolutions(vae):
        module.padding_mode = "circular"


def hooked(vae):
    convolutions(vae)[0].register_forward_hook(lambda module, given, found: found + 1)


@pytest.mark.parametrize("change", [other_input, seamless, padding, hooked])
def test_a_vae_that_was_changed_in_place_encodes_anew(change, monkeypatch):
    shapes = host_shapes("comfy.taesd.taesd", "TAESD", {"latent_channels": 16})
    vae, calls = comfy.sd.VAE(sd=random_like(shapes, torch.float32)), []
    monkeypatch.setattr(comfy.sd.VAE, "encode", lambda *given, encode=vae.encode: calls.append(0) or encode(*given[1:]))
    before = encode_reference(vae, picture(64, 48))
    assert torch.equal(encode_reference(vae, picture(64, 48)), before) and len(calls) == 1  # the host's own is stable
    change(vae)
    after = encode_reference(vae, picture(64, 48))
    assert len(calls) == 2 and torch.equal(after, vae.encode(picture(64, 48))) and not torch.equal(after, before)


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


def test_threads_and_the_garbage_collector_leave_the_count_of_bytes_right():
    """A model in a cycle, as one with hooks is, ends in any thread, in the middle of another one's call."""

    class Model:
        def __init__(self):
            self.itself = self

    cache, errors = EncodeCache(4000), []

    def work(seed):
        draw, model = random.Random(seed), Model()
        try:
            for _ in range(3000):
                model = Model() if draw.random() < 0.2 else model
                (made,) = cache.get(model, number := draw.randrange(20), lambda: (torch.full((number * 10,), number),))
                assert len(made) == number * 10 and (made == number).all()
        except BaseException as error:
            errors.append(error)

    thresholds, interval = gc.get_threshold(), sys.getswitchinterval()
    try:
        gc.set_threshold(5, 2, 2)
        sys.setswitchinterval(1e-5)
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.set_threshold(*thresholds)
        sys.setswitchinterval(interval)
    gc.collect()
    assert not errors and cache.bytes == 0


@pytest.mark.parametrize("other", [torch.zeros(2, 3), torch.zeros(6), torch.zeros(3, 2, dtype=torch.bfloat16)])
def test_content_is_values_shape_and_dtype(other):
    assert encode_cache.content(torch.zeros(3, 2)) == encode_cache.content(torch.zeros(2, 3).T)
    assert encode_cache.content(torch.zeros(3, 2)) != encode_cache.content(other)


BUILD = {"qwen2_5_vl": build_qwen25vl, "qwen3_vl": build_qwen3vl, "internvl": build_internvl,
         "internvl3_5": build_internvl35, "qwen3_5": build_qwen35, "gemma4": build_gemma4}  # fmt: skip
WHOLE = ("qwen3_5", "gemma4")  # whose words are read with the images before them each time


@pytest.fixture(scope="module", params=BUILD)
def loaded(request, tmp_path_factory):
    if request.param.replace("internvl3_5", "internvl") not in transformers.CONFIG_MAPPING:
        pytest.skip(f"not on this host: transformers {transformers.__version__} lacks {request.param}")
    return request.param, load_folder(BUILD[request.param](tmp_path_factory.mktemp("kept") / "model"))


def encode(mllm, prompt, *images, **options):
    return mllm.encode(prompt, [image[0] for image in images], **{"image_size": 112, **options}).hidden_states


def count_tokens(mllm, run):
    """What `run` returns, and for each call of the first decoder layer its tokens."""
    counts = []
    layer = mllm.backbone.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    try:
        return run(), counts
    finally:
        hook.remove()


def test_features_are_the_same_with_images_seen_before(loaded):
    """Bit for bit; only the words are run again, for any layers, a negative prompt and another count of layers."""
    name, mllm = loaded
    fox, owl = picture(100, 60), picture(64, 90, 1)
    prompts = ["a red fox, asleep\nin snow", "", "an owl"]
    cold = []
    for prompt in prompts:
        MLLM_STATES.clear()
        states, counts = count_tokens(mllm, partial(encode, mllm, prompt, fox, owl))
        cold.append(states)
        assert len(counts) == (1 if name in WHOLE else 2) and sum(counts) == states.shape[2]
    for prompt, expected in zip(prompts, cold, strict=True):  # the last one's prefix is there
        states, counts = count_tokens(mllm, partial(encode, mllm, prompt, fox, owl))
        assert torch.equal(states, expected)
        assert len(counts) == 1 and (name in WHOLE or counts[0] < expected.shape[2] - 10)
        assert torch.equal(encode(mllm, prompt, fox, owl, layers=[0, 2]), expected[:, [0, 2]])
    MLLM_STATES.clear()
    assert torch.equal(encode(mllm, prompts[0], fox, owl, layers=[1]), cold[0][:, [1]])
    assert torch.equal(encode(mllm, prompts[1], fox, owl), cold[1])  # more layers than are kept


def test_in_one_pass_they_are_the_same_to_rounding(loaded, monkeypatch):
    name, mllm = loaded
    MLLM_STATES.clear()
    parts = encode(mllm, "a red fox", picture(100, 60), picture(64, 90, 1))
    monkeypatch.setattr(type(mllm), "_prefix_end", lambda *_: 0)
    torch.testing.assert_close(encode(mllm, "a red fox", picture(100, 60), picture(64, 90, 1)), parts)


def test_one_users_reference_is_never_in_anothers_prompt(loaded):
    """References of one size, whose tokens have the same ids, in turn, in any order, and after other settings."""
    _, mllm = loaded
    pictures = [picture(64, 64, seed) for seed in range(3)]
    calls = [
        ("a fox", images, {"image_size": size}) for images in ([0], [1], [0, 1], [1, 0], [2]) for size in (56, 112)
    ]
    cold = []
    for prompt, images, options in calls:
        MLLM_STATES.clear()
        cold.append(encode(mllm, prompt, *(pictures[number] for number in images), **options))
    for _ in range(2):
        for (prompt, images, options), expected in zip(calls, cold, strict=True):
            assert torch.equal(encode(mllm, prompt, *(pictures[number] for number in images), **options), expected)
    for first, one in enumerate(cold):
        assert not any(one.shape == other.shape and torch.equal(one, other) for other in cold[first + 1 :])


def test_weights_swapped_or_patched_and_a_freed_model(tmp_path):
    mllm = load_folder(build_qwen25vl(tmp_path / "qwen", dtype=torch.float32))
    MLLM_STATES.clear()
    fox = picture(64, 64)
    first = encode(mllm, "a fox", fox)
    weight = mllm.backbone.model.language_model.layers[0].mlp.up_proj.weight
    with torch.inference_mode(False):
        weight.data = weight.data * 2
    assert not torch.allclose(encode(mllm, "a fox", fox)[:, 1], first[:, 1])
    with torch.inference_mode(False):
        weight.data = weight.data / 2
    assert torch.equal(encode(mllm, "a fox", fox), first)

    plain, mllm.patcher = mllm.patcher, mllm.patcher.clone()  # as a LoRA is put on
    key = "model.language_model.layers.1.mlp.up_proj.weight"
    assert mllm.patcher.add_patches({key: (torch.full_like(weight, 0.05),)}, 1.0)
    patched = encode(mllm, "a cat", fox)
    mllm.patcher = plain
    MLLM_STATES.clear()
    assert not torch.allclose(patched[:, 2], encode(mllm, "a cat", fox)[:, 2], atol=1e-3)

    assert MLLM_STATES.bytes
    comfy.model_management.unload_all_models()
    del mllm, plain, weight
    gc.collect()
    assert MLLM_STATES.bytes == 0


def test_what_does_not_fit_is_not_kept(tmp_path, monkeypatch):
    mllm = load_folder(build_qwen25vl(tmp_path / "qwen", dtype=torch.float32))
    MLLM_STATES.clear()
    first = encode(mllm, "a fox", picture(64, 64))
    monkeypatch.setattr(MLLM_STATES, "limit", MLLM_STATES.bytes - 1)
    for seed in (1, 2, 0):
        last = encode(mllm, "a fox", picture(64, 64, seed))
        assert MLLM_STATES.bytes <= MLLM_STATES.limit
    assert torch.equal(first, last)


def test_a_bit_that_flips_in_what_is_kept_is_noticed(caplog):
    """Wherever it is, in any dtype and form, also where somebody has written into what they were given."""
    made, cache, owner = [], EncodeCache(10**6), torch.nn.Identity()

    def make():
        made.append(0)
        generator = torch.Generator().manual_seed(0)
        rest = {"b": torch.arange(7, dtype=torch.uint8)}
        return torch.randn(3, 5, generator=generator).bfloat16(), [torch.ones(4)[1:], rest]

    first = make()
    for _ in range(2):
        kept = cache.get(owner, "a", make)
    assert len(made) == 2 and torch.equal(kept[0], first[0])
    for number in range(3):
        kept = cache.get(owner, "a", make)
        data = (kept[0], kept[1][0], kept[1][1]["b"])[number].flatten().view(torch.uint8)
        data[len(data) // 2] ^= 4
        again = cache.get(owner, "a", make)
        assert len(made) == number + 3 and torch.equal(again[0], first[0]) and torch.equal(again[1][0], first[1][0])
        assert "changed in memory" in caplog.text
        caplog.clear()
