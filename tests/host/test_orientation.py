"""Orient Anything V1: logits as by an independent network on the same weights; its input; its angles; damaged files."""

import math
import pickle
from collections import OrderedDict
from types import SimpleNamespace
from unittest.mock import Mock

import folder_paths
import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from subject_dla.common.masks import fit_mask, split_batch, subject_box
from subject_dla.evaluation.orientation_overlay import axes, overlay, overlays
from subject_dla.evaluation.orientation_report import table
from subject_dla.loaders import folders
from subject_dla.loaders.orient_anything import model as orientation
from subject_dla.loaders.orient_anything.checkpoint import OrientationCheckpointError, read_state
from subject_dla.loaders.orient_anything.model import CHUNK, load_orientation
from subject_dla.loaders.orient_anything.network import SIZES, Angles, decode
from subject_dla.loaders.preprocessing import IMAGENET_MEAN, IMAGENET_STD, preprocess_subject
from subject_dla.nodes.files import missing
from subject_dla.nodes.orientation import SubjectLoadOrientation, SubjectOrientation
from subject_dla.tests.small.measure import published_state
from torch import nn
from torch.nn.functional import interpolate
from transformers import Dinov2Config, Dinov2Model

LAYOUTS = {"small": (384, 12, 180), "base": (768, 3, 180), "large": (1024, 2, 180), "ronormsigma1": (1024, 2, 360)}
RENAMED = {f"attention.attention.{name}": f"attention.{name[0]}_proj" for name in ("query", "key", "value")}
RENAMED |= {"attention.output.dense": "attention.o_proj"}  # by transformers 5


@pytest.fixture
def root(models):
    return models / "models" / "orientation"


@torch.no_grad()
def published_logits(state: dict[str, torch.Tensor], layers: int, pixels: torch.Tensor) -> torch.Tensor:
    """Transformers' DINOv2, which interpolates its positions itself, and the head with torch's own BatchNorm1d."""
    out, width = state["down_sampler.net1.0.weight"].shape
    sizes = dict(hidden_size=width, num_attention_heads=width // 64, num_hidden_layers=layers)
    backbone = Dinov2Model(Dinov2Config(**sizes, image_size=518, patch_size=14)).eval()
    weights = {key[7:]: value for key, value in state.items() if key.startswith("dinov2.")}
    if any("q_proj" in key for key in backbone.state_dict()):
        for old, new in RENAMED.items():
            weights = {key.replace(old, new): value for key, value in weights.items()}
    backbone.load_state_dict(weights)
    net1 = nn.Sequential(nn.Linear(width, out), nn.BatchNorm1d(out), nn.ReLU())
    net2 = nn.Sequential(nn.Linear(out, out), nn.BatchNorm1d(out))
    head = nn.Sequential(OrderedDict(net1=net1, net2=net2)).eval()
    head.load_state_dict({key[13:]: value for key, value in state.items() if key.startswith("down_sampler.")})
    return head(backbone(pixels).last_hidden_state[:, 0])


@pytest.fixture
def tiny(monkeypatch):
    """A published state of one layer, and the loader made to expect that."""
    monkeypatch.setitem(SIZES, 384, ("small", 1))
    return published_state(384, 1, 180)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_network_is_the_published_one(root, monkeypatch, layout):
    width, layers, bins = LAYOUTS[layout]
    name = SIZES[width][0]
    monkeypatch.setitem(SIZES, width, (name, layers))
    state = published_state(width, layers, bins)
    (root / layout).mkdir()
    torch.save(state, root / layout / "dino_weight.pt")
    model = load_orientation(f"{layout}/dino_weight.pt", save_copy=True)
    assert (model.size, model.rotation_bins) == (name, bins) and model.name == f"{layout}/dino_weight.pt"
    pixels = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    expected = published_logits(state, layers, pixels)
    assert expected.std() > 0.1 and (expected[0] - expected[1]).abs().max() > 0.01  # the picture matters
    assert (model.logits(pixels) - expected).abs().max() < 1e-4
    # the safetensors copy holds the published tensors, and gives the same
    copied = load_file(root / layout / "dino_weight.safetensors")
    assert copied.keys() == state.keys() and all(torch.equal(copied[key], state[key]) for key in state)
    again = load_orientation(f"{layout}/dino_weight.safetensors")
    assert torch.equal(again.logits(pixels), model.logits(pixels))


def test_estimate_is_prepare_network_decode_for_any_number_of_pictures_of_any_size(root, tiny):
    save_file(tiny, root / "a.safetensors")
    model = load_orientation("a.safetensors")
    generator = torch.Generator().manual_seed(2)
    count = CHUNK + 2
    images = [torch.rand(60 + 7 * n, 90, 3, generator=generator) for n in range(count)]
    masks = [None if n % 2 else blob(60 + 7 * n, 90) for n in range(count)]
    found = model.estimate(images, masks)
    expected = decode(published_logits(tiny, 1, torch.stack([preprocess_subject(i, m) for i, m in zip(images, masks)])))
    for name in ("azimuth", "polar", "rotation"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert torch.allclose(found.confidence, expected.confidence, atol=1e-5) and len(found) == count


def test_pictures_whose_subject_was_not_found_get_confidence_0_and_the_others_keep_theirs(root, tiny):
    torch.save(tiny, root / "a.pt")
    model = load_orientation("a.pt")
    images = list(torch.rand(3, 50, 70, 3, generator=torch.Generator().manual_seed(3)))
    masks = [blob(50, 70), torch.zeros(64, 64), None]
    found = model.estimate(images, masks)
    alone = model.estimate(images[:1], masks[:1])
    whole = model.estimate(images[1:])
    assert found.confidence[1] == 0 and torch.allclose(found.confidence[[0]], alone.confidence)
    assert torch.equal(found.azimuth[1:], whole.azimuth) and found.azimuth[0] == alone.azimuth[0]
    with pytest.raises(ValueError, match="shows no subject.*highest value is 0"):
        model.estimate(images[:2], [torch.zeros(64, 64)] * 2)
    with pytest.raises(ValueError, match="2 masks for 3 pictures"):
        model.estimate(images, masks[:2])
    with pytest.raises(ValueError, match="at least one"):
        model.estimate([])


def blob(height: int, width: int) -> torch.Tensor:
    mask = torch.zeros(height, width)
    mask[height // 5 : height // 2, width // 3 : width - 5] = 1
    mask[height // 2, width // 2] = 0.5  # a soft edge
    return mask


def prepared_by_pillow(image: torch.Tensor, mask: torch.Tensor | None) -> numpy.ndarray:
    """The published preparation on arrays and with pillow's own resampling: boxed, square, 0.85, 256, 224."""
    picture = image.numpy().copy()
    if mask is not None:
        picture *= mask.numpy()[..., None]
        ys, xs = numpy.where(mask.numpy() > 0.05)
        picture = picture[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        side = max(picture.shape[:2])
        for whole in (side, int(side / 0.85)):
            before = [(whole - size) // 2 for size in picture.shape[:2]]
            after = [whole - size - first for size, first in zip(picture.shape[:2], before)]
            picture = numpy.pad(picture, (*zip(before, after), (0, 0)))
    height, width = picture.shape[:2]
    short = min(height, width)
    size = int(256 * width / short), int(256 * height / short)
    channels = [Image.fromarray(picture[..., c].astype(numpy.float32)).resize(size, Image.BICUBIC) for c in range(3)]
    resized = numpy.stack([numpy.asarray(channel) for channel in channels], -1)
    left, top = (size[0] - 224) // 2, (size[1] - 224) // 2
    resized = numpy.clip(numpy.round(resized[top : top + 224, left : left + 224] * 255), 0, 255) / 255
    return ((resized - numpy.array(IMAGENET_MEAN)) / numpy.array(IMAGENET_STD)).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(300, 500), (97, 64), (224, 224), (512, 511)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_picture_is_prepared_as_published(size, masked):
    coarse = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(4))
    image = interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0).contiguous()
    mask = blob(*size) if masked else None
    found = preprocess_subject(image, mask).numpy()
    assert found.shape == (3, 224, 224)
    off = numpy.abs(found - prepared_by_pillow(image, mask))
    step = 1 / 255 / min(IMAGENET_STD)
    assert off.max() < 1.01 * step and (off > 0.01 * step).mean() < 0.01  # some values round to the other side


def test_the_cut_out_subject_is_on_black_in_the_middle_at_its_size():
    image = torch.ones(400, 300, 3)
    mask = torch.zeros(400, 300)
    mask[37:137, 201:261] = 1  # 100 high, 60 wide
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    shown = preprocess_subject(image, mask) * std + mean
    ys, xs = (shown[0] > 0.5).nonzero(as_tuple=True)
    height, width = int(ys.max() - ys.min()) + 1, int(xs.max() - xs.min()) + 1
    assert abs(height - 256 * 100 / 117) <= 1 and abs(width - 256 * 60 / 117) <= 1  # 117 = int(100 / 0.85)
    assert abs(int(ys.min()) + height / 2 - 112) <= 2 and abs(int(xs.min()) + width / 2 - 112) <= 2
    assert shown[:, :, :40].abs().max() < 1e-6  # black, not grey: normalised after
    # what is outside the mask does not matter, nor does the mask's own size
    other = image.clone()
    other[mask == 0] = torch.rand(int((mask == 0).sum()), 3)
    assert torch.equal(preprocess_subject(other, mask), preprocess_subject(image, mask))
    half = interpolate(mask[None, None], scale_factor=2, mode="nearest")[0, 0]
    assert subject_box(torch.zeros(8, 8).index_fill_(0, torch.tensor(3), 1)) == (3, 4, 0, 8)
    off = torch.tensor(subject_box(fit_mask(half, image))) - torch.tensor(subject_box(mask))
    assert off.abs().max() <= 1
    with pytest.raises(ValueError, match="shows no subject"):
        preprocess_subject(image, torch.zeros(400, 300))


def test_batches_with_one_mask_with_several_and_with_alpha():
    images = torch.rand(3, 40, 50, 4, generator=torch.Generator().manual_seed(5))
    found, masks = split_batch(images)
    assert len(found) == 3 and found[0].shape == (40, 50, 3) and torch.equal(masks[2], images[2, ..., 3])
    one = torch.rand(20, 20)
    assert all(torch.equal(mask, one) for mask in split_batch(images, one)[1])
    several = torch.rand(3, 40, 50)
    assert torch.equal(torch.stack(split_batch(images, several)[1]), several)
    assert split_batch(images[..., :3])[1] is None
    with pytest.raises(ValueError, match=r"\(2, 40, 50\) for 3 picture"):
        split_batch(images, several[:2])
    with pytest.raises(ValueError, match="expected an IMAGE"):
        split_batch(images[0])
    images[1, 2, 3, 0] = math.nan
    with pytest.raises(ValueError, match="Picture 2 of 3 holds values that are NaN"):
        split_batch(images)


@pytest.mark.parametrize("bins", [180, 360])
def test_angles_are_the_highest_bins(bins):
    wanted = [(0, -90, -bins // 2), (359, 89, bins // 2 - 1), (123, 7, -4)]
    logits = torch.full((3, 542 + bins), -3.0)
    for row, (azimuth, polar, rotation) in enumerate(wanted):
        logits[row, azimuth] = logits[row, 360 + polar + 90] = logits[row, 540 + rotation + bins // 2] = 2.0
    logits[:, -2:] = torch.tensor([[0.0, 0.0], [3.0, 1.0], [50.0, 90.0]])  # far above every bin: they are no angle
    found = decode(logits)
    assert list(zip(found.azimuth.tolist(), found.polar.tolist(), found.rotation.tolist())) == wanted
    assert torch.allclose(found.confidence, torch.tensor([0.5, 1 / (1 + math.exp(-2)), 0.0]), atol=1e-6)
    with pytest.raises(ValueError, match="900 logits found, expected 722 or 902"):
        decode(torch.zeros(1, 900))


@pytest.mark.parametrize("angles", [(0, 0, 0), (90, 0, 0), (33, 24, 0), (200, -40, 70), (311, 60, -170)])
def test_axes_are_those_that_a_camera_sees(angles):
    """Against a look-at camera round a subject that faces -y with z up, as a renderer places it."""
    azimuth, polar, rotation = angles
    a, p = math.radians(azimuth), math.radians(polar)
    eye = numpy.array([math.sin(a) * math.cos(p), -math.cos(a) * math.cos(p), math.sin(p)])
    across = numpy.cross(-eye, (0, 0, 1))
    across /= numpy.linalg.norm(across)
    camera = numpy.stack([across, numpy.cross(across, -eye), eye])
    seen = camera @ numpy.array([[0, -1, 0], [-1, 0, 0], [0, 0, 1]], float).T  # front, its own right, top
    turn = numpy.exp(1j * math.radians(rotation))
    plane = (seen[0] + 1j * seen[1]) * turn
    expected = numpy.stack([plane.real, plane.imag, seen[2]], 1)
    assert numpy.allclose(axes(*angles).numpy(), expected, atol=1e-6)


def test_azimuth_90_points_to_the_left_of_the_picture_in_red_and_a_low_confidence_is_grey():
    image = torch.full((256, 512, 3), 0.5)
    red = lambda picture: (numpy.asarray(picture).astype(int) @ [1, -1, 0]) > 100  # noqa: E731
    drawn = overlay(image, (90, 0, 0, 0.9))
    columns = red(drawn).nonzero()[1]
    assert drawn.size[0] == 512 and len(columns) > 200 and columns.max() < 262 and columns.min() < 170
    assert not red(overlay(image, (90, 0, 0, 0.4))).any()
    mask = torch.zeros(256, 512)
    mask[:, 384:] = 1  # the axes stand where the subject is
    columns = red(overlay(image, (90, 0, 0, 0.9), mask)).nonzero()[1]
    assert 330 < columns.min() and 430 < columns.max() < 454


def test_overlays_of_a_batch_have_one_size_and_the_table_a_line_each():
    angles = Angles(*(torch.tensor(v) for v in ([5.0, 300.0], [-4.0, 20.0], [0.0, -9.0], [0.25, 0.95])))
    for width in (20, 700):
        batch = overlays(list(torch.rand(2, 90, width, 3)), angles)
        assert batch.shape[0] == 2 and batch.dtype == torch.float32 and 0 <= batch.min() and batch.max() <= 1
    lines = table(angles, notes={1: "seen"}).splitlines()
    assert len(lines) == 3 and lines[1].split() == "1 5 -4 0 0.250 no clear front".split()
    assert lines[2].split() == "2 300 20 -9 0.950 seen".split()


class Runs:
    """Pickles as a call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_pt_is_refused_and_not_run(root, tiny):
    mark = root / "ran"
    torch.save(tiny | {"extra": Runs(mark)}, root / "zip.pt")
    (root / "old.pt").write_bytes(pickle.dumps(Runs(mark), 2))
    for name in ("zip.pt", "old.pt"):
        with pytest.raises(OrientationCheckpointError, match=f"{name}.*code in a file is never run"):
            load_orientation(name)
    assert not mark.exists()


def damaged(tiny):
    """(what, file name, content: state or bytes or function of a whole file, part of the message)"""
    query = "dinov2.encoder.layer.0.attention.attention.query.weight"
    without = {key: value for key, value in tiny.items() if key != query}
    return {
        "missing": ("a.pt", without, f"1 key.s. of .*small.*missing.*{query}"),
        "renamed": ("a.safetensors", without | {"dinov2.q": tiny[query]}, "instead: it was written by other code"),
        "extra": ("a.pt", tiny | {"dinov2.more": tiny[query]}, "do not belong to .*'dinov2.more'"),
        "deeper": ("a.pt", published_state(384, 2, 180), "do not belong to .*encoder.layer.1"),
        "shape": ("a.safetensors", tiny | {query: torch.zeros(384, 383)}, r"\[384, 383\], expected \[384, 384\]"),
        "bins": ("a.pt", published_state(384, 1, 200), "742 logits found, expected 722 or 902"),
        "giant": ("a.pt", published_state(1536, 1, 180), "1536 wide, expected 384 .small., 768 .base., 1024 .large."),
        "integers": ("a.pt", tiny | {query: tiny[query].int()}, "does not hold floating-point"),
        "nan": ("a.safetensors", tiny | {query: tiny[query].log()}, f"{query} has .* values that are NaN"),
        "v2": ("a.pt", {"vggt.aggregator.camera_token": torch.zeros(1)}, "it is Orient Anything V2"),
        "lora": ("a.safetensors", {"x.lora_A.weight": torch.zeros(1)}, "looks like a LoRA"),
        "backbone": ("a.pt", {key[7:]: value for key, value in tiny.items()}, "DINOv2 alone, without the head"),
        "wrapped": ("a.pt", {"module." + key: value for key, value in tiny.items()}, "keys begin with 'module.'"),
        "nested": ("a.pt", {"model": tiny, "epoch": 3}, "holds dict under 'model', expected tensors alone"),
        "list": ("a.pt", [tiny], "holds list, expected a state dict"),
        "no key": ("a.safetensors", {"weight": torch.zeros(1)}, "its first key is 'weight'.* Take one of"),
        "empty": ("a.pt", b"", "is empty"),
        "login": ("a.pt", b"<!doctype html><p>log in", "is a web page"),
        "lfs": ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        "noise": ("a.pt", bytes(range(256)) * 9, "cannot be read|holds more than tensors"),
        "noise too": ("a.safetensors", bytes(range(256)) * 9, "cannot be read"),
    }


@pytest.mark.parametrize("what", damaged({"dinov2.encoder.layer.0.attention.attention.query.weight": torch.ones(1)}))
def test_damaged_and_foreign_files_are_named(root, tiny, what):
    name, content, message = damaged(tiny)[what]
    if isinstance(content, bytes):
        (root / name).write_bytes(content)
    elif name.endswith(".pt"):
        torch.save(content, root / name)
    else:
        save_file(content, root / name)
    with pytest.raises(OrientationCheckpointError, match=f"(?s)'{name}': .*({message})") as error:
        load_orientation(name)
    assert str(root) not in str(error.value)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_files_that_are_cut_off_or_renamed_are_named(root, tiny, name, share):
    (torch.save if name.endswith("pt") else save_file)(tiny, root / name)
    whole = (root / name).read_bytes()
    (root / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(OrientationCheckpointError, match=f"'{name}'.*cannot be read"):
        load_orientation(name)
    other = "a.safetensors" if name.endswith("pt") else "a.pt"
    (root / other).write_bytes(whole)
    with pytest.raises(OrientationCheckpointError, match=f"'{other}'"):
        load_orientation(other)


def test_any_length_of_the_header_is_read(root, tiny):
    """The first two bytes of a .safetensors are the header's length, which may look like the start of other files."""
    for magic in (b"\x80\x02", b" <"):
        size, padding = 0, ""
        wanted = int.from_bytes(magic, "little")
        while size % 65536 != wanted:
            save_file(tiny, root / "a.safetensors", {"note": padding})
            size = int.from_bytes((root / "a.safetensors").read_bytes()[:8], "little")
            padding += "x" * ((wanted - size) % 65536)
        assert (root / "a.safetensors").read_bytes()[:2] == magic
        assert read_state(root / "a.safetensors").keys() == tiny.keys()


def test_what_training_alone_needs_may_be_missing_and_fp16_is_read(root, tiny):
    half = {key: value.half() if value.is_floating_point() else value for key, value in tiny.items()}
    less = {key: value for key, value in half.items() if not key.endswith(("mask_token", "num_batches_tracked"))}
    save_file(less, root / "a.safetensors")
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(6))
    whole = {key: value.float() for key, value in half.items()}
    found = load_orientation("a.safetensors").logits(pixels)
    assert (found - published_logits(whole, 1, pixels)).abs().max() < 1e-4


def test_a_copy_is_not_written_over_another_file_and_a_full_disk_costs_nothing(root, tiny, monkeypatch):
    torch.save(tiny, root / "a.pt")
    (root / "a.safetensors").write_bytes(b"mine")
    load_orientation("a.pt", save_copy=True)
    assert (root / "a.safetensors").read_bytes() == b"mine"
    (root / "a.safetensors").unlink()
    load_orientation("a.pt")
    assert not (root / "a.safetensors").exists()  # not asked for
    monkeypatch.setattr(orientation, "save_tensors", Mock(side_effect=OSError("No space left on device")))
    assert load_orientation("a.pt", save_copy=True).size == "small"


def test_files_are_listed_and_names_stay_inside(root):
    (root / "croplargeEX2").mkdir()
    for name in ("croplargeEX2/dino_weight.pt", "b.safetensors", "c.ckpt"):
        (root / name).write_bytes(b"0")
    (root.parent / "secret.pt").write_bytes(b"0")
    assert folders.files("orientation") == ["b.safetensors", "croplargeEX2/dino_weight.pt"]
    with pytest.raises(ValueError, match="no name in models/orientation"):
        load_orientation("../secret.pt")
    with pytest.raises(ValueError, match="'c.ckpt' is no orientation file: expected the extension .safetensors or .pt"):
        load_orientation("c.ckpt")
    with pytest.raises(ValueError, match="has no 'd.pt'; it holds b.safetensors, croplargeEX2/dino_weight.pt"):
        load_orientation("d.pt")


def test_the_nodes_give_overlay_table_and_lists(root, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path / "temp"))
    monkeypatch.setattr(SubjectOrientation, "hidden", SimpleNamespace(prompt=None, extra_pnginfo=None), raising=False)
    torch.save(tiny, root / "a.pt")
    assert missing("orientation", "a.pt") is None
    (model,) = SubjectLoadOrientation.execute("a.pt", True).result
    assert (root / "a.safetensors").is_file()
    images = torch.rand(3, 80, 120, 3, generator=torch.Generator().manual_seed(7))
    masks = torch.stack([blob(80, 120), torch.zeros(80, 120), torch.ones(80, 120)])
    drawn, text, *lists = SubjectOrientation.execute(model, images, masks).result
    angles = model.estimate(list(images), list(masks))
    assert lists == [c.tolist() for c in (angles.azimuth, angles.polar, angles.rotation, angles.confidence)]
    assert drawn.shape[0] == 3 and drawn.shape[2] == 512 and len(text.splitlines()) == 4
    assert "mask empty" in text.splitlines()[2] and lists[3][1] == 0
    (whole, *_) = SubjectOrientation.execute(model, images).result
    assert whole.shape == drawn.shape and not torch.equal(whole, drawn)
