"""The host's text encoders as MLLMs: the same features as transformers on the same weights, and without a DLA exactly
the context that the host's own encode nodes give."""

import importlib
import io
import json
import re
import shutil
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import comfy.sd
import comfy.sd1_clip
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
from subject_dla.loaders.mllm.templates import QWEN3_VL
from subject_dla.loaders.mllm.vision import pooled_pixels, qwen_grid, to_area, to_square
from subject_dla.tests.small.mllm import build_qwen3vl, build_qwen35, shrink_qwen25vl_vision
from subject_dla.tests.small.template_models import mistral_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Qwen2Tokenizer

WIDTH, LAYERS, SIZE = 256, 4, 224
SIZES = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": 2, "num_key_value_heads": 1,
         "intermediate_size": 2 * WIDTH, "lm_head": False}  # fmt: skip
# of each encoder: module under comfy.text_encoders, its function and options, tokenizer, the host's config class,
# and how many layers the small one has: those that are read one by one must be there
MADE_BY = {
    "QwenImage21TEModel": ("qwen_image21", "te", {}, "QwenImage21Tokenizer", "Qwen3VL_8BConfig", LAYERS),
    "Krea2TEModel": ("krea2", "te", {}, "Krea2Tokenizer", "Qwen3VL_4BConfig", 36),
    "MageFlowTEModel": ("mage_flow", "te", {}, "MageFlowTokenizer", "Qwen3VL_4BConfig", LAYERS),
    "BooguTEModel": ("boogu", "te", {}, "BooguTokenizer", "Qwen3VL_8BConfig", LAYERS),
    "JoyImageTEModel": ("joyimage", "te", {}, "JoyImageTokenizer", "Qwen3VL_8BConfig", LAYERS),
    "Ideogram 4": ("ideogram4", "te_qwen3vl", {}, "Ideogram4Qwen3VLTokenizer", "Qwen3VL_8BConfig", 36),
    "Ideogram 4, text": ("ideogram4", "te", {}, "Ideogram4Tokenizer", "Qwen3_8BConfig", 36),
    "Klein 4B": ("flux", "klein_te", {"model_type": "qwen3_4b"}, "KleinTokenizer", "Qwen3_4BConfig", 36),
    "Klein 8B": ("flux", "klein_te", {"model_type": "qwen3_8b"}, "KleinTokenizer8B", "Qwen3_8BConfig", 36),
    "ZImageTEModel": ("z_image", "te", {}, "ZImageTokenizer", "Qwen3_4BConfig", LAYERS),
    "FLUX.2 dev": ("flux", "flux2_te", {}, "Flux2Tokenizer", "Mistral3Small24BConfig", 31),
    "FLUX.2 dev, pruned": ("flux", "flux2_te", {"pruned": True}, "Flux2Tokenizer", "Mistral3Small24BConfig", 30),
    "LongCatImageTEModel": ("longcat_image", "te", {}, "LongCatImageTokenizer", "Qwen25_7BVLI_Config", LAYERS),
    "Gemma 2": ("lumina2", "te", {"model_type": "gemma2_2b"}, "LuminaTokenizer", "Gemma2_2B_Config", LAYERS),
    "Gemma 3": ("lumina2", "te", {"model_type": "gemma3_4b"}, "NTokenizer", "Gemma3_4B_Config", 6),
    "Gemma 3, images": (
        "lumina2",
        "te",
        {"model_type": "gemma3_4b_vision"},
        "NTokenizer",
        "Gemma3_4B_Vision_Config",
        6,
    ),
    "Gemma 3 12B": ("lt", "gemma3_te", {}, "Gemma3_12BTokenizer", "Gemma3_12B_Config", 6),
    "LTX-2": ("lt", "ltxav_te", {"dtype_llama": torch.float32}, "LTXAVGemmaTokenizer", "Gemma3_12B_Config", 6),
    "Gemma 4": ("gemma4", "gemma4_te", {}, "Gemma4_E4B", "Gemma4Config", 12),
    "Qwen3.5": ("qwen35", "te", {"model_type": "qwen35_2b"}, "tokenizer", None, LAYERS),
    "Qwen3VLTEModel": ("qwen3vl", "te", {"model_type": "qwen3vl_4b"}, "tokenizer", "Qwen3VL_4BConfig", LAYERS),
}
# of those that a DiT family of ours reads
READ_BY = {
    "QwenImage21TEModel": "qwen_image21", "Krea2TEModel": "krea2", "MageFlowTEModel": "mage_flow",
    "BooguTEModel": "boogu", "JoyImageTEModel": "joyimage", "Klein 4B": "klein", "Klein 8B": "klein",
    "ZImageTEModel": "z_image", "FLUX.2 dev": "flux2", "FLUX.2 dev, pruned": "flux2",
    "LongCatImageTEModel": "longcat_image",
}  # fmt: skip
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
    sizes = SIZES | ({"vocab_size": 128} if config.startswith("Gemma") else {})
    small = {name: value for name, value in (sizes | {"num_hidden_layers": layers}).items() if name in defaults}
    monkeypatch.setattr(made.__init__, "__defaults__", tuple((defaults | small).values()))
    if hasattr(made, "vision_config"):
        monkeypatch.setattr(made, "vision_config", llama.GEMMA3_VISION_CONFIG | GEMMA3_VISION)
        monkeypatch.setattr(made, "mm_tokens_per_image", 4)


GEMMA3_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2,
                 "image_size": 112}  # fmt: skip


def shrink_qwen3vl(monkeypatch):
    module = importlib.import_module("comfy.text_encoders.qwen3vl")
    small = {"hidden_size": 32, "intermediate_size": 48, "depth": 3, "deepstack_visual_indexes": [0, 1]}
    for name in module.QWEN3VL_VISION:
        monkeypatch.setitem(module.QWEN3VL_VISION, name, small)
    for name, value in {"num_heads": 2, "num_position_embeddings": 64}.items():
        monkeypatch.setitem(module.QWEN3VL_VISION_COMMON, name, value)


def shrink_gemma4(monkeypatch, layers):
    module = importlib.import_module("comfy.text_encoders.gemma4")
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers,
             "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size_per_layer_input": 16,
             "num_kv_shared_layers": 6}  # fmt: skip
    fields = module.Gemma4Config.__dataclass_fields__
    defaults = dict(zip(fields, module.Gemma4Config.__init__.__defaults__, strict=True))
    monkeypatch.setattr(module.Gemma4Config.__init__, "__defaults__", tuple((defaults | sizes).values()))
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
    monkeypatch.setattr(module.Gemma4Config, "vision_config", module.GEMMA4_VISION_CONFIG | small | {"head_dim": 16})
    monkeypatch.setattr(module.Gemma4Config, "audio_config", module.GEMMA4_AUDIO_CONFIG | small)


def shrink_qwen35(monkeypatch, layers):
    module = importlib.import_module("comfy.text_encoders.qwen35")
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers, "num_attention_heads": 2,
             "num_key_value_heads": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 4}  # fmt: skip
    monkeypatch.setitem(module.QWEN35_MODELS, "qwen35_2b", small)
    for name, value in QWEN35_VISION.items():
        monkeypatch.setitem(module.QWEN35_VISION_DEFAULTS, name, value)


QWEN35_VISION = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "depth": 2, "num_position_embeddings": 64}


def build_clip(monkeypatch, name, folder=None):
    """A small CLIP of that encoder of the host, with a folder's weights or random ones."""
    name, function, options, tokenizer, config, layers = MADE_BY[name]
    try:
        module = importlib.import_module(f"comfy.text_encoders.{name}")
        make, tokenizer = getattr(module, function), getattr(module, tokenizer)
    except (ImportError, AttributeError):
        pytest.skip("not on this host")
    if config == "Gemma4Config":
        shrink_gemma4(monkeypatch, layers)
        options, tokenizer = {"model_class": module.Gemma4_E4B}, module.Gemma4_E4B.tokenizer
    elif config is None:
        shrink_qwen35(monkeypatch, layers)
    else:
        shrink(monkeypatch, config, layers)
    if "Qwen3VL" in (config or ""):
        shrink_qwen3vl(monkeypatch)
    if name == "LongCatImageTEModel":
        shrink_qwen25vl_vision(monkeypatch)
    tokenizer = tokenizer(**options) if tokenizer.__name__ == "tokenizer" else tokenizer
    target, files = SimpleNamespace(clip=make(**options), tokenizer=tokenizer, params={}), tokenizers()
    try:
        clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32}, tokenizer_data=files)
    except TypeError as error:  # 0.3.75 builds Mistral's tokenizer with a class that transformers 5 has changed
        pytest.skip(f"not on this host: {error}")
    module = clip.cond_stage_model
    inner = getattr(module, getattr(module, "clip", "gemma3_12b"), module)
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        for parameter in inner.transformer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * (0.05 if parameter.ndim > 1 else 0.5)
        for key, buffer in inner.transformer.named_buffers():
            if key.endswith("layer_scalar"):  # Gemma 4's, which the host leaves to the file
                buffer.fill_(1)
        return clip
    weights = {
        key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
        for key, value in load_file(folder / "model.safetensors").items()
        if not key.startswith(("lm_head.", "mtp."))
    }
    missing, unexpected = inner.transformer.load_state_dict(weights, strict=False)
    assert not missing and not unexpected
    return clip


@cache
def tokenizers():
    """Files that some tokenizers come in, as the host finds them in a text encoder's weights."""
    import sentencepiece

    model, words = io.BytesIO(), "a red fox asleep begins with line break weighted braces ( ) : { } 1 4 . ,"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words] * 4), model_writer=model, vocab_size=60, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    spiece = torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)
    files = {"tekken_model": mistral_tokenizer(), "spiece_model": spiece}
    markers = ["<|turn>", "<turn|>", "<|image>", "<|image|>", "<image|>"]
    letters = ["<pad>", "<eos>", "<bos>", "\n", *map(chr, range(32, 127)), *markers]
    gemma4 = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    gemma4.add_special_tokens(markers)
    files["tokenizer_json"] = torch.tensor(list(gemma4.to_str().encode()), dtype=torch.uint8)
    return files | {"qwen35_2b_tokenizer_class": qwen35_tokenizer}


def qwen35_tokenizer(**options):
    """The host's, with a vocabulary of its merges, since some copies lack it: other words, same markers."""
    folder = Path(importlib.import_module("comfy.text_encoders.qwen35").__file__).with_name("qwen35_tokenizer")
    lines = (folder / "merges.txt").read_text("utf-8").split("\n")
    words = sorted(pre_tokenizers.ByteLevel.alphabet()) + [line.replace(" ", "") for line in lines if " " in line]
    words = list(dict.fromkeys(words))
    words += [f"<unused {number}>" for number in range(248044 - len(words))]
    with TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        Path(copy, "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}), "utf-8")
        return comfy.sd1_clip.SDTokenizer(
            copy, tokenizer_class=Qwen2Tokenizer, has_start_token=False, has_end_token=False, pad_to_max_length=False,
            pad_with_end=False, max_length=99999999, min_length=1, pad_token=248044, **options,
        )  # fmt: skip


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
    "QwenImage21TEModel": ("nodes_qwen", "TextEncodeQwenImage21"),
    "LongCatImageTEModel": (None, "TextEncodeQwenImageEdit"),
    "BooguTEModel": ("nodes_boogu", "TextEncodeBooguEdit"),
    "MageFlowTEModel": ("nodes_mage", "TextEncodeMageFlowEdit"),
    "JoyImageTEModel": ("nodes_joyimage", "TextEncodeJoyImageEdit"),
}


def stock(host_class, clip, prompt, images):
    """What the host's own edit node or, without images, its CLIP Text Encode gives."""
    if not images and host_class != "QwenImage21TEModel":  # whose node alone takes a space for an empty prompt
        return importlib.import_module("nodes").CLIPTextEncode().encode(clip, prompt)[0]
    module, name = EDITS[host_class]
    if module is None:  # as that node, but for its size of a megapixel, which takes minutes here
        return clip.encode_from_tokens_scheduled(clip.tokenize(prompt, images=[to_area(images[0], SIZE)[None]]))
    node, options = getattr(importlib.import_module(f"comfy_extras.{module}"), name), {"vae": None}
    if name == "TextEncodeBooguEdit":
        options["negative_prompt"] = ""
    if name == "TextEncodeQwenImage21":
        options |= {"negative_prompt": "", "resolution": 256}
    sockets = {f"image_{number}": image[None] for number, image in enumerate(images, 1)}
    return node.execute(clip, prompt, images=sockets, **options).result[0]


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("host_class", [
    pytest.param(name, marks=[
        pytest.mark.shows("MLLM sources", "stock context equal", family=READ_BY[name])
    ] if name in READ_BY else [])
    for name in MADE_BY
    if name not in ("Gemma 4", "Gemma 3 12B", "Gemma 3, images", "LTX-2")  # the host gives every layer, an error, a map
])  # fmt: skip
def test_without_a_dla_the_context_is_the_stock_one(monkeypatch, host_class, count):
    """Bit for bit, and the mask: which layers, which norm, how they are joined, which tokens are dropped."""
    if count and host_class not in EDITS:
        pytest.skip("the host has no edit node for it")
    clip = build_clip(monkeypatch, host_class)
    mllm = mllm_from_clip(clip)
    if mllm.most_images is not None and count > mllm.most_images:
        with pytest.raises(MLLMError, match="reads 1 image"):
            mllm.encode("a fox", IMAGES[:count])
        return
    images = [picture(1024, 1024)][:count] if host_class == "JoyImageTEModel" else IMAGES[:count]  # one that it keeps
    if host_class == "QwenImage21TEModel":  # which keeps pictures of such sizes
        images = [picture(256, 256), picture(256, 256, 1)][:count]
    size = 256 if host_class == "QwenImage21TEModel" else SIZE if host_class == "LongCatImageTEModel" else 0
    for prompt in PROMPTS[:3] if host_class.startswith("Gemma") else PROMPTS:  # with emphasis it blends its layer
        keep = "keep" if mllm.template == QWEN3_VL else "auto"
        if keep == "keep":  # read with the template of Load MLLM
            prompt = mllm.template.text(prompt)
        ((tokens, values),) = stock(host_class, clip, prompt, images)
        ((mine, found),) = aggregate_conditioning(mllm.encode(prompt, images, image_size=size), template=keep)
        assert mine.shape == tokens.shape == (1, tokens.shape[1], mllm.context_width)
        assert torch.equal(mine, tokens), prompt
        masks = [entry.get("attention_mask") for entry in (values, found)]
        assert (masks[0] is None) == (masks[1] is None)
        assert masks[0] is None or torch.equal(*masks)


TEXT_ONLY = {
    "Gemma 2": ("Gemma2Model", "Gemma2Config", {"query_pre_attn_scalar": 256, "attn_logit_softcapping": None}),
    "Gemma 3": (
        "Gemma3TextModel",
        "Gemma3TextConfig",
        {
            "query_pre_attn_scalar": 256,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
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
    config = {size: getattr(model.config, size) for size in sizes if size not in more} | more
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


@pytest.fixture(scope="module")
def qwen35(tmp_path_factory):
    """A folder of the sizes of `shrink_qwen35`."""
    rope = {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
            "rope_theta": 1e7, "rope_type": "default"}  # fmt: skip
    sizes = {"intermediate_size": 96, "head_dim": 256, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
             "vocab_size": 248320, "rope_parameters": rope}  # fmt: skip
    root = tmp_path_factory.mktemp("encoders") / "qwen35"
    return build_qwen35(root, layers=LAYERS, heads=2, kv_heads=1, dtype=torch.float32, **sizes)


@pytest.mark.parametrize("images", [[], IMAGES[:1], IMAGES], ids=["text", "one image", "two images"])
def test_qwen3_5_gives_the_features_of_its_folder(monkeypatch, request, images):
    """Its layers of linear attention too, and images, which the host alone normalises and rotates otherwise."""
    pytest.importorskip("comfy.text_encoders.qwen35", reason="not on this host")
    if "qwen3_5" not in importlib.import_module("transformers").CONFIG_MAPPING:
        pytest.skip("not on this host: transformers lacks qwen3_5")
    folder = request.getfixturevalue("qwen35")
    clip = build_clip(monkeypatch, "Qwen3.5", folder)
    mllm, other = mllm_from_clip(clip), load_folder(folder)
    other._tokenizer, (other._image_token,) = mllm.tokenize, mllm.tokenize("<|image_pad|>")
    first, second = (source.encode("a red fox", images, image_size=160) for source in (mllm, other))
    assert first.grids == second.grids and first.prefix == second.prefix
    for name in ("modality", "image_index", "attention_mask"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    torch.testing.assert_close(first.hidden_states, second.hidden_states, atol=1e-3, rtol=1e-3)
    inner = clip.cond_stage_model.qwen35_2b.transformer
    assert not {"preprocess_embed", "compute_freqs_cis"} & {*vars(inner), *vars(inner.model)}  # the CLIP is as it was


@pytest.mark.parametrize("images", [[], IMAGES[:1], IMAGES], ids=["text", "one image", "two images"])
@pytest.mark.parametrize("name", ["Gemma 3, images", "Gemma 3 12B", "LTX-2"])
@torch.no_grad()
def test_gemma_3_gives_the_features_of_transformers(monkeypatch, name, images):
    """Tokens of an image see each other, which the host leaves out; every image is a square."""
    transformers = importlib.import_module("transformers")
    clip = build_clip(monkeypatch, name)
    mllm = mllm_from_clip(clip)
    model = mllm._inner.transformer
    text = {size: getattr(model.model.config, size) for size in SIZES_OF_GEMMA} | TEXT_ONLY["Gemma 3"][2]
    vision = {"model_type": "siglip_vision_model", "patch_size": 14, "vision_use_head": False} | GEMMA3_VISION
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=262144
    )
    other = transformers.Gemma3Model(config).eval()
    host = {
        key.replace("model.", "", 1) if key.startswith("model.") else key: w for key, w in model.state_dict().items()
    }
    ours = {
        key: re.sub(r"^(language_model|vision_tower)\.", "", key).removeprefix("vision_model.")
        for key in other.state_dict()
    }
    host = {key.replace("vision_model.", "").removeprefix("vision_model."): weight for key, weight in host.items()}
    other.load_state_dict({key: host[name] for key, name in ours.items()})
    first, *parts = mllm.template.text("a red fox", len(images)).split("<image_soft_token>")
    ids = [2, *mllm.tokenize(first)]
    for part in parts:
        ids += [262144] * 4 + mllm.tokenize(part)
    ids = torch.tensor([ids])
    inputs = {"token_type_ids": (ids == 262144).long(), "attention_mask": torch.ones_like(ids)}
    if images:
        pixels = torch.stack([to_square(image, 112).movedim(-1, 0) for image in images])
        inputs["pixel_values"] = (255 * pixels).round() / 127.5 - 1
    states = torch.stack(other(ids, **inputs, output_hidden_states=True).hidden_states, dim=1)
    features = mllm.encode("a red fox", images)
    found = features.hidden_states[:, :, features.attention_mask[0]]
    torch.testing.assert_close(found, states, atol=1e-3, rtol=1e-3)
    assert int((features.modality == Modality.IMAGE).sum()) == 4 * len(images)
    with pytest.raises(MLLMError, match="image_size is 224, expected 0: .* reads 112 px alone"):
        mllm.encode("a red fox", IMAGES, image_size=224)


SIZES_OF_GEMMA = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "rms_norm_eps", "head_dim")  # fmt: skip


@pytest.mark.parametrize("images", [[], IMAGES[:1], IMAGES], ids=["text", "one image", "two images"])
@torch.no_grad()
def test_gemma_4_gives_the_features_of_transformers(monkeypatch, images):
    """With the embeddings that each layer has of each token, which the host leaves out where it encodes a prompt."""
    transformers = importlib.import_module("transformers")
    clip = build_clip(monkeypatch, "Gemma 4")
    mllm = mllm_from_clip(clip)
    host = clip.cond_stage_model.gemma4.transformer
    for layer in host.model.layers:
        layer.layer_scalar.fill_(0.9)
    sizes = ("hidden_size_per_layer_input", "num_kv_shared_layers", "global_head_dim", *SIZES_OF_GEMMA)
    text = {size: getattr(host.model.config, size) for size in sizes} | {"vocab_size_per_layer_input": 128}
    vision = {size: host.model.config.vision_config[size] for size in (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "head_dim")}  # fmt: skip
    vision |= {"num_key_value_heads": 2, "use_clipped_linears": True}
    (placeholder,) = mllm.tokenize("<|image|>")
    config = transformers.Gemma4Config(
        text_config=transformers.Gemma4TextConfig(**text), vision_config=transformers.Gemma4VisionConfig(**vision),
        image_token_id=placeholder,
    )  # fmt: skip
    other = transformers.Gemma4Model(config).eval()
    names = {"model": "language_model", "vision_model": "vision_tower", "multi_modal_projector": "embed_vision"}
    parts = ((*key.split(".", 1), weight) for key, weight in host.state_dict().items())
    weights = {f"{names.get(part, part)}.{key}": weight for part, key, weight in parts}
    other.load_state_dict({key: weights[key] for key in other.state_dict()})
    tokens, grids = torch.tensor([2, *mllm.tokenize(mllm.template.text("a red fox", len(images)))]), []
    inputs = {"pixel_values": [], "image_position_ids": []}
    for image in images:
        image = to_area(image, 224)
        grids.append(qwen_grid(*image.shape[:2], mllm.vision))
        for name, value in zip(inputs, pooled_pixels(image, grids[-1], mllm.vision), strict=True):
            inputs[name].append(value[0])
    repeats = torch.ones_like(tokens)
    repeats[tokens == placeholder] = torch.tensor([grid.tokens for grid in grids], dtype=torch.long)
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    pixels = {"pixel_values": 0.0, "image_position_ids": -1} if images else {}
    inputs = {name: pad(inputs[name], padding_value=value) for name, value in pixels.items()}
    ids = tokens.repeat_interleave(repeats)[None]
    states = torch.stack(other(ids, **inputs, output_hidden_states=True).hidden_states, dim=1)
    found = mllm.encode("a red fox", images, image_size=224)
    torch.testing.assert_close(found.hidden_states, states, atol=1e-3, rtol=1e-3)
    assert found.grids == (tuple(grids),)


def test_every_encoder_is_compared_with_its_host():
    named = {encoder.host_class for encoder in ENCODERS if encoder.host_class}
    assert named <= {*MADE_BY, "Flux2TEModel", "Ideogram4"}


@pytest.mark.parametrize("name, made", [
    ("HunyuanImage", ("hunyuan_image", "te", {}, "HunyuanImageTokenizer", "Qwen25_7BVLI_Config", LAYERS)),
    ("Kandinsky5", ("kandinsky5", "te", {}, "Kandinsky5TokenizerImage", "Qwen25_7BVLI_Config", LAYERS)),
    ("PixelDiT", ("pixeldit", "pixeldit_te", {}, "PixelDiTGemma2Tokenizer", "Gemma2_2B_Config", LAYERS)),
])  # fmt: skip
def test_encoders_built_on_another_are_named_or_refused(monkeypatch, caplog, name, made):
    monkeypatch.setitem(MADE_BY, name, made)
    if name != "PixelDiT":
        shrink_qwen25vl_vision(monkeypatch)
    clip = build_clip(monkeypatch, name)
    if name == "PixelDiT":
        with pytest.raises(MLLMError, match="This CLIP is 'PixelDiT', expected an LLM"):
            mllm_from_clip(clip)
        return
    states = mllm_from_clip(clip).encode("a red fox").hidden_states
    assert f"this CLIP is {name}'s" in caplog.text and "Qwen-Image" in caplog.text and bool(states.isfinite().all())


@pytest.mark.parametrize("name", MADE_BY)
def test_layers_above_the_last_wanted_do_not_run_and_the_others_are_the_same(monkeypatch, name):
    mllm = mllm_from_clip(build_clip(monkeypatch, name))
    every, top = mllm.encode("a red fox"), mllm.info.layers
    run, layers = [], mllm._model.layers
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: run.append(number))
    for wanted in ([0, 2], [1], [top - 1], [0, top]):
        run.clear()
        found = mllm.encode("a red fox", layers=wanted)
        assert run == list(range(top if name == "Gemma 4" else wanted[-1])) and mllm._model.layers is layers
        assert all(torch.equal(found.layer(number), every.layer(number)) for number in wanted), wanted
