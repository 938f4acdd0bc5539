"""A DLA under the host's model management is the torch-only one; names stay inside the model folders; wrong pairs are
named."""

import os
from pathlib import Path

import comfy.ops
import pytest
import torch
from subject_dla.dla import DLAConfig, DualLayerAggregator, Features, MLLMInfo, aggregate, save_dla
from subject_dla.dla import load_dla as load_torch_only
from subject_dla.loaders import folders
from subject_dla.loaders.dla import Operations, load_dla, read_config
from subject_dla.nodes.files import missing
from subject_dla.nodes.translation import translate
from subject_dla.tests.small.features import random_features

INFO = MLLMInfo("tiny", "internvl", layers=3, width=32)


def make_features(dtype=torch.float32) -> Features:
    return random_features([[2, 2, 0, 0, 2, 1, 1, 2], [2, 2, 0, 1, 1, 1, 2, 0]], INFO, dtype=dtype)


def make_file(path, dtype=torch.float32, **changes) -> DualLayerAggregator:
    torch.manual_seed(1)
    config = {"context_width": 48, "dit": "flux", "heads": 4, **changes}
    dla = DualLayerAggregator(DLAConfig(INFO, **config), dtype=dtype)
    with torch.no_grad():
        for parameter in dla.parameters():
            parameter.normal_(std=0.3)
    save_dla(path, dla)
    return dla


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [
    {}, dict(pooling="linear", modalities="shared", refiner_blocks=1, layer_subset=(0, 3), template="drop"),
    dict(scores="heads", blocks=2),
    dict(modalities="last", vit_blend=0.5), dict(modalities="last", context_width=32),  # the last has no weights at all
])  # fmt: skip
def test_a_loaded_dla_gives_what_the_torch_only_one_gives(models, dtype, changes):
    plain = make_file(models / "models" / "dla" / "a.safetensors", dtype, **changes)
    features = make_features(dtype)
    with torch.no_grad():
        expected = aggregate(features, plain)
    dla = load_dla("a.safetensors")
    for _ in range(2):
        found = dla.aggregate(features)
        assert found.tokens.dtype == dtype and torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.attention_mask, expected.attention_mask)
        assert torch.equal(found.modality, expected.modality)
        assert torch.equal(found.image_index, expected.image_index)
    weights = dla.layer_weights(features, template="keep")
    assert torch.equal(weights, plain.layer_weights(features))
    assert dla.patcher.model is dla.model


def test_fp16_files_run_in_fp32_on_the_cpu(models):
    plain = make_file(models / "models" / "dla" / "a.safetensors", torch.float16)
    with torch.no_grad():
        expected = aggregate(make_features(), plain.float())
    dla = load_dla("a.safetensors")
    assert dla.model.compute_dtype == torch.float32
    assert torch.equal(dla.aggregate(make_features()).tokens, expected.tokens)


@pytest.mark.parametrize("form", [{"pooling": "linear"}, {"scores": "heads"}])
@pytest.mark.parametrize("lazy", [False, True])
def test_the_host_can_leave_the_weights_where_they_are(models, monkeypatch, lazy, form):
    """Low-VRAM mode: leaves are cast at use. Seen here through the dtype, since a CPU has no second device: fp16
    weights, fp32 arithmetic. `lazy`: hosts with dynamic VRAM make leaves without weights until a file is loaded."""
    plain = make_file(models / "models" / "dla" / "a.safetensors", torch.float16, **form, refiner_blocks=1)
    memory = getattr(comfy, "memory_management", None)
    if lazy and memory is not None:
        monkeypatch.setattr(memory, "aimdo_enabled", True)
    hosted = DualLayerAggregator(plain.config, dtype=torch.float16, operations=Operations)
    state = load_torch_only(models / "models" / "dla" / "a.safetensors").state_dict()
    hosted.load_state_dict(state, assign=lazy)
    if lazy and memory is not None:
        monkeypatch.setattr(memory, "aimdo_enabled", False)
    hosted.compute_dtype = torch.float32
    with torch.no_grad():
        assert torch.equal(aggregate(make_features(), hosted).tokens, aggregate(make_features(), plain.float()).tokens)


def test_lists_files_of_every_configured_root(models):
    make_file(models / "models" / "dla" / "b.safetensors")
    make_file(models / "extra" / "dla" / "a.safetensors", context_width=20)
    (models / "models" / "dla" / "notes.txt").write_text("no DLA")
    assert folders.files("dla") == ["a.safetensors", "b.safetensors"]
    assert read_config("a.safetensors").context_width == 20 and load_dla("b.safetensors").config.context_width == 48

    for sub in ("models/mllm/internvl", "extra/mllm/owner/qwen", "models/mllm/internvl/vision", "models/mllm/.cache/x"):
        (models / sub).mkdir(parents=True)
        (models / sub / "config.json").write_text("{}")
    (models / "models" / "mllm" / "empty").mkdir()
    assert folders.mllm_names() == ["internvl", "owner/qwen"]
    assert folders.find("mllm", "owner/qwen") == models / "extra" / "mllm" / "owner" / "qwen"
    assert set(map(Path, folders.roots("mllm"))) == {models / "models" / "mllm", models / "extra" / "mllm"}


def test_the_demos_models_come_last(models, monkeypatch):
    """So nothing is saved there, and a user's file of the same name is read."""
    import folder_paths

    monkeypatch.undo()
    before = {kind: list(found) for kind, (found, _) in folder_paths.folder_names_and_paths.items()}
    folders.register()
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "vae", ([*folder_paths.get_folder_paths("vae"), "/x"], {".pt"})
    )
    before["vae"] = folder_paths.get_folder_paths("vae")
    folders.register()
    for kind in ("diffusion_models", "dla", "loras", "mllm", "vae"):
        own, found = str(folders.ROOT / "demo" / "models" / kind), folder_paths.get_folder_paths(kind)
        assert found[-1] == own and found.count(own) == 1 and found[0] != own
        assert [path for path in found if path != own] == [path for path in before.get(kind, found) if path != own]
    assert folders.mllm_names() and "demo.safetensors" in folders.files("dla")


def test_the_demos_picture_is_copied_once(tmp_path, monkeypatch, caplog):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path / "input"))
    path = tmp_path / "input" / "toy-1.png"
    with caplog.at_level("INFO"):
        folders.copy_demo_picture()
        assert path.read_bytes() == (folders.ROOT / "demo" / "images" / "toy-1.png").read_bytes()
        path.write_text("the user's")
        folders.copy_demo_picture()
    assert path.read_text() == "the user's" and list(path.parent.iterdir()) == [path]
    assert [record.message for record in caplog.records] == [f"Subject DLA: copied the demo's picture to {path}"]
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("no folder")
    folders.copy_demo_picture()
    assert "the workflow `demo` lacks its picture" in caplog.text


@pytest.mark.parametrize("name", [
    "../secret.safetensors", "a/../../secret.safetensors", "..\\secret.safetensors", "C:\\secret.safetensors", "",
])  # fmt: skip
def test_no_name_leads_out_of_the_folders(models, name):
    make_file(models / "models" / "secret.safetensors")
    for path in (name, str(models / "models" / "secret.safetensors")):
        for read in (load_dla, read_config):
            with pytest.raises(ValueError, match="is no name in models/dla"):
                read(path)


def test_a_missing_name_lists_what_is_there(models):
    with pytest.raises(ValueError, match=r"has no 'x.safetensors'; it holds nothing. Put it into .*dla"):
        load_dla("x.safetensors")
    make_file(models / "models" / "dla" / "b.safetensors")
    with pytest.raises(ValueError, match=r"has no 'x.safetensors'; it holds b.safetensors"):
        load_dla("x.safetensors")
    os.rename(models / "models" / "dla" / "b.safetensors", models / "models" / "dla" / "b.pt")
    with pytest.raises(ValueError, match="'b.pt' is no DLA file: expected the extension .safetensors"):
        load_dla("b.pt")


@pytest.mark.parametrize("change", [dict(family="qwen2_5_vl"), dict(layers=4), dict(width=64)])
def test_another_mllm_is_refused(models, change):
    make_file(models / "models" / "dla" / "b.safetensors")
    dla = load_dla("b.safetensors")
    dla.check_mllm(MLLMInfo("same-model-other-folder", "internvl", 3, 32))
    other = MLLMInfo(**{"name": "other", "family": "internvl", "layers": 3, "width": 32, **change})
    with pytest.raises(ValueError) as error:
        dla.check_mllm(other)
    for part in ("'b.safetensors'", "belongs to tiny", "come from other", next(iter(change)), "Load tiny", "train one"):
        assert part in str(error.value)


def test_of_many_files_the_first_are_named(models):
    for number in range(300):
        (models / "models" / "dla" / f"{number:03}.safetensors").touch()
    for text in (missing("dla", "none"), str(pytest.raises(ValueError, load_dla, "none.safetensors").value)):
        assert "'none" in text and "019.safetensors and 280 more. Put" in text and "020" not in text
    assert "另有 280 个" in translate(missing("dla", "none"), "zh")


def test_another_dit_is_refused(models):
    from subject_dla.loaders.dla import check_dit, read_config

    make_file(models / "models" / "dla" / "b.safetensors")
    config = read_config("b.safetensors")
    for width, dit in ((48, "flux"), (None, ""), (48, ""), (None, "flux")):
        check_dit(config, "b.safetensors", width, dit)
    refused = "'b.safetensors' makes tokens 48 wide for flux.*Load a flux that reads tokens 48 wide, or a DLA trained"
    for width, dit in ((3584, "qwen_image"), (64, "flux"), (48, "flux2"), (64, "")):
        with pytest.raises(ValueError, match=refused):
            check_dit(config, "b.safetensors", width, dit)
    with pytest.raises(ValueError, match="'b.safetensors'.*; 'klein.safetensors' is flux2"):
        check_dit(config, "b.safetensors", 48, "flux2", "'klein.safetensors'")
