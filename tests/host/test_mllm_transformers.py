"""MLLMs from Hugging Face folders: features are the library's own hidden states, however weights are stored."""

import os
import shutil
from functools import cache

import pytest
import torch
import transformers
from einops import rearrange
from subject_dla.common.dtypes import DTYPES
from subject_dla.dla.features import ImageGrid, Modality
from subject_dla.loaders.mllm import huggingface as backend
from subject_dla.loaders.mllm.base import MLLMError
from subject_dla.loaders.mllm.families import FAMILIES, FOLDER_FAMILIES
from subject_dla.loaders.mllm.huggingface import load_folder
from subject_dla.loaders.mllm.vision import internvl_grid, internvl_tiles, qwen_grid, qwen_pixels
from subject_dla.tests.small.mllm import (
    build_gemma4,
    build_gemma4_31b,
    build_internvl,
    build_internvl35,
    build_qwen3vl,
    build_qwen25vl,
    build_qwen35,
)

BUILD = {
    "qwen2_5_vl": build_qwen25vl,
    "qwen3_vl": build_qwen3vl,
    "internvl": build_internvl,
    "internvl3_5": build_internvl35,
    "qwen3_5": build_qwen35,
    "gemma4": build_gemma4,
    "gemma4_31b": build_gemma4_31b,
}
VARIANTS = {"internvl3_5": "internvl", "gemma4_31b": "gemma4"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each family, made when a test first asks for it."""
    root = tmp_path_factory.mktemp("mllm")

    @cache
    def folder(name):
        if VARIANTS.get(name, name) not in transformers.CONFIG_MAPPING:
            pytest.skip(f"not on this host: transformers {transformers.__version__} lacks {name}")
        return BUILD[name](root / name)

    return folder


@pytest.fixture(scope="module", params=BUILD)
def loaded(request, folders):
    mllm = load_folder(folders(request.param))
    return mllm.info.family, folders(request.param), mllm


def picture(height, width, seed=0):
    """Random, in 8-bit steps, as a file would bring it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), generator=generator).float() / 255


@torch.no_grad()
def library(family, folder, mllm, prompt, images, size):
    """The library's own model, image processor and tokenizer on images that need no resizing: its hidden states
    (as it numbers them), its final hidden state and its logits."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = mllm.template.text(prompt, len(images))
    arrays = [(image * 255).round().to(torch.uint8).numpy() for image in images]
    inputs = {}
    if images and family == "internvl":
        processor = transformers.GotOcr2ImageProcessor.from_pretrained(folder)
        inputs["pixel_values"] = torch.as_tensor(processor(arrays, return_tensors="pt")["pixel_values"])
        counts = [(size // 28) ** 2] * len(images)
    elif images and family == "gemma4":
        processor = transformers.Gemma4ImageProcessor.from_pretrained(folder, do_resize=False)
        inputs.update(processor(arrays, return_tensors="pt"))
        counts = torch.as_tensor(inputs.pop("num_soft_tokens_per_image")).tolist()
    elif images:
        patch = mllm.vision.patch
        processor = transformers.Qwen2VLImageProcessor.from_pretrained(folder, do_resize=False)
        inputs.update(processor(arrays, return_tensors="pt"))
        inputs["image_grid_thw"] = torch.as_tensor(inputs["image_grid_thw"])
        assert inputs["image_grid_thw"].tolist() == [[1, i.shape[0] // patch, i.shape[1] // patch] for i in images]
        counts = [int(grid.prod()) // 4 for grid in inputs["image_grid_thw"]]
    holder = mllm.family.placeholder
    for count in counts if images else ():
        text = text.replace(holder, "<hole>" * count, 1)
    inputs["input_ids"] = torch.tensor(tokenizer(mllm.family.start + text.replace("<hole>", holder))["input_ids"])[None]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if images and family != "internvl" and int(transformers.__version__.split(".")[0]) >= 5:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == mllm._image_token).int()
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True).float().eval()
    out = model(**inputs, output_hidden_states=True)
    final = model.model(**inputs).last_hidden_state
    return out.hidden_states, final, out.logits, model.get_output_embeddings()


@pytest.mark.parametrize("with_images", [False, True])
def test_features_are_the_librarys_hidden_states(loaded, with_images):
    family, folder, mllm = loaded
    size = 56 if family == "internvl" else 4 * mllm.vision.token
    half, double = size // 2, size * 2
    images = []
    if with_images:  # of two aspect ratios where the family has them
        images = [picture(size, size)] + [picture(size, size, 1) if family == "internvl" else picture(half, double, 1)]
    features = mllm.encode("a red fox, asleep\nin snow", images, image_size=size)
    states, final, logits, head = library(family, folder, mllm, "a red fox, asleep\nin snow", images, size)
    assert features.hidden_states.shape[2] == final.shape[1]
    mine = features.hidden_states
    assert len(states) == mllm.info.layers + 1 == mine.shape[1]
    close = 2e-3 if family == "gemma4" else 2e-4  # whose states are up to 16, and one channel in thousands rounds far
    for number, state in enumerate(states[:-1]):
        text_only = family == "qwen3_vl" and number in (1, 2)  # DeepStack: in by one release's count, out by another's
        keep = features.modality[0] != Modality.IMAGE if text_only else slice(None)
        torch.testing.assert_close(mine[:, number][:, keep], state[:, keep], atol=close, rtol=close)
        assert (mine[:, number] - state)[:, keep].abs().mean() < 2e-5
    torch.testing.assert_close(mine[:, -1], final, atol=close, rtol=close)
    torch.testing.assert_close(head(mine[:, -1]), logits, atol=2.5 * close, rtol=2.5 * close)


def test_layers_above_the_highest_wanted_are_not_run(loaded):
    _, _, mllm = loaded
    images = [picture(100, 60)]
    every = mllm.encode("a fox", images, image_size=56)
    ran, hooks = [], []
    for number, layer in enumerate(mllm.backbone.model.language_model.layers):
        hooks.append(layer.register_forward_hook(lambda *_, number=number: ran.append(number)))
    try:
        some = mllm.encode("a fox", images, image_size=56, layers=[2, 0])
        assert ran == [0, 1]
        ran.clear()
        first = mllm.encode("a fox", images, image_size=56, layers=[0])
        assert ran == []
    finally:
        for hook in hooks:
            hook.remove()
    assert some.layers == (0, 2) and first.layers == (0,)
    assert torch.equal(some.hidden_states, every.hidden_states[:, [0, 2]])
    assert torch.equal(first.hidden_states, every.hidden_states[:, :1])
    with pytest.raises(MLLMError, match="expected numbers from 0"):
        mllm.encode("a fox", layers=[mllm.info.layers + 1])


def test_modality_says_what_each_token_is(loaded):
    family, _, mllm = loaded
    images = [picture(112, 112), picture(200, 60, 1)]
    features = mllm.encode("a fox", images, image_size=112, tiles=4)
    modality, index = features.modality[0], features.image_index[0]
    text = mllm.template.text("a fox", 2)
    before, after = text.split(mllm.template.turn)
    assert features.prefix == (mllm.starts + len(mllm.tokenize(before + mllm.template.turn)),)
    assert (modality[: features.prefix[0]] == Modality.TEMPLATE).all()
    tail = len(mllm.tokenize(mllm.template.tail))
    assert (modality[-tail:] == Modality.TEMPLATE).all()
    inside = modality[features.prefix[0] : -tail]
    assert Modality.TEMPLATE not in inside.tolist()
    words = after.removesuffix(mllm.template.tail).replace(mllm.family.placeholder, "")
    holes = [len(mllm.tokenize(part)) for part in after.removesuffix(mllm.template.tail).split(mllm.family.placeholder)]
    assert int((inside == Modality.TEXT).sum()) == sum(holes), words
    assert set(index[modality == Modality.IMAGE].tolist()) == {0, 1}
    if family == "internvl":  # 1 tile; 1 x 3 tiles and a thumbnail; 16 tokens each
        assert [int((index == i).sum()) for i in (0, 1)] == [16, 64]
        assert features.grids == ((ImageGrid(4, 4, (1, 1)), ImageGrid(12, 4, (3, 1), thumbnail=True)),)
    elif family == "gemma4":
        assert features.grids == ((ImageGrid(2, 2), ImageGrid(4, 1)),)
    else:
        assert features.grids == ((ImageGrid(4, 4), ImageGrid(7 if family == "qwen2_5_vl" else 6, 2)),)
    # an empty prompt is template from end to end, and its prefix is still known
    empty = mllm.encode("")
    assert empty.grids == ((),) and (empty.modality == Modality.TEMPLATE).all()
    assert empty.prefix[0] == empty.modality.shape[1] - tail
    other = mllm.encode("a fox", system_prompt="Be brief.")
    assert other.prefix[0] < features.prefix[0]


def test_features_do_not_depend_on_what_was_encoded_before(loaded):
    _, _, mllm = loaded
    images = [picture(100, 60), picture(64, 64, 1)]
    first = mllm.encode("a fox", images, image_size=84)
    mllm.encode("an owl in a very different and longer prompt", [picture(200, 300)])
    mllm.encode("no picture")
    again = mllm.encode("a fox", images, image_size=84)
    assert torch.equal(first.hidden_states, again.hidden_states)


@pytest.mark.parametrize("family", [
    pytest.param(name, marks=[pytest.mark.long] * (name in ("internvl3_5", "gemma4_31b", "qwen3_5"))) for name in BUILD
])  # fmt: skip
def test_partly_loaded_weights_give_the_same_features(folders, family, monkeypatch):
    """The host keeps what does not fit where it was and casts it at use; nothing may be left on the wrong device."""
    whole = load_folder(folders(family))
    expected = whole.encode("a fox", [picture(60, 100)], image_size=84)
    mllm = load_folder(folders(family))
    calls = []

    def partly(patchers, memory_required=0, **_):
        calls.append(memory_required)
        for patcher in patchers:
            patcher.partially_load(patcher.load_device, extra_memory=1 << 20)

    monkeypatch.setattr(backend.comfy.model_management, "load_models_gpu", partly)
    found = mllm.encode("a fox", [picture(60, 100)], image_size=84)
    assert calls and calls[0] > 0
    assert torch.equal(found.hidden_states, expected.hidden_states)


def test_what_the_host_moved_in_inference_mode_is_moved_again(tmp_path):
    """As on a small card: loaded whole, unloaded, loaded in part. Nodes run in inference mode."""
    backbone = load_folder(build_qwen25vl(tmp_path / "qwen")).backbone
    with torch.inference_mode():
        backbone.to(torch.float64)
        backbone.move_unmanaged(torch.device("meta"))
        buffers = list(backbone.buffers())
        assert buffers and all(buffer[None].float().device.type == "meta" for buffer in buffers)
    assert all(tensor.device.type == "meta" for tensor in backbone.parameters() if not tensor.is_inference())


def test_every_large_weight_is_a_leaf_the_host_can_move(loaded):
    """What is left to torch.nn would stay behind in low-VRAM mode on older hosts; it must be small."""
    family, _, mllm = loaded
    modules = mllm.backbone.named_modules()
    stay = [(name, module) for name, module in modules if not hasattr(module, "comfy_cast_weights")]
    plain = [f"{name}.{key}" for name, module in stay for key, _ in module.named_parameters(recurse=False)]
    small = ("cls_token", "position_embeddings", "lambda_1", "lambda_2", "pos_embed.weight")
    if family == "gemma4":
        small += ("norm.weight", "position_embedding_table")
    if family == "qwen3_5":
        small += ("norm.weight", "linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.conv1d.weight")
    assert all(name.endswith(small) for name in plain), plain
    assert not any("lm_head" in name for name, _ in mllm.backbone.named_parameters())
    for name, buffer in mllm.backbone.named_buffers():
        assert buffer.dtype == torch.float32 and buffer.isfinite().all(), name


@pytest.mark.parametrize("family, weight_dtype", [
    *(pytest.param(family, "fp8_e4m3fn", marks=[pytest.mark.long] * ("2_5" not in family)) for family in BUILD),
    *(("qwen2_5_vl", dtype) for dtype in ("bf16", "fp16", "fp32", "fp8_e5m2")),
])  # fmt: skip
def test_storage_type(folders, family, weight_dtype):
    """fp8 halves what the linear layers take and changes features little; all types compute in fp32 on a CPU."""
    reference = load_folder(folders(family)).encode("a fox", [picture(60, 100)], image_size=84).hidden_states
    mllm = load_folder(folders(family), weight_dtype)
    layer = mllm.backbone.model.language_model.layers[0]
    assert layer.mlp.up_proj.weight.dtype == DTYPES[weight_dtype]
    assert layer.input_layernorm.weight.dtype == torch.float32
    found = mllm.encode("a fox", [picture(60, 100)], image_size=84).hidden_states
    assert found.isfinite().all()
    error = (found - reference).norm() / reference.norm()
    assert error < {"fp8_e4m3fn": 0.2, "fp8_e5m2": 0.35}.get(weight_dtype, 1e-3)
    if weight_dtype.startswith("fp8"):
        assert error > 0


@pytest.mark.parametrize("family", [name for name in FOLDER_FAMILIES if FAMILIES[name].transformers != "4.57"])
def test_a_folder_for_newer_transformers_says_which(folders, tmp_path, monkeypatch, family):
    """As AutoConfig refuses what its release does not know."""
    shutil.copytree(folders("qwen3_vl"), tmp_path / "model")
    swapped("config.json", '"model_type": "qwen3_vl",', f'"model_type": "{family}",')(tmp_path / "model")
    words = {"<|image_pad|>": "<|image|>", "<|im_start|>": "<|turn>", "<|im_end|>": "<turn|>", "<|endoftext|>": "<bos>"}
    for old, new in words.items() if family == "gemma4" else ():
        swapped("tokenizer.json", old, new)(tmp_path / "model")
    unknown = dict(transformers.CONFIG_MAPPING.items())
    unknown.pop(family, None)
    monkeypatch.setattr("transformers.models.auto.configuration_auto.CONFIG_MAPPING", unknown)
    with pytest.raises(
        MLLMError, match=f"{family} cannot be read by transformers .*, expected {FAMILIES[family].transformers} or"
    ):
        load_folder(tmp_path / "model")


def test_gemma_4_is_refused_where_it_cannot_be_read(folders, tmp_path, monkeypatch):
    """With experts, and by a transformers that computes keys which layers share (5.5 does, without its cache)."""
    shutil.copytree(folders("gemma4"), tmp_path / "model")
    swapped("config.json", '"enable_moe_block": false', '"enable_moe_block": true')(tmp_path / "model")
    with pytest.raises(MLLMError, match="enable_moe_block is true, expected a model without experts"):
        load_folder(tmp_path / "model")
    attention = transformers.models.gemma4.modeling_gemma4.Gemma4TextAttention
    original = attention.__init__

    def as_in_5_5(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.k_proj = getattr(self, "k_proj", torch.nn.Linear(1, 1))

    monkeypatch.setattr(attention, "__init__", as_in_5_5)
    with pytest.raises(MLLMError, match="computes keys that gemma4 shares between layers, expected 5.6 or newer"):
        load_folder(folders("gemma4"))


def test_shards_and_newer_key_names_load_alike(folders, tmp_path):
    whole = load_folder(folders("qwen2_5_vl")).encode("a fox").hidden_states
    sharded = build_qwen25vl(tmp_path / "sharded", shards=3)
    assert torch.equal(load_folder(sharded).encode("a fox").hidden_states, whole)
    resaved = tmp_path / "resaved"  # as the library of this environment writes it
    model = transformers.AutoModelForImageTextToText.from_pretrained(folders("qwen2_5_vl"), local_files_only=True)
    model.save_pretrained(resaved)
    shutil.copy(folders("qwen2_5_vl") / "tokenizer.json", resaved)
    assert torch.equal(load_folder(resaved).encode("a fox").hidden_states, whole)


def test_pixels_keep_the_aspect_ratio():
    """A circle stays a circle: the fit pads instead of stretching, and the patches are in the library's order."""
    vision = FAMILIES["internvl"].vision
    wide, single, several = torch.ones(40, 160, 3), *(internvl_grid(40, 160, vision, 112, most) for most in (1, 4))
    assert (several.rows, several.columns, several.tiles, several.thumbnail) == (4, 16, (1, 4), True)
    (tile,) = internvl_tiles(wide, single, vision)
    rows = (tile[0] != 0).any(dim=1)
    assert int(rows.sum()) == 28 and bool(rows[42:70].all())
    assert len(internvl_tiles(wide, several, vision)) == 5  # 4 x 1 and a thumbnail
    assert len(internvl_tiles(wide, single, vision)) == 1
    qwen = FAMILIES["qwen2_5_vl"].vision
    grid = qwen_grid(57, 110, qwen)
    assert (grid.rows, grid.columns) == (2, 4)
    patches = qwen_pixels(picture(57, 110), grid, qwen)
    sizes = dict(h=2, w=4, mh=2, mw=2, c=3, t=2, ph=14, pw=14)
    back = rearrange(patches, "(h w mh mw) (c t ph pw) -> t c (h mh ph) (w mw pw)", **sizes)
    assert torch.equal(back[0], back[1])


def removed(pattern):
    return lambda d: [file.unlink() for file in d.glob(pattern)]


def swapped(name, old, new):
    return lambda d: (d / name).write_text((d / name).read_text("utf-8").replace(old, new), encoding="utf-8")


def resized(key, old, new):
    return swapped("config.json", f'"{key}": {old}', f'"{key}": {new}')


FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
DAMAGES = {
    "no folder": (shutil.rmtree, ["is not a folder"]),
    "no config": (removed("config.json"), ["no config.json"]),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), ["is not JSON"]),
    "other model": (resized("model_type", '"qwen2_5_vl"', '"llama"'), ["'llama'", "internvl, qwen2_5_vl, qwen3_vl"]),
    "InternVL without -hf": (resized("model_type", '"qwen2_5_vl"', '"internvl_chat"'), ["internvl_chat", "-hf"]),
    "no tokenizer": (removed("tokenizer.json"), ["no tokenizer"]),
    "other tokenizer": (swapped("tokenizer.json", "<|image_pad|>", "<|picture|>"), ["<|image_pad|>", "151655"]),
    "missing shard": (removed(SECOND), [f"{SECOND} is missing"]),
    "cut off": (lambda d: os.truncate(d / FIRST, 10**5), [f"{FIRST} is cut off: 100000 bytes, expected", "Download"]),
    "no weights": (removed("model*"), ["no *.safetensors"]),
    "only pickles": (lambda d: (removed("model*")(d), (d / "pytorch_model.bin").touch()), ["pickles (.bin)"]),
    "wider config": (resized("intermediate_size", 128, 256), ["model.layers.", "128", "256", ".safetensors"]),
    "deeper config": (resized("num_hidden_layers", 3, 4), ["language_model.layers.3.", "lack"]),
    "shallower config": (resized("num_hidden_layers", 3, 2), ["unknown key 'model.layers.2."]),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return build_qwen25vl(tmp_path_factory.mktemp("sharded") / "qwen", shards=2)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_says_what_is_wrong(sharded, tmp_path, name):
    folder = tmp_path / "qwen"
    shutil.copytree(sharded, folder)
    damage, words = DAMAGES[name]
    damage(folder)
    with pytest.raises(ValueError) as error:
        load_folder(folder)
    assert all(word in str(error.value) for word in words), error.value
