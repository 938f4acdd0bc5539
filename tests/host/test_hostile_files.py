"""Files from elsewhere that name other files or code, and pictures of forms that would take all memory."""

import json
import shutil

import folder_paths
import pytest
import torch
import transformers
from safetensors.torch import load_file
from subject_dla.common.drawing.sheet import labelled_sheet, to_picture
from subject_dla.common.images import ImageError
from subject_dla.loaders import reference_latents
from subject_dla.loaders.embedders import FolderEmbedder
from subject_dla.loaders.mllm.base import MLLMError
from subject_dla.loaders.mllm.checkpoint import read_info
from subject_dla.loaders.mllm.huggingface import load_folder
from subject_dla.loaders.preprocessing import DINO, preprocess, preprocess_subject
from subject_dla.tests.small.mllm import build_qwen25vl


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_qwen25vl(tmp_path_factory.mktemp("mllm") / "qwen", width=64, dtype=torch.float32, shards=2)


def copied(folder, tmp_path, index=None, **config):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    if index:
        path = copy / "model.safetensors.index.json"
        found = json.loads(path.read_text())
        name = sorted(set(found["weight_map"].values()))[0]
        text = path.read_text().replace(json.dumps(name), json.dumps(index))
        path.write_text(text)
        if isinstance(index, str) and index.startswith("../"):
            shutil.copyfile(folder / name, copy / index)
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return copy


@pytest.mark.parametrize("name", ["../outside.safetensors", "/tmp/x.safetensors", "C:\\x.safetensors", "a/b", 7, ["x"]])
def test_an_index_names_files_of_its_own_folder_alone(folder, tmp_path, name):
    with pytest.raises(MLLMError, match="index.json (names|is damaged)"):
        load_folder(copied(folder, tmp_path, name))


def test_whole_weights_beside_a_stale_index_are_read_as_transformers_reads_them(folder, tmp_path):
    whole = build_qwen25vl(tmp_path / "whole", width=64, dtype=torch.float32)
    expected = load_folder(whole).encode("a fox").hidden_states
    shutil.copyfile(folder / "model.safetensors.index.json", whole / "model.safetensors.index.json")
    assert torch.equal(load_folder(whole).encode("a fox").hidden_states, expected)


@pytest.mark.parametrize("size", [0, -1, 10**9])
@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers"])
def test_a_size_that_no_mllm_has_is_refused_with_the_files_name(folder, tmp_path, field, size):
    path = copied(folder, tmp_path)
    config = json.loads((path / "config.json").read_text())
    config.get("text_config", config)[field] = size
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MLLMError, match=f"copy/config.json: .*{size}"):
        read_info(path)


@pytest.fixture
def no_kernels(monkeypatch):
    """With the package `kernels`, transformers fetches and runs what an attention of this form names: told at once."""

    def fetch(*names, **options):
        raise AssertionError(f"code was fetched: {names}")

    for module in (transformers.modeling_utils, transformers.integrations.hub_kernels):
        for name in ("load_and_register_kernel", "load_and_register_attn_kernel", "get_kernel"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, fetch)
    monkeypatch.setattr(transformers.modeling_utils, "is_kernels_available", lambda *_: True, raising=False)


EVIL = {"_attn_implementation": "owner/repo", "attn_implementation": "owner/repo", "auto_map": {"AutoModel": "x.Evil"}}


def test_an_mllm_folder_does_not_choose_its_attention(folder, tmp_path, no_kernels):
    mllm = load_folder(copied(folder, tmp_path, **EVIL))
    assert torch.equal(mllm.encode("a fox").hidden_states, load_folder(folder).encode("a fox").hidden_states)


@pytest.mark.parametrize("kind", ["dino", "clip"])
def test_a_folder_of_models_for_scores_does_not_choose_its_attention(tmp_path, monkeypatch, no_kernels, kind):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "dino":
        model = transformers.ViTModel(transformers.ViTConfig(**small), add_pooling_layer=False)
    else:
        parts = {"text_config": small, "vision_config": {**small, "patch_size": 32}, "projection_dim": 16}
        model = transformers.CLIPModel(transformers.CLIPConfig(**parts))
    model.save_pretrained(tmp_path / "evil")
    path = tmp_path / "evil" / "config.json"
    config = json.loads(path.read_text()) | EVIL
    for part in ("text_config", "vision_config"):
        if part in config:
            config[part] |= EVIL
    path.write_text(json.dumps(config))
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda _: [str(tmp_path)])
    embedder = FolderEmbedder("evil", kind)
    weights = load_file(tmp_path / "evil" / "model.safetensors")
    assert weights and bool(embedder.image(torch.rand(32, 32, 3)).isfinite().all())
    configs = [module.config for module in embedder.model.modules() if hasattr(module, "config")]
    assert {config._attn_implementation for config in configs} == {"sdpa"}


@pytest.mark.parametrize("height, width", [(1, 20_000), (20_000, 1), (3, 3_000)])
def test_a_slender_picture_is_refused_before_it_is_enlarged(height, width):
    with pytest.raises(ImageError, match="200:1"):
        preprocess(torch.zeros(height, width, 3), DINO)
    with pytest.raises(ImageError, match="200:1"):
        preprocess_subject(torch.zeros(height, width, 3))


def test_a_slender_subject_is_cut_out_in_bounded_memory():
    mask = torch.zeros(64, 20_000)
    mask[30:34, 100:19_900] = 1
    assert preprocess_subject(torch.rand(64, 20_000, 3), mask).shape == (3, 224, 224)


def test_a_sheet_shows_slender_pictures():
    pictures = [to_picture(torch.rand(1, 5_000, 3)), to_picture(torch.rand(5_000, 1, 3))]
    assert labelled_sheet(pictures, ["a", "b"]).height < 1000


def test_a_mask_of_booleans_is_taken():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:6] = True
    (found,) = reference_latents._masks(mask, 1, "mask")
    assert torch.equal(found, mask.float())
