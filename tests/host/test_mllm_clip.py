"""The host's native Qwen2.5-VL as an MLLM: same features as transformers on the same weights, and with the last layer
alone exactly the host's own conditioning."""

import importlib
import inspect
import re
from functools import partial
from types import SimpleNamespace

import comfy.sd
import comfy.sd1_clip
import comfy.text_encoders.flux as flux
import comfy.text_encoders.llama as llama
import comfy.text_encoders.omnigen2 as omnigen2
import comfy.text_encoders.qwen_image as qwen_image
import comfy.text_encoders.qwen_vl as qwen_vl
import pytest
import torch
from safetensors.torch import load_file
from subject_dla.dla.features import Modality
from subject_dla.loaders.encode_cache import MLLM_STATES, fingerprint
from subject_dla.loaders.mllm import mllm_from_clip
from subject_dla.loaders.mllm.base import MLLMError
from subject_dla.loaders.mllm.huggingface import load_folder
from subject_dla.loaders.mllm.native import to_raster, window_ordered
from subject_dla.tests.small.mllm import build_qwen25vl, shrink_qwen25vl_vision

SMALL = {"num_hidden_layers": 3, "hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1,
         "intermediate_size": 512}  # fmt: skip


def shrink(monkeypatch):
    """The host's own classes, small: only numbers that its constructors hard-code are changed."""
    for config in (llama.Qwen25_7BVLI_Config, llama.Qwen25_3BConfig):
        defaults = dict(zip(config.__dataclass_fields__, config.__init__.__defaults__, strict=True))
        monkeypatch.setattr(config.__init__, "__defaults__", tuple((defaults | SMALL).values()))
    shrink_qwen25vl_vision(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("native") / "qwen"
    return build_qwen25vl(root, width=256, layers=3, heads=2, kv_heads=1, dtype=torch.float32)


def build_clip(model, tokenizer, folder=None):
    target = SimpleNamespace(clip=model, tokenizer=tokenizer, params={})  # what the host's CLIP asks of a text encoder
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    inner = getattr(clip.cond_stage_model, clip.cond_stage_model.clip)
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        for parameter in inner.transformer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.ndim > 1 else 0.5)
        return clip
    weights = {key: value for key, value in load_file(folder / "model.safetensors").items() if key != "lm_head.weight"}
    missing, unexpected = inner.transformer.load_state_dict(weights, strict=False)
    assert not missing and not unexpected
    return clip


@pytest.fixture
def clip(monkeypatch, folder):
    shrink(monkeypatch)
    return build_clip(qwen_image.te(), qwen_image.QwenImageTokenizer, folder)


def picture(height, width, seed=0):
    return torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))


IMAGES = [picture(300, 500), picture(640, 400, 1)]  # two aspect ratios; neither fits the windows


@pytest.mark.shows("MLLM sources", family="qwen_image")
@pytest.mark.parametrize("prompt", ["a red fox,\n\nasleep", "", " "], ids=["words", "empty", "space"])
@pytest.mark.parametrize("images", [[], IMAGES[:1], IMAGES], ids=["text", "one image", "two images"])
def test_native_and_transformers_features_agree(clip, folder, images, prompt):
    """Every layer, every token, in the same order on every host, with the same account of what each token is."""
    native = mllm_from_clip(clip)
    other = load_folder(folder)
    assert (native.info.layers, native.info.width, native.info.family) == (3, 256, "qwen2_5_vl")
    first = native.encode(prompt, images, image_size=224)
    second = other.encode(prompt, images, image_size=224)
    assert first.layers == second.layers and first.prefix == second.prefix
    assert first.grids == second.grids and len(first.grids[0]) == len(images)
    assert torch.equal(first.modality, second.modality) and torch.equal(first.image_index, second.image_index)
    assert torch.equal(first.attention_mask, second.attention_mask)
    torch.testing.assert_close(first.hidden_states, second.hidden_states, atol=1e-3, rtol=1e-3)
    some = native.encode(prompt, images, image_size=224, layers=[3, 1])
    assert torch.equal(some.hidden_states, first.hidden_states[:, [1, 3]])


@pytest.mark.shows("stock context equal", family="qwen_image")
@pytest.mark.parametrize("prompt", ["a red fox", "", "\nbegins with a line break", "(weighted:1.4) {braces}"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_last_layer_is_the_stock_conditioning(clip, prompt, count):
    """Bit for bit; where the host itself leaves image tokens in window order, as it would be with them in order."""
    node = importlib.import_module("comfy_extras.nodes_qwen").TextEncodeQwenImageEditPlus
    sockets = {f"image{number}": image[None] for number, image in enumerate(IMAGES[:count], 1)}
    mllm = mllm_from_clip(clip)
    features = mllm.encode(prompt, IMAGES[:count])
    visual, hook = mllm.visual, None
    if count and window_ordered(type(visual)):
        hook = visual.register_forward_hook(to_raster)
    if count:
        conditioning = node.execute(clip, prompt, **sockets).result[0]
    else:  # the node would use its template for images
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    stock = conditioning[0][0]
    mine = features.layer(3)[:, features.prefix[0] :]
    assert stock.shape == mine.shape
    assert torch.equal(stock, mine)
    if hook is not None:  # and nothing of ours is left behind on the user's CLIP
        hook.remove()
        assert not visual._forward_hooks
        assert not torch.equal(node.execute(clip, prompt, **sockets).result[0][0][0], mine)


def test_the_order_of_image_tokens_is_found_by_trying():
    """The host's code says which it is; it is read here, in the test, to check what the loader finds out by itself."""
    restored = "reverse_indices" in inspect.getsource(qwen_vl.Qwen2VLVisionTransformer.forward)
    assert window_ordered(qwen_vl.Qwen2VLVisionTransformer) is not restored


def test_modality_of_image_tokens(clip):
    features = mllm_from_clip(clip).encode("a fox", IMAGES, image_size=112)
    index = features.image_index[0]
    assert [int((index == number).sum()) for number in (0, 1)] == [3 * 5, 5 * 3]
    assert int((features.modality == Modality.IMAGE).sum()) == 30


def test_options_of_the_clip_are_put_back_even_after_an_error(clip, monkeypatch):
    mllm = mllm_from_clip(clip)
    inner = clip.cond_stage_model.qwen25_7b
    stock = clip.encode_from_tokens_scheduled(clip.tokenize("a fox"))[0][0]
    before = (inner.layer, inner.layer_idx)
    mllm.encode("a fox")
    assert (inner.layer, inner.layer_idx) == before

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(inner, "encode_token_weights", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            mllm.encode("a fox")
    assert (inner.layer, inner.layer_idx) == before
    assert torch.equal(clip.encode_from_tokens_scheduled(clip.tokenize("a fox"))[0][0], stock)


def test_a_lora_on_the_clip_changes_the_features(clip):
    """The socket's own patcher loads the weights, so a LoRA (or GGUF) behind it counts."""
    plain = mllm_from_clip(clip).encode("a fox").hidden_states
    patched = clip.clone()
    key = "qwen25_7b.transformer.model.layers.1.mlp.up_proj.weight"
    weight = dict(clip.cond_stage_model.named_parameters())[key]
    assert patched.add_patches({key: (torch.full_like(weight, 0.05),)}, 1.0)
    found = mllm_from_clip(patched).encode("a fox").hidden_states
    assert torch.equal(found[:, :2], plain[:, :2]) and not torch.allclose(found[:, 2], plain[:, 2], atol=1e-3)


def test_layers_whose_state_is_an_estimate_as_ggufs(clip, monkeypatch):
    """ComfyUI-GGUF's give meta tensors for the sizes, and a larger one more; their weights count all the same."""
    first = mllm_from_clip(clip).encode("a fox", IMAGES[:1]).hidden_states

    def estimate(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = torch.zeros_like(self.weight, device="meta")
        destination[f"{prefix}temp.weight"] = torch.empty(self.weight.shape, device="meta", dtype=torch.float16)

    inner = clip.cond_stage_model.qwen25_7b.transformer
    for layer in filter(lambda module: isinstance(module, torch.nn.Linear), inner.modules()):
        monkeypatch.setattr(layer, "_save_to_state_dict", partial(estimate, layer))
    assert torch.equal(mllm_from_clip(clip).encode("a fox", IMAGES[:1]).hidden_states, first)
    before = fingerprint(inner)
    inner.visual.blocks[0].mlp.up_proj.weight.data.mul_(2)
    assert fingerprint(inner) != before
    assert not torch.equal(mllm_from_clip(clip).encode("a fox", IMAGES[:1]).hidden_states, first)


def test_an_image_seen_before_is_not_seen_again(clip):
    """Its vision tokens are kept: bit for bit the same features; never for another image, or other weights."""
    mllm, other = mllm_from_clip(clip), picture(300, 500, 2)
    MLLM_STATES.clear()
    cold = [mllm.encode(prompt, IMAGES, image_size=224).hidden_states for prompt in ("a fox", "an owl asleep", "a fox")]
    MLLM_STATES.clear()
    theirs = mllm.encode("a fox", [other, IMAGES[1]], image_size=224).hidden_states
    MLLM_STATES.clear()
    seen = []
    hook = mllm.visual.register_forward_pre_hook(lambda *_: seen.append(1))
    for prompt, expected in zip(("a fox", "an owl asleep", "a fox"), cold, strict=True):
        assert torch.equal(mllm_from_clip(clip).encode(prompt, IMAGES, image_size=224).hidden_states, expected)
        assert len(seen) == 2
    assert torch.equal(mllm.encode("a fox", [other, IMAGES[1]], image_size=224).hidden_states, theirs)
    assert len(seen) == 3 and theirs.shape == cold[0].shape and not torch.equal(theirs, cold[0])
    patched = clip.clone()
    key = next(
        name for name, _ in clip.cond_stage_model.named_parameters() if name.endswith("visual.merger.mlp.0.weight")
    )
    weight = dict(clip.cond_stage_model.named_parameters())[key]
    assert patched.add_patches({key: (torch.full_like(weight, 0.05),)}, 1.0)
    found = mllm_from_clip(patched).encode("a fox", IMAGES, image_size=224).hidden_states
    assert len(seen) == 5 and not torch.allclose(found[:, 0], cold[0][:, 0], atol=1e-3)
    assert torch.equal(mllm_from_clip(clip).encode("a fox", IMAGES, image_size=224).hidden_states, cold[0])
    hook.remove()


def test_layers_above_the_highest_wanted_do_not_run(clip, monkeypatch):
    """Bit for bit the same states, and nothing is left on the CLIP, also after an error."""
    mllm, ran = mllm_from_clip(clip), []
    layers, whole = mllm._model.layers, mllm.encode("a fox", IMAGES[:1], image_size=224).hidden_states
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: ran.append(1))
    for wanted in ([0], [1], [2], [0, 2], [1, 3]):
        ran.clear()
        some = mllm.encode("a fox", IMAGES[:1], image_size=224, layers=wanted).hidden_states
        assert torch.equal(some, whole[:, wanted]) and len(ran) == max(wanted)
        assert mllm._model.layers is layers and not mllm._model.norm._forward_pre_hooks
    monkeypatch.setattr(layers[0], "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mllm.encode("a fox", IMAGES[:1], image_size=224, layers=[1])
    assert mllm._model.layers is layers and not mllm._model.norm._forward_pre_hooks
    assert "preprocess_embed" not in vars(clip.cond_stage_model.qwen25_7b.transformer)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_nodes_take_an_empty_prompt_as_the_host_does(clip, count):
    """The same template with nothing in it, which is not what a space makes; through the nodes, images included."""
    sockets = {f"image_{number}": image[None] for number, image in enumerate(IMAGES[:count], 1)}
    nodes = importlib.import_module("subject_dla.nodes.encode")
    empty, space = (
        nodes.SubjectAggregateLayers.execute(
            nodes.SubjectEncode.execute(mllm_from_clip(clip), text, **sockets).result[0]
        )
        for text in ("", " ")
    )
    mine, blank = empty.result[0][0][0], space.result[0][0][0]
    assert mine.shape[1] == blank.shape[1] - 1
    if count:
        if window_ordered(type(mllm_from_clip(clip).visual)):  # the host's node leaves image tokens in another order
            mllm_from_clip(clip).visual.register_forward_hook(to_raster)
        host = importlib.import_module("comfy_extras.nodes_qwen").TextEncodeQwenImageEditPlus
        stock = host.execute(clip, "", **{name.replace("_", ""): image for name, image in sockets.items()}).result[0]
    else:
        stock = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    assert torch.equal(mine, stock[0][0])


@pytest.mark.shows("MLLM sources", "stock context equal", family="omnigen2")
def test_omnigen2_reads_text_only_and_keeps_its_template(monkeypatch):
    shrink(monkeypatch)
    clip = build_clip(omnigen2.te(), omnigen2.Omnigen2Tokenizer)
    mllm = mllm_from_clip(clip)
    assert mllm.info.family == "qwen2_5" and mllm.info.drop_leading_template is False
    features = mllm.encode("a red fox")
    stock = clip.encode_from_tokens_scheduled(clip.tokenize("a red fox"))[0][0]
    assert torch.equal(features.layer(3), stock)
    stock = clip.encode_from_tokens_scheduled(clip.tokenize(""))[0][0]
    assert torch.equal(mllm.encode("").layer(3), stock)
    words = (features.modality[0] == Modality.TEXT).nonzero().flatten().tolist()
    assert words == list(range(features.prefix[0], features.prefix[0] + 3))
    with pytest.raises(MLLMError, match="reads text only, but 2 image"):
        mllm.encode("a red fox", IMAGES)


def test_another_text_encoder_gets_a_clear_error():
    clip_l = {"clip": comfy.sd1_clip.SD1ClipModel, "tokenizer": comfy.sd1_clip.SD1Tokenizer}
    clip = comfy.sd.CLIP(SimpleNamespace(**clip_l, params={}))
    with pytest.raises(ValueError, match=re.compile("'clip_l'.*qwen25_7b.*Load MLLM", re.DOTALL)):
        mllm_from_clip(clip)


@pytest.mark.shows("MLLM sources", "stock context equal", family="ming_image", found="refused")
def test_ming_images_text_encoder_is_refused():
    """Its context is made by queries and a connector behind the LLM, not of layers; the LLM is a class of its own."""
    ming = pytest.importorskip("comfy.text_encoders.ming_image", reason="not on this host")
    module = ming.te()(device="meta", dtype=torch.bfloat16)
    with pytest.raises(MLLMError, match="'ming_image', expected an LLM.*Load MLLM"):
        mllm_from_clip(SimpleNamespace(cond_stage_model=module, tokenizer=None, patcher=None))


@pytest.mark.shows("MLLM sources", "stock context equal", family="flux", found="refused")
def test_flux_1s_text_encoders_hold_no_llm():
    module = flux.FluxClipModel.__new__(flux.FluxClipModel)  # its T5 has 4.7 thousand million weights
    torch.nn.Module.__init__(module)
    with pytest.raises(MLLMError, match="'FluxClipModel', expected an LLM.*Load MLLM"):
        mllm_from_clip(SimpleNamespace(cond_stage_model=module))
