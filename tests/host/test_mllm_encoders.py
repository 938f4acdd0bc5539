"""The host's text encoders as MLLMs: the same features as transformers on the same weights, and without a DLA exactly
the context that the host's own encode nodes give."""

import importlib
from types import SimpleNamespace

import comfy.sd
import comfy.text_encoders.llama as llama
import pytest
import torch
from safetensors.torch import load_file
from subject_dla.dla.ablation import ablate
from subject_dla.dla.features import Modality
from subject_dla.loaders.conditioning import aggregate_conditioning
from subject_dla.loaders.mllm import mllm_from_clip
from subject_dla.loaders.mllm.base import MLLMError
from subject_dla.loaders.mllm.encoders import ENCODERS
from subject_dla.loaders.mllm.huggingface import load_folder
from subject_dla.tests.small.mllm import build_qwen3vl
from subject_dla.tests.small.template_models import mistral_tokenizer

WIDTH, LAYERS = 256, 4
SIZES = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": 2, "num_key_value_heads": 1,
         "intermediate_size": 2 * WIDTH, "lm_head": False}  # fmt: skip
# of each encoder: module under comfy.text_encoders, its function and options, tokenizer, the host's config class,
# and how many layers the small one has: those that are read one by one must be there
MADE_BY = {
    "Krea2TEModel": ("krea2", "te", {}, "Krea2Tokenizer", "Qwen3VL_4BConfig", 36),
    "MageFlowTEModel": ("mage_flow", "te", {}, "MageFlowTokenizer", "Qwen3VL_4BConfig", LAYERS),
    "BooguTEModel": ("boogu", "te", {}, "BooguTokenizer", "Qwen3VL_8BConfig", LAYERS),
    "JoyImageTEModel": ("joyimage", "te", {}, "JoyImageTokenizer", "Qwen3VL_8BConfig", LAYERS),
    "Ideogram4Qwen3VLTEModel": ("ideogram4", "te_qwen3vl", {}, "Ideogram4Qwen3VLTokenizer", "Qwen3VL_8BConfig", 36),
    "Klein 4B": ("flux", "klein_te", {"model_type": "qwen3_4b"}, "KleinTokenizer", "Qwen3_4BConfig", 36),
    "Klein 8B": ("flux", "klein_te", {"model_type": "qwen3_8b"}, "KleinTokenizer8B", "Qwen3_8BConfig", 36),
    "ZImageTEModel": ("z_image", "te", {}, "ZImageTokenizer", "Qwen3_4BConfig", LAYERS),
    "FLUX.2 dev": ("flux", "flux2_te", {}, "Flux2Tokenizer", "Mistral3Small24BConfig", 31),
    "FLUX.2 dev, pruned": ("flux", "flux2_te", {"pruned": True}, "Flux2Tokenizer", "Mistral3Small24BConfig", 30),
    "Qwen3VLTEModel": ("qwen3vl", "te", {"model_type": "qwen3vl_4b"}, "tokenizer", "Qwen3VL_4BConfig", LAYERS),
}
PROMPTS = ["a red fox,\n\nasleep", "", "\nbegins with a line break", "(weighted:1.4) {braces}"]


def picture(height, width, seed=0):
    return torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))


IMAGES = [picture(300, 500), picture(640, 400, 1)]  # two aspect ratios, neither of whole tokens


def shrink(monkeypatch, config, layers):
    """A config class of the host, small; `__defaults__` are those of its generated constructor."""
    made = getattr(llama, config, None)
    if made is None:
        pytest.skip("not on this host")
    defaults = dict(zip(made.__dataclass_fields__, made.__init__.__defaults__, strict=True))
    small = {name: value for name, value in (SIZES | {"num_hidden_layers": layers}).items() if name in defaults}
    monkeypatch.setattr(made.__init__, "__defaults__", tuple((defaults | small).values()))


def shrink_qwen3vl(monkeypatch):
    module = importlib.import_module("comfy.text_encoders.qwen3vl")
    small = {"hidden_size": 32, "intermediate_size": 48, "depth": 3, "deepstack_visual_indexes": [0, 1]}
    for name in module.QWEN3VL_VISION:
        monkeypatch.setitem(module.QWEN3VL_VISION, name, small)
    for name, value in {"num_heads": 2, "num_position_embeddings": 64}.items():
        monkeypatch.setitem(module.QWEN3VL_VISION_COMMON, name, value)


def build_clip(monkeypatch, name, folder=None):
    """A small CLIP of that encoder of the host, with a folder's weights or random ones."""
    name, function, options, tokenizer, config, layers = MADE_BY[name]
    try:
        module = importlib.import_module(f"comfy.text_encoders.{name}")
        make, tokenizer = getattr(module, function), getattr(module, tokenizer)
    except (ImportError, AttributeError):
        pytest.skip("not on this host")
    shrink(monkeypatch, config, layers)
    if "VL" in config:
        shrink_qwen3vl(monkeypatch)
    tokenizer = tokenizer(**options) if tokenizer.__name__ == "tokenizer" else tokenizer
    target, files = SimpleNamespace(clip=make(**options), tokenizer=tokenizer, params={}), mistral_tokenizer()
    try:
        clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32}, tokenizer_data={"tekken_model": files})
    except TypeError as error:  # 0.3.75 builds Mistral's tokenizer with a class that transformers 4.57 has changed
        pytest.skip(f"not on this host: {error}")
    inner = getattr(clip.cond_stage_model, clip.cond_stage_model.clip)
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        for parameter in inner.transformer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * (0.05 if parameter.ndim > 1 else 0.5)
        return clip
    weights = {
        key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
        for key, value in load_file(folder / "model.safetensors").items()
        if key != "lm_head.weight"
    }
    missing, unexpected = inner.transformer.load_state_dict(weights, strict=False)
    assert not missing and not unexpected
    return clip


@pytest.fixture(scope="module")
def qwen3vl(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders") / "qwen3vl"
    return build_qwen3vl(root, width=WIDTH, layers=LAYERS, heads=2, kv_heads=1, dtype=torch.float32)


@pytest.mark.parametrize("images", [[], IMAGES[:1], IMAGES], ids=["text", "one image", "two images"])
def test_qwen3_vl_gives_the_features_of_its_folder(monkeypatch, qwen3vl, images):
    """Every layer with DeepStack's additions, every token, and the same account of what each token is."""
    mllm, other = mllm_from_clip(build_clip(monkeypatch, "Qwen3VLTEModel", qwen3vl)), load_folder(qwen3vl)
    assert mllm.info.family == "qwen3_vl" and mllm.reads_images
    first, second = (source.encode("a red fox,\n\nasleep", images, image_size=256) for source in (mllm, other))
    assert first.layers == (*second.layers, LAYERS + 1) and first.prefix == second.prefix
    assert first.grids == second.grids
    for name in ("modality", "image_index", "attention_mask"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    torch.testing.assert_close(first.hidden_states[:, :-1], second.hidden_states, atol=1e-3, rtol=1e-3)
    norm = other.backbone.model.language_model.norm
    torch.testing.assert_close(norm(first.layer(LAYERS + 1)), first.layer(LAYERS), atol=1e-3, rtol=1e-3)
    gone = ablate(first, text=[LAYERS])  # the last layer is ablated with and without its norm
    assert torch.equal(gone.layer(LAYERS) == 0, gone.layer(LAYERS + 1) == 0)


# the host's edit nodes: module under comfy_extras, class
EDITS = {
    "BooguTEModel": ("nodes_boogu", "TextEncodeBooguEdit"),
    "MageFlowTEModel": ("nodes_mage", "TextEncodeMageFlowEdit"),
    "JoyImageTEModel": ("nodes_joyimage", "TextEncodeJoyImageEdit"),
}


def stock(host_class, clip, prompt, images):
    """What the host's own edit node or, without images, its CLIP Text Encode gives."""
    if not images:
        return importlib.import_module("nodes").CLIPTextEncode().encode(clip, prompt)[0]
    module, name = EDITS[host_class]
    node, options = getattr(importlib.import_module(f"comfy_extras.{module}"), name), {"vae": None}
    if name == "TextEncodeBooguEdit":
        options["negative_prompt"] = ""
    sockets = {f"image_{number}": image[None] for number, image in enumerate(images, 1)}
    return node.execute(clip, prompt, images=sockets, **options).result[0]


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("host_class", list(MADE_BY))
def test_without_a_dla_the_context_is_the_stock_one(monkeypatch, host_class, count):
    """Bit for bit, and the mask: which layers, which norm, how they are joined, which tokens are dropped."""
    if count and host_class not in EDITS:
        pytest.skip("the host has no edit node for it")
    clip = build_clip(monkeypatch, host_class)
    mllm = mllm_from_clip(clip)
    images = [picture(1024, 1024)][:count] if host_class == "JoyImageTEModel" else IMAGES[:count]  # one that it keeps
    for prompt in PROMPTS:
        if host_class == "Qwen3VLTEModel":  # read with the template of Load MLLM
            prompt = mllm.template.text(prompt)
        ((tokens, values),) = stock(host_class, clip, prompt, images)
        ((mine, found),) = aggregate_conditioning(mllm.encode(prompt, images))
        assert mine.shape == tokens.shape == (1, tokens.shape[1], mllm.context_width)
        assert torch.equal(mine, tokens), prompt
        masks = [entry.get("attention_mask") for entry in (values, found)]
        assert (masks[0] is None) == (masks[1] is None)
        assert masks[0] is None or torch.equal(*masks)


TEXT_ONLY = {
    "Klein 4B": ("Qwen3Model", "Qwen3Config", {}),
    "Klein 8B": ("Qwen3Model", "Qwen3Config", {}),
    "ZImageTEModel": ("Qwen3Model", "Qwen3Config", {}),
    "FLUX.2 dev": ("MistralModel", "MistralConfig", {"sliding_window": None}),
}


@pytest.mark.parametrize("name", list(TEXT_ONLY))
def test_text_encoders_give_the_features_of_transformers(monkeypatch, name):
    """Embeddings, every layer and the norm, on the same weights; images are refused, and the words are found."""
    transformers = importlib.import_module("transformers")
    model_class, config_class, more = TEXT_ONLY[name]
    clip = build_clip(monkeypatch, name)
    mllm = mllm_from_clip(clip)
    features, key = mllm.encode("a red fox"), clip.cond_stage_model.clip
    model = getattr(clip.cond_stage_model, key).transformer.model
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "rms_norm_eps", "rope_theta", "head_dim")  # fmt: skip
    config = {size: getattr(model.config, size) for size in sizes} | more
    other = getattr(transformers, model_class)(getattr(transformers, config_class)(**config))
    other.load_state_dict(model.state_dict())
    ids = torch.tensor([mllm.tokenize(mllm.template.text("a red fox"))])
    if getattr(clip.tokenizer, key).start_token is not None:
        ids = torch.cat((torch.full((1, 1), getattr(clip.tokenizer, key).start_token), ids), dim=1)
    with torch.no_grad():
        states = torch.stack(other.eval()(ids, output_hidden_states=True).hidden_states, dim=1)
    mask = features.attention_mask[0]
    torch.testing.assert_close(features.hidden_states[:, :, mask], states, atol=1e-3, rtol=1e-3)
    words = (features.modality[0] == Modality.TEXT).nonzero().flatten().tolist()
    assert words == list(range(features.prefix[0], features.prefix[0] + len(mllm.tokenize("a red fox"))))
    with pytest.raises(MLLMError, match="reads text only, but 2 image"):
        mllm.encode("a red fox", IMAGES)


def test_every_encoder_is_compared_with_its_host():
    assert {encoder.host_class for encoder in ENCODERS if encoder.host_class} <= {*MADE_BY, "Flux2TEModel"}
