"""Hugging Face folders from elsewhere: what other programs write is read, what cannot be is named in bounded time."""

import json
import os
import shutil
import struct
from pathlib import Path

import comfy
import folder_paths
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from subject_dla.loaders.embedders import EmbedderError, FolderEmbedder
from subject_dla.loaders.mllm.base import MLLMError
from subject_dla.loaders.mllm.huggingface import load_folder
from subject_dla.nodes.files import fingerprint
from subject_dla.tests.small.measure import build_measures
from subject_dla.tests.small.mllm import build_internvl, build_qwen3vl, build_qwen25vl

COMFYUI = Path(comfy.__path__[0]).parent
DOWN = "model.layers.0.mlp.down_proj."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_qwen25vl(tmp_path_factory.mktemp("mllm") / "qwen", width=64, dtype=torch.float32)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def expected(folder):
    return load_folder(folder).encode("a fox").hidden_states


def changed_config(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in values.items():
        part, _, last = name.rpartition("__")
        (config[part] if part else config)[last] = value
    path.write_text(json.dumps(config))


def changed_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", [
    {"torch_dtype": "auto"}, {"torch_dtype": "torch.float32"}, {"dtype": "float32"}, {"torch_dtype": None},
    {"torch_dtype": "evil.dtype"}, {"torch_dtype": 7},
])  # fmt: skip
def test_the_dtype_of_a_config_is_read_however_it_is_written(expected, copy, dtype):
    config = json.loads((copy / "config.json").read_text())
    del config["torch_dtype"]
    (copy / "config.json").write_text(json.dumps(config | dtype))
    assert torch.equal(load_folder(copy).encode("a fox").hidden_states, expected)


def test_weights_that_head_and_embedding_share_are_read_under_either_name(tmp_path):
    folder = build_qwen3vl(tmp_path / "qwen", width=64, dtype=torch.float32)
    expected = load_folder(folder).encode("a fox").hidden_states
    name = "model.language_model.embed_tokens.weight"
    changed_weights(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop(name)}))
    with pytest.raises(MLLMError, match="lack 1 of .*embed_tokens"):
        load_folder(folder)
    changed_config(folder, tie_word_embeddings=True)
    assert torch.equal(load_folder(folder).encode("a fox").hidden_states, expected)


def gptq(tensors):
    weight = tensors.pop(DOWN + "weight")
    for name in ("g_idx", "qweight", "qzeros", "scales"):
        tensors[DOWN + name] = torch.zeros(weight.shape[1] // 8, weight.shape[0], dtype=torch.int32)


def bitsandbytes(tensors):
    tensors[DOWN + "weight"] = tensors[DOWN + "weight"].to(torch.int8)
    tensors |= {DOWN + "SCB": torch.ones(64), DOWN + "weight_format": torch.zeros((), dtype=torch.uint8)}


def compressed_tensors(tensors):
    weight = tensors.pop(DOWN + "weight")
    tensors[DOWN + "weight_packed"] = torch.zeros(weight.shape[0], weight.shape[1] // 8, dtype=torch.int32)
    tensors[DOWN + "weight_shape"] = torch.tensor([*weight.shape])


@pytest.mark.parametrize("layout", [gptq, bitsandbytes, compressed_tensors])
def test_quantised_weights_are_called_so(copy, layout):
    changed_weights(copy, layout)
    with pytest.raises(MLLMError, match="model.safetensors: key '.*' is of quantised weights"):
        load_folder(copy)


@pytest.mark.parametrize(("name", "value"), [
    ("num_hidden_layers", 10**9), ("vision_config__depth", 10**9), ("num_attention_heads", 0),
    ("num_key_value_heads", 10**9), ("head_dim", 10**9), ("hidden_size", "64"), ("vision_config__patch_size", 0),
    ("vocab_size", -1), ("text_config", [1]), ("vision_config", None), ("partial_rotary_factor", 1e9),
    ("rope_scaling", {"partial_rotary_factor": 1e9}), ("hidden_act", "evil"), ("rms_norm_eps", {"a": 1}),
    ("rope_theta", -1), ("torch_dtype", {"a": 1e400}),
])  # fmt: skip
def test_sizes_are_compared_before_anything_is_built(copy, name, value):
    changed_config(copy, **{name: value})
    with pytest.raises(MLLMError, match="config.json.* (is|builds) "):
        load_folder(copy)


@pytest.mark.parametrize(("key", "shape", "config"), [
    ("model.layers.9999998.x", (0, 2), {"num_hidden_layers": 10**7}),  # would be built for days
    ("extra.weight", (0, 10**9), {"vision_config__hidden_size": 10**9, "vision_config__num_heads": 1}),  # 3 GB
])  # fmt: skip
def test_a_tensor_of_nothing_proves_no_size(copy, key, shape, config):
    changed_weights(copy, lambda tensors: tensors.update({key: torch.zeros(shape)}))
    changed_config(copy, **config)
    with pytest.raises(MLLMError, match="config.json: .*_(layers|size) is 10*, expected a whole number"):
        load_folder(copy)


def test_layers_of_next_to_nothing_prove_no_more_than_an_mllm_can_have(copy):
    more = {f"model.layers.{number}.x": torch.zeros(1) for number in range(20_000)}
    changed_weights(copy, lambda tensors: tensors.update(more))
    changed_config(copy, num_hidden_layers=20_000)
    with pytest.raises(MLLMError, match="num_hidden_layers is 20000, expected a whole number from 1 to 1,024"):
        load_folder(copy)


def changed_tokenizer(folder, **parts):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer.update(parts)
    path.write_text(json.dumps(tokenizer))


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


@pytest.mark.parametrize("parts", [
    {"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 40}},
    {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [REPLACE] * 5}] * 8}},
    {"normalizer": REPLACE | {"pattern": {"String": ""}, "content": "x" * 10**6}},
    {"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 40}},
])  # fmt: skip
def test_a_tokenizer_that_makes_texts_endless_is_refused(copy, parts):
    changed_tokenizer(copy, **parts)
    with pytest.raises(MLLMError, match="tokenizer.json makes a text up to .* times as long, expected at most 64"):
        load_folder(copy)


def test_a_tokenizer_that_panics_ends_a_prompt_alone(copy):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    changed_tokenizer(copy, pre_tokenizer=split)
    mllm = load_folder(copy)
    with pytest.raises(MLLMError, match="tokenizer.json does not split this prompt"):
        mllm.encode("a" * 60 + "b")


def test_a_token_that_the_model_has_not_is_named(copy):
    path = copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["x"] = 10**6
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(MLLMError, match="gives the token 1000000, expected one below 152064"):
        load_folder(copy).encode("x")


def test_labels_of_a_config_are_not_made(copy):
    """A hundred million took 3 GB and half a minute."""
    changed_config(copy, num_labels=10**8, return_dict=False, vision_config__num_labels=10**8)
    assert load_folder(copy).encode("a fox", [torch.rand(56, 56, 3)]).hidden_states.isfinite().all()


@pytest.mark.parametrize("part", [
    {"text_config": {"model_type": "gpt2", "n_positions": 200_000}},  # a mask of 40 GB
    {"text_config": {"model_type": "qwen2_moe", "num_experts": 10**6, "hidden_size": 64}},
    {"vision_config": {"model_type": "timm_wrapper", "architecture": "hf-hub:owner/repo"}},  # which timm would fetch
])  # fmt: skip
def test_a_folder_chooses_no_other_architecture_for_a_part(tmp_path, part):
    folder = build_internvl(tmp_path / "internvl")
    changed_config(folder, **part)
    with pytest.raises(
        MLLMError, match="config.json: (text|vision)_config's model_type is '.*', expected (qwen2|inter)"
    ):
        load_folder(folder)


@pytest.mark.parametrize(("name", "value"), [
    ("rope_scaling", 0), ("rope_scaling", None), ("rope_scaling__mrope_section", "text"),
    ("rope_scaling__mrope_section", [-1, 9]), ("vision_config__window_size", 0), ("vision_config__window_size", -1),
])  # fmt: skip
def test_what_transformers_finds_when_it_runs_the_model_names_the_config(copy, name, value):
    changed_config(copy, **{name: value})
    words = "(transformers .* cannot run qwen2_5_vl as it says .*Download|.* cannot be read by transformers 4)"
    with pytest.raises(MLLMError, match=f"copy/config.json: {words}"):
        load_folder(copy).encode("a fox", [torch.rand(64, 64, 3)])


def test_a_prompt_for_which_there_is_no_memory_is_the_hosts_to_report(copy, monkeypatch):
    def full(*given, **options):
        raise torch.OutOfMemoryError("Allocation on device")

    mllm = load_folder(copy)
    monkeypatch.setattr(mllm.backbone, "states", full)
    with pytest.raises(torch.OutOfMemoryError):
        mllm.encode("a fox")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(copy, value):
    changed_weights(copy, lambda tensors: tensors[DOWN + "weight"].flatten()[7:8].fill_(value))
    with pytest.raises(MLLMError, match=f"model.safetensors: '{DOWN}weight' holds values that are NaN or infinite"):
        load_folder(copy)


def padded(path):
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    header["__metadata__"] = {"long": "x" * 50_000_000}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


DAMAGES = {
    "pipe as weights": ("model.safetensors", os.mkfifo, "is a pipe"),
    "pipe as tokenizer": ("tokenizer.json", os.mkfifo, "is a pipe"),
    "pipe beside": ("chat_template.json", os.mkfifo, "is a pipe"),
    "folder as tokenizer": ("tokenizer.json", os.mkdir, "is a folder"),
    "device as config": ("config.json", lambda path: path.symlink_to("/dev/zero"), "has no config.json"),
    "tokenizer of a number": ("tokenizer.json", lambda path: path.write_text("7"), "tokenizer.json is 7, exp"),
    "config of a list": ("config.json", lambda path: path.write_text("[]"), "config.json is .., expected a JSON ob"),
    "deep config": ("config.json", lambda path: path.write_text("[" * 10**5), "config.json is nested too deeply"),
    "index of a list": ("model.safetensors.index.json", lambda path: path.write_text("[]"), "index.json is .., exp"),
    "map of a list": ("model.safetensors.index.json", lambda path: path.write_text("{}"), "weight_map is None"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_files_that_are_none_are_named(copy, name):
    file, make, problem = DAMAGES[name]
    (copy / file).unlink(missing_ok=True)
    if "index" in file:
        (copy / "model.safetensors").rename(copy / "model-1.safetensors")
    make(copy / file)
    with pytest.raises(MLLMError, match=problem):
        load_folder(copy)


def test_metadata_without_end_are_refused(copy):
    padded(copy / "model.safetensors")
    with pytest.raises(MLLMError, match="model.safetensors has a header of 50,.* bytes, expected at most"):
        load_folder(copy)


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    """Small folders of DINO, DINOv2 and CLIP."""
    root = tmp_path_factory.mktemp("clip_vision")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    parts = {"text_config": small, "vision_config": {**small, "patch_size": 32}, "projection_dim": 16}
    transformers.ViTModel(transformers.ViTConfig(**small), add_pooling_layer=False).save_pretrained(root / "vit")
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    transformers.Dinov2Model(config).save_pretrained(root / "dinov2")
    transformers.CLIPModel(transformers.CLIPConfig(**parts)).save_pretrained(root / "clip")
    return root


def first(tensors):
    return next(key for key, tensor in tensors.items() if tensor.ndim > 1)


FAULTS = {
    "NaN": (lambda d: changed_weights(d, lambda t: t[first(t)].fill_(float("nan"))), "NaN or infinite"),
    "int8": (lambda d: changed_weights(d, lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()})), "is I8"),
    "other shape": (lambda d: changed_weights(d, lambda t: t.update({first(t): torch.ones(3, 5)})), "transformers"),
    "layers": (lambda d: changed_config(d, num_hidden_layers=10**9, vision_config={"depth": 10**9}), "config.json: "),
    "heads": (lambda d: changed_config(d, num_attention_heads=0, projection_dim=0), "config.json: "),
    "patches": (
        lambda d: changed_config(d, image_size=4000, patch_size=1, vision_config={"image_size": 4000, "patch_size": 1}),
        "config.json: image_size is 4000 and patch_size 1, 16,000,000 patches",
    ),
    "text": (lambda d: changed_config(d, image_size="x", text_config="x"), "config.json: "),
    "activation": (lambda d: changed_config(d, hidden_act=7, text_config={"hidden_act": 7}), "config.json: "),
    "adapter": (lambda d: (d / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}'), None),
    "pickle": (lambda d: (d / "model.safetensors").write_bytes(b"\x80\x02"), "is a pickle"),
    "only pickles": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "only as pickles"),
    "pipe": (lambda d: os.mkfifo(d / "preprocessor_config.json"), "is a pipe"),
}


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_damaged_folder_of_dino_or_clip_is_named(scorers, tmp_path, monkeypatch, kind, name):
    shutil.copytree(scorers / kind, tmp_path / kind)
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda _: [str(tmp_path)])
    damage, problem = FAULTS[name]
    damage(tmp_path / kind)
    if problem is None:
        assert FolderEmbedder(kind, "clip" if kind == "clip" else "dino").image(torch.rand(32, 32, 3)).isfinite().all()
        return
    with pytest.raises(EmbedderError, match=f"{kind}.*{problem}"):
        FolderEmbedder(kind, "clip" if kind == "clip" else "dino")


@pytest.mark.parametrize(("file", "content", "problem"), [
    ("vocab.json", None, "clip has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt"),
    ("tokenizer_config.json", {"vocab_file": __file__}, "vocab_file is .*, expected a file of its own folder"),
    ("tokenizer_config.json", {"tokenizer_file": "/long/gone"}, None),  # of the machine that it was saved on
])  # fmt: skip
def test_clips_tokenizer_is_that_of_its_folder(tmp_path, monkeypatch, file, content, problem):
    """Where there is none, transformers 5 makes an empty one: all prompts are alike. 4 reads what its config names."""
    folder = build_measures(tmp_path, COMFYUI) / "clip_vision" / "clip"
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda _: [str(folder.parent)])
    good = FolderEmbedder("clip", "clip").text("a fox")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(json.dumps(content))
    if problem is None:
        assert torch.equal(FolderEmbedder("clip", "clip").text("a fox"), good)
        return
    with pytest.raises(EmbedderError, match=problem):
        FolderEmbedder("clip", "clip").text("a fox")


def test_an_mllms_tokenizer_is_that_of_its_folder(copy):
    (copy / "tokenizer.json").rename(copy / "elsewhere.json")
    for name in ("vocab.json", "merges.txt"):
        (copy / name).write_text("{}")
    (copy / "tokenizer_config.json").write_text(json.dumps({"vocab_file": __file__}))
    with pytest.raises(MLLMError, match="tokenizer_config.json: vocab_file is .*, expected a file of its own folder"):
        load_folder(copy)


def test_a_tokenizer_of_clip_is_checked_as_well(scorers, tmp_path, monkeypatch):
    shutil.copytree(scorers / "clip", tmp_path / "clip")
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda _: [str(tmp_path)])
    tokenizer = {"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 40}}
    (tmp_path / "clip" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(EmbedderError, match="clip/tokenizer.json makes a text up to .* times as long"):
        FolderEmbedder("clip", "clip").text("a fox")


def test_a_link_to_nothing_in_a_folder_does_not_have_it_loaded_anew(copy, monkeypatch):
    """The host logs an error of a fingerprint, and takes the node for changed in every prompt."""
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda _: [str(copy.parent)])
    before = fingerprint("mllm", "copy")
    (copy / "model-2.safetensors").symlink_to(copy / "nothing")
    assert fingerprint("mllm", "copy") == fingerprint("mllm", "copy") != before
