"""A DLA survives its file; every damaged or wrong file says what is the matter, each in its own words."""

import json
import os
import pickle
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from subject_dla.dla import DLAConfig, DualLayerAggregator, MLLMInfo
from subject_dla.dla.checkpoint import DLACheckpointError, describe, load_dla, read_config, save_dla
from subject_dla.dla.features import StockContext
from subject_dla.tests.small.features import random_features

INFO = MLLMInfo("tiny", "internvl", layers=3, width=16, drop_leading_template=False)
CONFIG = DLAConfig(INFO, 24, "flux", heads=4, scores="states", provenance={"steps": 5})
SCORE, QKV = "pooling.text.score.weight", "pooling.image.blocks.0.attention.qkv.weight"


def saved(path, config=CONFIG, dtype=torch.float32, spread=0.0):
    dla = DualLayerAggregator(config, dtype=dtype)
    for parameter in dla.parameters():
        parameter.data += spread * torch.randn_like(parameter)
    save_dla(path, dla)
    return dla


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [
    {},
    dict(pooling="linear", modalities="shared", refiner_blocks=2, layer_subset=(0, 2, 3), template="drop"),
    dict(modalities="last", vit_blend=0.25, context_width=16),  # no weight at all
])  # fmt: skip
def test_save_and_load_give_the_same_dla(tmp_path, dtype, changes):
    config = replace(CONFIG, provenance={"a": [1]}, **changes)
    dla = saved(tmp_path / "a.safetensors", config, dtype, 0.3)
    loaded = load_dla(tmp_path / "a.safetensors")
    assert loaded.config == config == read_config(tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == ["a.safetensors"]  # nothing temporary stays
    for key, value in dla.state_dict().items():
        assert loaded.state_dict()[key].dtype == dtype and torch.equal(loaded.state_dict()[key], value)
    features = random_features([[0, 1]], INFO)
    assert torch.equal(loaded(features), dla(features))


def test_a_file_without_scores_is_of_the_form_of_0_1_0_and_a_new_dla_is_scored_by_heads(tmp_path):
    values = CONFIG.to_dict()
    assert "scores" not in values and DLAConfig.from_dict(values).scores == "states"
    assert (
        DLAConfig(INFO, 24).to_dict()["scores"] == "heads" == DLAConfig.from_dict({**values, "scores": "heads"}).scores
    )
    for nothing_scored in (dict(pooling="linear"), dict(modalities="last")):  # files that 0.1.0 reads
        new = DLAConfig(INFO, 24, **nothing_scored)
        assert "scores" not in new.to_dict() and new == DLAConfig.from_dict(new.to_dict())
    saved(tmp_path / "a.safetensors", CONFIG)
    assert QKV in load_file(tmp_path / "a.safetensors") and load_dla(tmp_path / "a.safetensors").config == CONFIG


def test_a_dla_scored_by_heads_keeps_its_form(tmp_path):
    config = replace(CONFIG, scores="heads")
    dla = saved(tmp_path / "a.safetensors", config, spread=0.3)
    loaded, features = load_dla(tmp_path / "a.safetensors"), random_features([[0, 1]], INFO)
    assert loaded.config == config and loaded.state_dict().keys() == dla.state_dict().keys()
    # a file's weights lie elsewhere in memory, which the batched products may round differently
    torch.testing.assert_close(loaded(features), dla(features))


def test_the_last_layer_before_its_norm_comes_in_the_place_of_the_one_after_it(tmp_path):
    config = replace(CONFIG, before_norm=True)
    assert config.pooled_layers == (0, 1, 2, 4) and replace(config, modalities="last").pooled_layers == (4,)
    assert not {"before_norm", "scores"} & set(CONFIG.to_dict())  # which earlier versions refuse
    saved(tmp_path / "a.safetensors", config)
    dla = load_dla(tmp_path / "a.safetensors")
    assert dla.config == config
    features = random_features([[0, 1]], INFO)
    hidden = torch.cat((features.hidden_states, torch.randn_like(features.hidden_states[:, :1])), 1)
    stock = StockContext(normed=False)
    features = replace(features, hidden_states=hidden, layers=(0, 1, 2, 3, 4), stock=stock)
    assert torch.equal(dla(features)[..., :16], features.layer(4))
    with pytest.raises(ValueError, match="Layer 4 .* layers 0-3"):
        dla(random_features([[0, 1]], INFO))


def test_a_failed_save_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    dla = saved(path)
    before = path.read_bytes()
    dla.project.weight.data[0, 0] = float("nan")
    with pytest.raises(DLACheckpointError, match="a.safetensors.*project.weight has 1 of 384"):
        save_dla(path, dla)

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("subject_dla.common.files.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        save_dla(path, DualLayerAggregator(CONFIG))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


def test_describe_tells_what_it_belongs_to():
    text = describe(CONFIG)
    parts = ("tiny (internvl, 3 layers, width 16)", "context width 24, for flux", "dual", "layers 0-3", "steps 5")
    assert all(part in text for part in parts), text


# Damage: each makes a good file wrong, and names the words that must be in its message.


def write_bytes(content):
    return lambda path: path.write_bytes(content)


def write_tensor(key):
    return lambda path: save_file({key: torch.zeros(2)}, path)


def edit(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def metadata(value, change=lambda tensors: tensors):
    return lambda path: save_file(change(load_file(path)), path, metadata=value)


def state(change):
    return metadata({"subject_dla": json.dumps(CONFIG.to_dict())}, change)


def config(**changes):
    """Config entries changed (... = taken out), weights as they were."""
    values = {key: value for key, value in {**CONFIG.to_dict(), **changes}.items() if value is not ...}
    return metadata({"subject_dla": json.dumps(values)})


def with_value(key, value):
    def change(tensors):
        tensors[key].view(-1)[:2] = value
        return tensors

    return state(change)


DAMAGED = {
    "does not exist": (lambda path: path.unlink(), ["does not exist"]),
    "empty": (write_bytes(b""), ["is empty", "0 bytes"]),
    "folder": (lambda path: (path.unlink(), path.mkdir()), ["is a folder"]),
    "web page": (write_bytes(b"\n<!DOCTYPE html><html>Sign in</html>"), ["web page", "login"]),
    "lfs pointer": (write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), ["Git LFS pointer"]),
    "renamed .pt": (lambda path: torch.save({"state_dict": {"a": torch.zeros(1)}}, path), ["zip archive", ".pt"]),
    "renamed pickle": (write_bytes(pickle.dumps({"a": 1}, protocol=2)), ["a pickle", ".ckpt"]),
    "renamed gguf": (write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64)), ["GGUF"]),
    "a picture": (write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64)), ["is a PNG picture, expected a .safetensors file"]),
    "not safetensors": (write_bytes(b"\x07" * 64), ["not a .safetensors file", "Download or save it again"]),
    "header cut off": (edit(lambda content: content[:60]), ["cut off inside its header", "60 bytes"]),
    "header damaged": (write_bytes(struct.pack("<Q", 12) + b'{"a": [1, 2,'), ["damaged .safetensors header"]),
    "data cut off": (edit(lambda content: content[:-100]), ["is cut off: ", "expected"]),
    "data appended": (edit(lambda content: content + b"0"), ["bytes too many"]),
    "no metadata": (metadata(None), ["no entry 'subject_dla'", "a file that Train DLA made"]),
    "a LoRA": (write_tensor("double_blocks.0.lora_A.weight"), ["looks like a LoRA", "models/loras"]),
    "a DiT": (
        write_tensor("double_blocks.0.img_attn.qkv.weight"), ["looks like a diffusion model", "models/diffusion_models"]
    ),
    "a VAE": (write_tensor("decoder.conv_in.weight"), ["looks like a VAE", "models/vae"]),
    "an MLLM": (write_tensor("model.embed_tokens.weight"), ["looks like a language model"]),
    "metadata no JSON": (metadata({"subject_dla": "{'heads': 8}"}), ["is not JSON"]),
    "metadata no object": (metadata({"subject_dla": "[1, 2]"}), ["is [1, 2]", "expected a JSON object"]),
    "newer format": (config(format_version=2), ["format_version is 2", "expected 1"]),
    "unknown pooling": (config(pooling="mean"), ["pooling is 'mean'", "softmax, linear"]),
    "unknown modalities": (config(modalities="triple"), ["modalities is 'triple'"]),
    "unknown entry": (config(dropout=0.1), ["unknown entry 'dropout'"]),
    "missing entry": (config(context_width=...), ["'context_width' is missing"]),
    "no MLLM": (config(mllm="tiny"), ["mllm is 'tiny'"]),
    "MLLM without width": (config(mllm={"name": "a", "family": "b", "layers": 3}), ["mllm entry 'width' is missing"]),
    "MLLM of an endless name": (
        config(mllm={**CONFIG.to_dict()["mllm"], "name": "a" * 9999}), ["MLLM name is 'aaa", "at most 255 letters"]
    ),
    "DiT of an endless name": (config(dit="b" * 9999), ["dit is 'bbb", "expected a family name"]),
    "MLLM of no layers": (config(mllm={**CONFIG.to_dict()["mllm"], "layers": 0}), ["MLLM layers is 0"]),
    "subset out of range": (config(layer_subset=[0, 4]), ["layer_subset is [0, 4]", "from 0 to 3"]),
    "heads": (config(heads=5), ["heads is 5", "divisor", "16"]),
    "no truth": (config(before_norm=1), ["before_norm is 1", "true or false"]),
    "absurd size": (config(blocks=10**9), ["blocks is 1000000000"]),
    "missing key": (state(lambda t: {k: v for k, v in t.items() if k != SCORE}), [SCORE, "is missing"]),
    "extra key": (state(lambda t: {**t, "pooling.audio.score.weight": torch.zeros(1)}), ["pooling.audio"]),
    "renamed key": (
        state(lambda t: {k.replace("score", "scores"): v for k, v in t.items()}),
        ["pooling.image.scores.weight", "other names", "expected 'pooling.image.score.weight'"],
    ),
    "prefixed keys": (state(lambda t: {"module." + k: v for k, v in t.items()}), ["all keys begin with 'module'"]),
    "wrong shape": (
        state(lambda t: {**t, SCORE: torch.zeros(1, 15)}), [f"{SCORE} has shape [1, 15]", "expected [1, 16]"]
    ),
    "config of another": (config(context_width=32), ["project.weight has shape [24, 16], expected [32, 16]"]),
    "whole numbers": (state(lambda t: {**t, QKV: t[QKV].to(torch.int8)}), [f"{QKV} has dtype I8", "F32"]),
    "NaN": (with_value(SCORE, float("nan")), [f"{SCORE} has 2 of 16", "NaN or infinite"]),
    "infinite": (with_value(QKV, float("-inf")), [f"{QKV} has 2 of 768", "NaN or infinite"]),
}  # fmt: skip


def message(path, damage):
    saved(path)
    damage(path)
    with pytest.raises(DLACheckpointError) as error:
        load_dla(path)
    return str(error.value)


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_says_what_is_wrong_with_it(tmp_path, name):
    damage, words = DAMAGED[name]
    text = message(tmp_path / "broken.safetensors", damage)
    assert text.startswith("DLA file 'broken.safetensors': ") and len(text) < 500
    assert all(word in text for word in words), text


def test_no_two_damages_share_a_message(tmp_path):
    texts = [message(tmp_path / f"{i}.safetensors", damage) for i, (damage, _) in enumerate(DAMAGED.values())]
    assert len({text.split(": ", 1)[1] for text in texts}) == len(texts) >= 20


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    for protocol in (0, 2, 5):
        path = tmp_path / f"{protocol}.safetensors"
        path.write_bytes(pickle.dumps(Bomb(), protocol=protocol))
        with pytest.raises(DLACheckpointError):
            load_dla(path)
    assert not (tmp_path / "exploded").exists()


def test_any_length_of_the_header_is_read(tmp_path):
    """A header of 640 bytes begins a file with a pickle's first two bytes."""
    seen, path = set(), tmp_path / "dla.safetensors"
    for extra in range(0, 4096, 8):
        saved(path, replace(CONFIG, provenance={"note": "x" * extra}))
        seen.add(path.read_bytes()[:1])
        assert read_config(path).provenance["note"] == "x" * extra
    assert {b"\x80"} <= seen
