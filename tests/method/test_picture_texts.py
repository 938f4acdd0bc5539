"""PNGs with long texts, which editors and generators write: read like those without, and never unpacked."""

import struct
import zlib

import pytest
import torch
from PIL import Image, PngImagePlugin
from subject_dla.common.picture_files import ORIENTATION, load_picture, shown_size, whole_pictures


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(megabytes):
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(10**6)) for _ in range(megabytes))
    return packed + packer.flush()


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt", "iCCP"])
def test_a_png_with_long_texts_is_read(tmp_path, kind, behind):
    """Before its pixels or behind them, with its orientation and without."""
    picture = Image.effect_noise((64, 48), 50).convert("RGB")
    exif = picture.getexif()
    exif[ORIENTATION] = 6
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", "short", zip=True)
    picture.save(tmp_path / "plain.png", exif=exif, pnginfo=info)
    expected = load_picture(tmp_path / "plain.png")
    data = (tmp_path / "plain.png").read_bytes()
    start = {"zTXt": b"a\0\0", "iTXt": b"a\0\1\0\0\0", "tEXt": b"a\0", "iCCP": b"a\0\0"}[kind]
    long = chunk(kind.encode(), start + (b"x" * 70_000_000 if kind == "tEXt" else bomb(300)))
    at = data.index(b"IEND" if behind else b"IDAT") - 4
    (tmp_path / "long.png").write_bytes(data[:at] + long + data[at:])
    assert torch.equal(load_picture(tmp_path / "long.png"), expected)
    with whole_pictures():
        assert {shown_size(tmp_path / "long.png", whole) for whole in (False, True)} == {(48, 64)}
