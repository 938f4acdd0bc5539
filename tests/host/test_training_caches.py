"""Latents and features of a run, from the host's VAEs and real MLLM folders: what comes from the disk is what was
encoded, and both are fit for a backward pass."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import count

import comfy.ldm.wan.vae
import comfy.sd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from subject_dla.common import bootstrap
from subject_dla.common.picture_files import load_picture
from subject_dla.dla import DLAConfig, DualLayerAggregator, Features, MLLMInfo, Modality, aggregate
from subject_dla.loaders.mllm.huggingface import load_folder
from subject_dla.tests.small.mllm import build_internvl, build_qwen25vl
from subject_dla.tests.small.models import WAN_VAE, host_shapes, random_like, text_encoder_shapes
from subject_dla.training.data.feature_cache import FIELDS, FeatureSource, stack
from subject_dla.training.data.latent_cache import LatentCache, cut
from subject_dla.training.data.shared import read_entry, record

TIMES = count(1)
SMALL = {"dim": 16}  # of the Wan VAE
PROMPTS = ["a red fox", "an owl asleep in the snow, seen from far above, with a lantern beside it", ""]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for number, (width, height) in enumerate([(96, 96), (150, 90), (90, 150), (96, 96)]):
        noise = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(number))
        paths.append(folder / f"{number}.png")
        Image.fromarray((noise.numpy() * 255).astype("uint8")).save(paths[-1], compress_level=0)
    assert paths[0].stat().st_size == paths[3].stat().st_size
    return paths


def put(picture, path):
    """Writes a picture at another time than before, however coarse the file system's clock."""
    path.write_bytes(picture.read_bytes())
    now = next(TIMES)
    os.utime(path, ns=(now, now))


def build_vae(kind, seed=0):
    """As the host's loader node makes it: under inference mode."""
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        if kind == "flux":
            shapes = host_shapes("comfy.taesd.taesd", "TAESD", {"latent_channels": 16})
        else:
            shapes = host_shapes("comfy.ldm.wan.vae", "WanVAE", WAN_VAE | SMALL)
            real = comfy.ldm.wan.vae.WanVAE  # older hosts: 96 wide always
            patch.setattr(comfy.ldm.wan.vae, "WanVAE", lambda **sizes: real(**(sizes | SMALL)))
        weights = random_like(shapes, torch.float32)
        return comfy.sd.VAE(sd={key: value * (1 + seed / 10) for key, value in weights.items()})


@pytest.fixture(scope="module", params=["flux", "wan"])
def vae(request):
    vae = build_vae(request.param)
    vae.test_shape = (16, 1) if request.param == "wan" else (16,)
    return vae


def test_a_vae_without_memory_encodes_tiles(pictures, monkeypatch, caplog):
    """The host's second way, which takes inference mode, where a run has none."""
    vae = build_vae("flux")
    encoder, calls = vae.first_stage_model.encode, []

    def out_of_memory(pixels):
        calls.append(0)
        if len(calls) in (1, times):
            raise torch.cuda.OutOfMemoryError("Allocation on device")
        return encoder(pixels)

    expected = LatentCache(vae, None).get(pictures[0], 64, 64)
    monkeypatch.setattr(vae.first_stage_model, "encode", out_of_memory)
    for times in (1, 4):  # noqa: B007 (read by out_of_memory) 4: the whole picture does not fit the second time either
        calls.clear()
        found = LatentCache(vae, None).get(pictures[0], 64, 64)
        assert torch.allclose(found, expected, atol=1e-4) and not found.is_inference()
        assert "tiled VAE encoding" in caplog.text


@pytest.fixture(scope="module")
def mllm(tmp_path_factory):
    folder = build_qwen25vl(tmp_path_factory.mktemp("mllm") / "qwen")
    with torch.inference_mode():
        return load_folder(folder)


@pytest.fixture(scope="module")
def clip():
    weights = random_like(text_encoder_shapes("clip_l"), torch.float16)
    return comfy.sd.load_text_encoder_state_dicts([weights], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)


def calls(patch, owner, name):
    seen, real = [], getattr(owner, name)

    def counted(*args, **kwargs):
        seen.append(args)
        return real(*args, **kwargs)

    patch.setattr(owner, name, counted)
    return seen


def assert_trainable(tensor):
    """Fit for a backward pass that keeps it, and for writing in place."""
    assert not tensor.is_inference() and not tensor.requires_grad
    weight = torch.ones_like(tensor).requires_grad_()
    (weight * tensor).sum().backward()
    assert torch.equal(weight.grad, tensor)
    tensor.clone().add_(1)


def same(first, second):
    one, two = first.features, second.features
    assert (one.layers, one.info, one.prefix, one.grids) == (two.layers, two.info, two.prefix, two.grids)
    assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in FIELDS)
    assert (first.pooled is None) == (second.pooled is None)
    assert first.pooled is None or torch.equal(first.pooled, second.pooled)
    return True


def files(folder):
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("on_disk", [False, True])
def test_latents_are_the_hosts_and_hit_equals_miss(vae, pictures, tmp_path, monkeypatch, on_disk):
    folder = tmp_path / "a" / "b" if on_disk else None
    with torch.inference_mode():  # as in a node
        expected = vae.encode(cut(load_picture(pictures[1]), 96, 64)[None])[0]
        encodings = calls(monkeypatch, vae, "encode")
        cache = LatentCache(vae, folder)
        miss = cache.get(pictures[1], 96, 64)
        hit = cache.get(pictures[1], 96, 64)
        again = LatentCache(vae, folder).get(pictures[1], 96, 64)
    assert len(encodings) == (1 if on_disk else 2)
    assert miss.dtype == torch.float32 and miss.shape == (*vae.test_shape, 8, 12) and torch.equal(miss, expected)
    for latent in (miss, hit, again):
        assert torch.equal(latent, expected)
        assert_trainable(latent)
    if on_disk:
        assert len(files(folder)) == 1 and len(list(folder.iterdir())) == 1  # nothing temporary stays


def test_latents_encoded_elsewhere_are_taken(vae, pictures, tmp_path, monkeypatch):
    with torch.inference_mode():  # as in a node
        latent = vae.encode(cut(load_picture(pictures[0]), 96, 64)[None])[0].half()
    LatentCache(vae, tmp_path).put(pictures[0], 96, 64, latent)
    encodings = calls(monkeypatch, vae, "encode")
    cache = LatentCache(vae, tmp_path)
    found = cache.get(pictures[0], 96, 64)
    assert found.dtype == torch.float32 and torch.equal(found, latent.float()) and not encodings
    cache.get(pictures[1], 96, 64)  # that one was not put
    assert len(encodings) == 1


def test_damaged_latents_are_encoded_again_and_replaced(vae, pictures, tmp_path):
    cache = LatentCache(vae, tmp_path)
    latent = cache.get(pictures[0], 64, 64)
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    other = b'{"other":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    for damage in (b"", whole[:7], whole[:60], whole[:-4], whole + b"more", b"\xff" * 300,
                   len(other).to_bytes(8, "little") + other + bytes(4)):  # fmt: skip
        file.write_bytes(damage)
        assert torch.equal(LatentCache(vae, tmp_path).get(pictures[0], 64, 64), latent)
        assert file.read_bytes() == whole


def test_latents_belong_to_picture_size_and_vae(pictures, tmp_path, monkeypatch):
    vae = build_vae("flux")
    path = tmp_path / "picture.png"
    put(pictures[0], path)
    cache = LatentCache(vae, tmp_path / "cache")
    first = cache.get(path, 64, 64)
    assert cache.get(path, 64, 48).shape != first.shape
    put(pictures[3], path)  # as many bytes, another picture
    assert not torch.equal(cache.get(path, 64, 64), first)
    put(pictures[0], path)
    assert torch.equal(cache.get(path, 64, 64), first)
    assert not torch.equal(LatentCache(build_vae("flux", 1), tmp_path / "cache").get(path, 64, 64), first)
    monkeypatch.setattr(vae, "encode", lambda pixels: torch.full((1, 16, 8, 8), torch.nan))
    with pytest.raises(ValueError, match="2.png.*bf16"):
        cache.get(pictures[2], 64, 64)
    monkeypatch.undo()
    kept = len(files(tmp_path / "cache"))
    assert torch.equal(LatentCache(build_vae("flux"), tmp_path / "cache").get(path, 64, 64), first)
    assert len(files(tmp_path / "cache")) == kept  # the same weights, loaded again


ENTRIES = {
    "NaN": lambda latent: latent.view(-1)[:1].fill_(float("nan")),
    "int8": lambda latent: latent.to(torch.int8),
    "other channels": lambda latent: latent[:8].contiguous(),
    "other shape": lambda latent: latent[..., :4].contiguous(),
}


@pytest.mark.parametrize("damage", ENTRIES)
def test_a_cached_latent_that_the_vae_cannot_have_made_is_not_used(vae, pictures, tmp_path, caplog, damage):
    latent = LatentCache(vae, tmp_path).get(pictures[0], 64, 64)
    (file,) = files(tmp_path)
    changed = latent.clone()
    changed = out if (out := ENTRIES[damage](changed)).ndim == latent.ndim else changed
    save_file({"latent": changed}, file)  # as 0.1.0 wrote it, without a record
    assert torch.equal(LatentCache(vae, tmp_path).get(pictures[0], 64, 64), latent)
    assert f"the cache entry {file} " in caplog.text and "It is made again" in caplog.text


def test_flipped_bits_exchanged_entries_and_replaced_pictures_are_noticed(vae, pictures, tmp_path, caplog):
    path, folder = tmp_path / "picture.png", tmp_path / "cache"
    put(pictures[0], path)
    status = path.stat()

    def get(picture=path):
        return LatentCache(vae, folder).get(picture, 64, 64)

    first = get()
    (file,) = files(folder)
    whole = bytearray(file.read_bytes())
    whole[-7] ^= 16
    file.write_bytes(whole)
    assert torch.equal(get(), first) and "its checksum is another one" in caplog.text
    second = get(pictures[1])
    (other,) = set(files(folder)) - {file}
    other.write_bytes(file.read_bytes())
    assert torch.equal(get(pictures[1]), second) and "is the entry of another key" in caplog.text
    os.chmod(path, 0o600)  # another time of change, the same content
    caplog.clear()
    assert torch.equal(get(), first) and not caplog.text
    path.write_bytes(pictures[3].read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and not torch.equal(get(), first)
    assert "was made of another picture" in caplog.text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
@pytest.mark.parametrize("recorded", [[[]], [[1]], {"a": 1}, [None], 5])
def test_an_entry_whose_record_of_pictures_is_another_is_made_again(pictures, tmp_path, caplog, recorded):
    tensors = {"latent": torch.zeros(4)}
    facts = json.loads(record("key", pictures[:1], tensors, {}))
    facts["entry"]["pictures"] = recorded
    save_file(tensors, tmp_path / "entry.safetensors", {"latent": json.dumps(facts)})
    assert read_entry(tmp_path / "entry.safetensors", "latent", "key", pictures[:1], lambda _: "") is None
    assert "entry.safetensors" in caplog.text and "It is made again" in caplog.text


def test_a_pipe_in_place_of_an_entry_is_replaced(vae, mllm, pictures, tmp_path):
    latent = LatentCache(vae, tmp_path).get(pictures[0], 64, 64)
    features = FeatureSource(mllm, folder=tmp_path).get(PROMPTS[0], (pictures[0],))
    for file in files(tmp_path):
        file.unlink()
        os.mkfifo(file)
    assert torch.equal(LatentCache(vae, tmp_path).get(pictures[0], 64, 64), latent)
    assert same(FeatureSource(mllm, folder=tmp_path).get(PROMPTS[0], (pictures[0],)), features)


@pytest.mark.parametrize("damage", ["flipped bit", "NaN", "int8", "other width", "a layer number"])
def test_cached_features_that_were_changed_are_not_used(mllm, pictures, tmp_path, caplog, damage):
    def get():
        return FeatureSource(mllm, folder=tmp_path).get(PROMPTS[0], (pictures[0],))

    first = get()
    (file,) = files(tmp_path)
    whole = bytearray(file.read_bytes())
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
        facts = json.loads(opened.metadata()["features"])
    hidden = tensors["hidden_states"]
    if damage == "flipped bit":
        whole[-5] ^= 1
        file.write_bytes(whole)
    else:
        if damage == "a layer number":
            facts["layers"][-1] += 1
        else:
            del facts["entry"]  # as 0.1.0 wrote it
        changed = {
            "int8": hidden.to(torch.int8),
            "other width": hidden[..., :-1].contiguous(),
            "NaN": hidden * torch.nan,
        }
        tensors["hidden_states"] = changed.get(damage, hidden)
        save_file(tensors, file, {"features": json.dumps(facts)})
    assert same(get(), first) and f"the cache entry {file} " in caplog.text


def test_size_of_latents_is_estimated_from_one_encoding(vae, pictures, tmp_path, monkeypatch):
    wanted = [(path, *size) for path in pictures for size in ((64, 64), (96, 48), (128, 96))] * 2
    cache = LatentCache(vae, tmp_path)
    encodings = calls(monkeypatch, vae, "encode")
    estimate = cache.size(wanted)
    assert len(encodings) == 1
    for image in wanted:
        cache.get(*image)
    assert estimate == pytest.approx(sum(file.stat().st_size for file in files(tmp_path)), rel=0.01)
    assert cache.size([]) == 0


@pytest.mark.parametrize("on_disk", [False, True])
def test_features_are_the_mllms_and_hit_equals_miss(mllm, clip, pictures, tmp_path, monkeypatch, on_disk):
    folder, references = tmp_path / "features" if on_disk else None, tuple(pictures[:2])
    with torch.inference_mode():
        images = [load_picture(path) for path in references]
        expected = mllm.encode(PROMPTS[0], images, image_size=84, layers=(0, 3))
        pooled = clip.encode_from_tokens(clip.tokenize(PROMPTS[0]), return_pooled=True)[1]
        encodings = calls(monkeypatch, mllm, "encode")

        def source():
            return FeatureSource(mllm, layers=(0, 3), clip=clip, folder=folder, image_size=84)

        one = source()
        miss, hit, again = (s.get(PROMPTS[0], references) for s in (one, one, source()))
    assert len(encodings) == (1 if on_disk else 2)
    assert same(miss, hit) and same(miss, again)
    assert all(torch.equal(getattr(miss.features, name), getattr(expected, name)) for name in FIELDS)
    assert miss.features.prefix == expected.prefix and miss.features.info == mllm.info
    assert miss.features.grids == expected.grids and len(expected.grids[0]) == 2
    assert miss.pooled.shape == (1, 768) and torch.equal(miss.pooled, pooled)
    for encoded in (miss, again):
        assert_trainable(encoded.features.hidden_states)
        assert_trainable(encoded.pooled)
        assert not any(getattr(encoded.features, name).is_inference() for name in FIELDS)


def test_damaged_features_are_encoded_again_and_replaced(mllm, pictures, tmp_path):
    def get():
        return FeatureSource(mllm, folder=tmp_path).get(PROMPTS[0], (pictures[0],))

    first = get()
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    info = whole.index(b"info")
    no_json = whole.replace(b'"{\\"layers', b'"#\\"layers')
    for damage in (b"", whole[:100], whole[:-1], whole[:info] + b"####" + whole[info + 4 :], no_json, b"{}" * 200):
        assert damage != whole
        file.write_bytes(damage)
        assert same(get(), first)
        assert file.read_bytes() == whole


def test_features_that_0_1_0_wrote_are_read(mllm, pictures, tmp_path, monkeypatch):
    """They record no token grids."""
    first = FeatureSource(mllm, folder=tmp_path).get(PROMPTS[0], (pictures[1],)).features
    (file,) = files(tmp_path)
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
        facts = json.loads(opened.metadata()["features"])
    assert facts.pop("grids") == [asdict(first.grids[0][0])] and facts.pop("entry")
    save_file(tensors, file, {"features": json.dumps(facts)})
    encodings = calls(monkeypatch, mllm, "encode")
    again = FeatureSource(mllm, folder=tmp_path).get(PROMPTS[0], (pictures[1],)).features
    assert not encodings and again.grids is None and torch.equal(again.hidden_states, first.hidden_states)


def test_features_belong_to_prompt_pictures_layers_size_and_models(mllm, clip, pictures, tmp_path):
    path = tmp_path / "picture.png"
    put(pictures[0], path)
    folder = tmp_path / "features"

    def get(prompt=PROMPTS[0], references=(path,), mllm=mllm, **options):
        before = len(files(folder))
        encoded = FeatureSource(mllm, folder=folder, **options).get(prompt, references)
        assert len(files(folder)) == before + 1
        return encoded.features.hidden_states

    first = get()
    get(PROMPTS[1]), get("", ()), get(references=(path, path)), get(layers=(1,)), get(image_size=56)
    again = load_folder(build_qwen25vl(tmp_path / "again" / mllm.info.name))
    kept = len(files(folder))
    assert torch.equal(FeatureSource(again, folder=folder).get(PROMPTS[0], (path,)).features.hidden_states, first)
    assert len(files(folder)) == kept  # the same weights, loaded again
    other = load_folder(build_qwen25vl(tmp_path / mllm.info.name, seed=1))
    assert other.info == mllm.info and not torch.equal(get(mllm=other), first)
    put(pictures[3], path)
    get(), get(clip=clip)
    patched = clip.clone()
    key = next(key for key in patched.patcher.model.state_dict() if key.endswith("q_proj.weight"))
    assert patched.add_patches({key: (torch.ones(768, 768),)})
    get(clip=patched)


def test_memory_keeps_the_last_used_and_whatever_is_encoded_ahead(mllm, pictures, monkeypatch):
    source = FeatureSource(mllm, layers=(3,), keep=2)
    encodings = calls(monkeypatch, mllm, "encode")
    for prompt in ("a", "b", "a", "c", "a"):  # c takes the place of b, since a was used after it
        source.get(prompt, ())
    assert len(encodings) == 3
    source.get("b", ())
    assert len(encodings) == 4
    wanted = [(prompt, (pictures[0],)) for prompt in "defgh"]
    source.prefetch(wanted)
    assert len(encodings) == 9
    for prompt in wanted:
        source.get(*prompt)
    assert len(encodings) == 9


def test_references_can_be_kept_from_the_mllm_and_a_text_only_one_gets_none(mllm, pictures, monkeypatch):
    blind = FeatureSource(mllm, layers=(3,), images=False).get(PROMPTS[0], tuple(pictures))
    assert same(blind, FeatureSource(mllm, layers=(3,)).get(PROMPTS[0], ()))
    monkeypatch.setattr(mllm, "reads_images", False, raising=False)
    source = FeatureSource(mllm, layers=(3,))
    prompt_alone = source.get(PROMPTS[0], tuple(pictures))
    assert not (prompt_alone.features.modality == Modality.IMAGE).any()
    assert same(prompt_alone, source.get(PROMPTS[0], ()))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_size_of_features_is_estimated_from_one_encoding(family, mllm, clip, pictures, tmp_path, monkeypatch):
    if family == "internvl":
        mllm = load_folder(build_internvl(tmp_path / "internvl"))
    folder = tmp_path / "features"
    source = FeatureSource(mllm, clip=clip, folder=folder, image_size=280)
    wanted = [(prompt, tuple(pictures[:count])) for prompt in PROMPTS for count in (0, 1, 2, 3)] * 2
    encodings = calls(monkeypatch, mllm, "encode")
    estimate = source.size(wanted)
    assert len(encodings) == 1
    source.prefetch(wanted)
    assert len(encodings) == 12
    assert estimate == pytest.approx(sum(file.stat().st_size for file in files(folder)), rel=0.03)
    assert source.size([]) == 0


def test_stacked_prompts_are_padded_on_the_right(mllm, pictures):
    source = FeatureSource(mllm, layers=(0, 2))
    parts = [source.get(*p).features for p in ((PROMPTS[0], (pictures[0],)), (PROMPTS[1], tuple(pictures)), ("", ()))]
    lengths = [part.attention_mask.shape[1] for part in parts]
    assert len(set(lengths)) == 3
    batch = stack(parts)
    assert batch.hidden_states.shape == (3, 2, max(lengths), 64)
    assert batch.hidden_states.dtype == parts[0].hidden_states.dtype
    assert batch.prefix == tuple(part.prefix[0] for part in parts) and batch.layers == (0, 2)
    assert batch.grids == tuple(part.grids[0] for part in parts) and [len(grids) for grids in batch.grids] == [1, 4, 0]
    assert stack([parts[0], replace(parts[1], grids=None)]).grids is None
    for row, (part, length) in enumerate(zip(parts, lengths)):
        assert torch.equal(batch.hidden_states[row, :, :length], part.hidden_states[0])
        for name in ("modality", "image_index", "attention_mask"):
            assert torch.equal(getattr(batch, name)[row, :length], getattr(part, name)[0])
        assert not batch.attention_mask[row, length:].any() and (batch.hidden_states[row, :, length:] == 0).all()
        assert (batch.modality[row, length:] == Modality.TEMPLATE).all()
        assert (batch.image_index[row, length:] == -1).all()


def test_files_are_written_whole_or_not_at_all(mllm, pictures, tmp_path, monkeypatch):
    """A kill while writing leaves nothing under the file's name."""

    def interrupted(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("subject_dla.common.files.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LatentCache(build_vae("flux"), tmp_path / "latents").get(pictures[0], 64, 64)
    with pytest.raises(KeyboardInterrupt):
        FeatureSource(mllm, folder=tmp_path / "features").get("a", ())
    assert not list((tmp_path / "latents").iterdir()) and not list((tmp_path / "features").iterdir())


@pytest.mark.parametrize("options", [
    {}, {"template": "keep", "refiner_blocks": 2}, {"pooling": "linear", "heads": 2}, {"modalities": "last"},
])  # fmt: skip
def test_stacked_prompts_give_the_context_that_each_gives_alone(options):
    draw = torch.Generator().manual_seed(0)
    info = MLLMInfo("small", "qwen2_5_vl", 3, 32)
    T, I, M = Modality.TEXT, Modality.IMAGE, Modality.TEMPLATE  # noqa: E741
    prompts = [[M, M, T, I, I, T, M], [M, M, T], [M, M, I, I, I, I, T, T, T, T, M, M], [M, M, M]]
    parts = []
    for row in prompts:
        modality = torch.tensor([row], dtype=torch.uint8)
        hidden = torch.randn(1, 4, len(row), 32, generator=draw)
        index = torch.where(modality == I, 0, -1).to(torch.int16)
        parts.append(Features(hidden, (0, 1, 2, 3), modality, index, torch.ones(1, len(row)).bool(), info, prefix=(2,)))
    dla = DualLayerAggregator(DLAConfig(info, 48, "flux", **{"heads": 4, **options}))
    with torch.no_grad():
        for parameter in dla.parameters():  # not the identity that a new one is
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * parameter.shape[-1] ** -0.5)
        together = aggregate(stack(parts), dla)
        for row, part in enumerate(parts):
            alone = aggregate(part, dla)
            length = alone.tokens.shape[1]
            assert together.attention_mask[row].sum() == alone.attention_mask.sum() == length > 0
            torch.testing.assert_close(together.tokens[row, :length], alone.tokens[0], atol=1e-5, rtol=1e-4)
            assert torch.equal(together.modality[row, :length], alone.modality[0])


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("kind", [pytest.param("latents", marks=pytest.mark.long), "features"])
def test_several_processes_fill_one_cache_and_one_is_killed(tmp_path, pictures, kind):
    """What is there in the end is what one process writes, bit for bit, and nearly nothing is encoded twice."""
    for picture in pictures:
        os.link(picture, tmp_path / picture.name)
    build_qwen25vl(tmp_path / "mllm")

    def start(folder, pause):
        command = [sys.executable, bootstrap.__file__, "tests.small.filling", tmp_path / folder, tmp_path / "mllm"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return subprocess.Popen([*map(str, command), str(pause)], **pipes)

    def go(processes):
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()

    alone, *several = processes = [start("alone", 0), *(start("several", 0.1) for _ in range(3))]
    go(processes)
    victim, *others = several
    seen = []
    for line in victim.stdout:
        seen.append(line)
        if line == f"encodes {kind}\n":
            break
    victim.kill()  # while it encodes, with the entry's lock in its hands
    seen += victim.stdout.readlines()
    outputs = [process.communicate(timeout=240)[0].splitlines(keepends=True) for process in (alone, *others)]
    assert [process.returncode for process in (alone, *others)] == [0, 0, 0] and victim.wait() == -signal.SIGKILL
    expected = contents(tmp_path / "alone")
    assert len(expected) == 8 + 12 and contents(tmp_path / "several") == expected  # neither locks nor parts are left
    together = [*seen, *outputs[1], *outputs[2]]
    for name, entries in (("latents", 8), ("features", 12)):
        assert outputs[0].count(f"encodes {name}\n") == entries
        assert entries <= together.count(f"encodes {name}\n") <= entries + (name == kind)  # what the killed one began
        assert all(f"encodes {name}\n" in output for output in outputs)  # each has done a part
