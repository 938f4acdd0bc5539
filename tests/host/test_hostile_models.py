"""Diffusion models, DLAs and conditionings from elsewhere that cannot be right."""

import json
import pickle
import zipfile

import comfy.sd
import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file
from subject_dla.common.bootstrap import ROOT
from subject_dla.loaders.conditioning import reference_latents
from subject_dla.loaders.dit import load_dit
from subject_dla.loaders.orient_anything.checkpoint import OrientationCheckpointError, _shares_tuples, read_state
from subject_dla.loaders.vae import load_vae
from subject_dla.tools.faults._damage import code_ran, malicious_pickle

DEMO = ROOT / "demo" / "models" / "diffusion_models"


@pytest.fixture(scope="module")
def small():
    """The demo's diffusion model, and its metadata."""
    from safetensors import safe_open

    (path,) = sorted(DEMO.glob("*.safetensors"))[:1]
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata()


@pytest.mark.parametrize(("config", "problem"), [
    ("[" * 10**5, "`unet_config` is nested too deeply"), ("{'a'}", "`unet_config` is not JSON"),
    ("[1]", r"`unet_config` is \[1\], expected a JSON object"), ('{"num_heads": NaN}', "`unet_config` is not JSON"),
    ({"num_heads": 0}, "num_heads 0, expected a size"), ({"num_heads": 10**9}, "num_heads 1000000000, expected"),
    ({"depth": 10**9}, "depth 1000000000, expected"), ({"depth": "x"}, "depth 'x', expected"),
    ({"hidden_size": -4}, "hidden_size -4, expected"), ({"axes_dim": [10**9, 1]}, "axes_dim .*, expected"),
    ({"disable_unet_model_creation": True}, "'disable_unet_model_creation' is no setting of it"),
    ({"final_layer": False}, "'final_layer' is no setting of it"), ({"theta": 0}, "theta 0, expected a size"),
    ({"num_heads": 7}, "the host knows no model"), ({"image_model": "evil"}, "the host knows no model"),
])  # fmt: skip
def test_sizes_in_a_diffusion_models_metadata_are_bounded(small, tmp_path, monkeypatch, config, problem):
    tensors, metadata = small
    if isinstance(config, dict):
        config = json.dumps(json.loads(metadata["unet_config"]) | config)
    path = tmp_path / "evil.safetensors"
    save_file(tensors, path, {**metadata, "unet_config": config})
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda kind, name: str(path))
    with pytest.raises(ValueError, match=f"evil.safetensors: .*{problem}"):
        load_dit("evil.safetensors")


@pytest.mark.parametrize("latents", [
    torch.zeros(1, 16, 8, 8), "text", 7, ["text"], [None], [[torch.zeros(1, 16, 8, 8)]], [torch.zeros(16, 8)],
    [torch.zeros(1, 16, 8, 8, dtype=torch.int32)], {"samples": torch.zeros(1, 16, 8, 8)},
])  # fmt: skip
def test_references_that_are_no_latents_are_named(latents):
    with pytest.raises(ValueError, match=r"reference_latents of a conditioning (is|holds) .*, expected .*latents \(b"):
        reference_latents({"reference_latents": latents})


def test_references_that_are_latents_are_read():
    latents = [torch.zeros(1, 16, 8, 8), torch.zeros(1, 16, 1, 8, 8, dtype=torch.bfloat16)]
    assert reference_latents({"reference_latents": latents}) == latents
    assert reference_latents({}) == reference_latents({"reference_latents": None}) == []


def test_the_demos_own_sizes_are_taken(small, tmp_path, monkeypatch):
    tensors, metadata = small
    save_file(tensors, tmp_path / "good.safetensors", metadata)
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda kind, name: str(tmp_path / name))
    config = load_dit("good.safetensors").model.model_config.unet_config
    assert json.loads(metadata["unet_config"]).items() <= config.items()


@pytest.mark.parametrize(("dtype", "bits"), [
    (torch.float32, None), (torch.bfloat16, None), (torch.float8_e4m3fn, 0xFF), (torch.float8_e5m2, 0x7C),
])  # fmt: skip
def test_a_weight_that_is_no_number_is_named_before_the_host_loads_it(small, tmp_path, monkeypatch, dtype, bits):
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda kind, name: str(tmp_path / name))
    monkeypatch.setattr(comfy.sd, "load_diffusion_model", lambda path, **options: "loaded")
    tensors = {key: tensor.to(dtype) for key, tensor in small[0].items()}
    save_file(tensors, tmp_path / "plain.safetensors")
    assert load_dit("plain.safetensors") == "loaded"
    key = "double_blocks.0.img_attn.qkv.weight"
    last = tensors[key].view(-1)[-1:]
    last.view(torch.uint8).fill_(bits) if bits else last.fill_(torch.inf)
    save_file(tensors, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=f"plain.safetensors: '{key}' holds values that are NaN or infinite"):
        load_dit("plain.safetensors")


def test_whole_numbers_are_weights_where_a_scale_is_beside_them_alone(small, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda kind, name: str(tmp_path / name))
    monkeypatch.setattr(comfy.sd, "load_diffusion_model", lambda path, **options: "loaded")
    key = "double_blocks.0.img_attn.qkv."
    tensors = small[0] | {key + "weight": small[0][key + "weight"].to(torch.int8)}
    save_file(tensors, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=f"plain.safetensors: {key}weight is I8, expected floating-point numbers"):
        load_dit("plain.safetensors")
    for scale in ("weight_scale", "weight.absmax", "SCB"):
        save_file(tensors | {key + scale: torch.ones(1)}, tmp_path / "plain.safetensors")
        assert load_dit("plain.safetensors") == "loaded"


@pytest.mark.parametrize("kind, load", [("diffusion_models", load_dit), ("vae", load_vae)])
@pytest.mark.parametrize(
    "content", [malicious_pickle(), b"", b"\x89PNG\r\n\x1a\n" + bytes(99)], ids=["code", "empty", "a picture"]
)
def test_a_ckpt_that_the_host_cannot_load_is_named_and_its_code_not_run(tmp_path, monkeypatch, kind, load, content):
    (tmp_path / "evil.ckpt").write_bytes(content)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path)], {".ckpt"}))
    with pytest.raises(ValueError, match="evil.ckpt: the host cannot load it") as error:
        load("evil.ckpt")
    assert not code_ran() and "weights_only" not in str(error.value) and "\n" not in str(error.value)


def test_a_pt_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        with archive.open("archive/data/0", "w") as record:
            for _ in range(200):
                record.write(bytes(10**6))
    with pytest.raises(OrientationCheckpointError, match="bomb.pt.*unpacks to 200,.* bytes from"):
        read_state(tmp_path / "bomb.pt")
    (tmp_path / "bomb.pt").write_bytes((tmp_path / "bomb.pt").read_bytes()[:-30] + bytes(30))
    with pytest.raises(OrientationCheckpointError, match="bomb.pt"):
        read_state(tmp_path / "bomb.pt")


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("blocks", [["double_blocks.4999.x"], [f"single_blocks.{number}.x" for number in range(600)]])
def test_blocks_of_nothing_are_not_built(small, tmp_path, monkeypatch, declared, blocks):
    """20,000 of them, 2 MB, kept the host building for minutes."""
    tensors, metadata = small
    path = tmp_path / "evil.safetensors"
    save_file({**tensors, **{key: torch.zeros(0) for key in blocks}}, path, metadata if declared else {})
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda kind, name: str(path))
    with pytest.raises(ValueError, match="evil.safetensors: it has a block (4999|599), expected less than 512"):
        load_dit("evil.safetensors")


def test_an_empty_mark_of_scaled_weights_is_taken(small, tmp_path, monkeypatch):
    tensors, metadata = small
    save_file({**tensors, "other": torch.zeros(0)}, tmp_path / "good.safetensors", metadata)
    monkeypatch.setattr(folder_paths, "get_full_path_or_raise", lambda kind, name: str(tmp_path / name))
    assert load_dit("good.safetensors")


@pytest.mark.parametrize("packed", [True, False])
def test_tuples_in_tuples_are_not_hashed(tmp_path, packed):
    """200 bytes of a .pt: a key of 2^60 values."""
    nested = b"".join(b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(60))
    data = b"\x80\x02}X\x01\0\0\0a\x85q\0" + nested + b"K\x01s."
    (tmp_path / "a.pt").write_bytes(data)
    if packed:
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\n")
    with pytest.raises(OrientationCheckpointError, match="a.pt.*holds tuples in tuples"):
        read_state(tmp_path / "a.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_writes_shares_no_tuples(tmp_path, zipped):
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
    torch.save(module.state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert not _shares_tuples(tmp_path / "a.pt")
