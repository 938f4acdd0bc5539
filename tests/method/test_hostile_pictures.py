"""Pictures from elsewhere: nothing is started for one, and none takes memory without end."""

import subprocess
import sys

import numpy
import pytest
import torch
from PIL import Image
from subject_dla.common import picture_files
from subject_dla.common.images import ImageError
from subject_dla.common.picture_files import load_picture, open_picture, shown_size, whole_pictures
from subject_dla.training.data.dataset import read_data

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n%%Page: 1 1\nshowpage\n%%EOF\n"


def test_no_program_is_started_for_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    (tmp_path / "fox").mkdir()
    for number in "12":
        Image.new("RGB", (40, 40)).save(tmp_path / "fox" / f"{number}.jpg")
        (tmp_path / "fox" / f"{number}.txt").write_text("a fox")
    path = tmp_path / "fox" / "3.jpg"
    path.write_bytes(EPS)
    with pytest.raises(ImageError, match="3.jpg cannot be read as a picture"):
        load_picture(path)
    with pytest.raises(OSError):
        open_picture(path)
    assert any("3.jpg" in line for line in read_data(tmp_path, validation=0.0).problems)


def test_a_picture_of_too_many_pixels_is_refused_whatever_other_packs_set(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    Image.new("1", (14000, 14000)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="a.png .*14000 x 14000 px, expected at most 178,956,970"):
        load_picture(tmp_path / "a.png")
    with whole_pictures(), pytest.raises(ImageError, match="14000 x 14000"):
        shown_size(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_large_pictures_are_halved(tmp_path, monkeypatch, name, mode):
    picture = Image.linear_gradient("L").resize((400, 300)).convert(mode)
    picture = picture.convert("RGB") if name == "a.jpg" else picture
    picture.save(tmp_path / name, quality=95)
    whole = load_picture(tmp_path / name)
    monkeypatch.setattr(picture_files, "LARGE", 400 * 300 - 1)
    found = load_picture(tmp_path / name)
    assert whole.shape == (300, 400, 3) and found.shape == (150, 200, 3) and found.dtype == torch.float32
    mean = torch.nn.functional.avg_pool2d(whole.movedim(-1, 0), 2).movedim(0, -1)
    assert float((found - mean).abs().max()) < 0.03
    with whole_pictures():
        assert shown_size(tmp_path / name) == (400, 300)


@pytest.mark.skipif(sys.platform == "win32", reason="measures by resource")
def test_a_bomb_takes_less_than_two_gigabytes(tmp_path):
    Image.new("1", (13300, 13300)).save(tmp_path / "a.png")
    code = (
        "import resource, runpy, sys; runpy.run_path(sys.argv[1])['import_pack'](); from pathlib import Path\n"
        "from subject_dla.common.picture_files import load_picture\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "load_picture(Path(sys.argv[2])); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    bootstrap = str(picture_files.__file__).replace("picture_files.py", "bootstrap.py")
    done = subprocess.run(  # noqa: S603 (this test's own code)
        [sys.executable, "-c", code, bootstrap, str(tmp_path / "a.png")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * (1 if sys.platform == "darwin" else 1024) < 2 * 2**30


def scans(side, count):
    """A grey JPEG whose scans but the first are runs of nothing."""

    def part(mark, data):
        return bytes([0xFF, mark]) + (len(data) + 2).to_bytes(2, "big") + data

    blocks = (side // 8) ** 2
    size = side.to_bytes(2, "big") * 2
    data = b"\xff\xd8" + part(0xDB, b"\0" + b"\1" * 64) + part(0xC2, b"\x08" + size + b"\1\1\x11\0")
    for table, symbol in ((0x00, 0x00), (0x10, 0xE0)):  # one code of one bit each
        data += part(0xC4, bytes([table, 1, *[0] * 15, symbol]))
    data += part(0xDA, b"\1\1\0\0\0\0") + bytes(blocks // 8)
    runs = "".join("0" + format(0, "014b") for _ in range(blocks // 2**14))
    runs = bytes(int((runs + "1" * 7)[at : at + 8], 2) for at in range(0, len(runs), 8))
    return data + (part(0xDA, b"\1\1\0\1\x3f\0") + runs) * count + b"\xff\xd9"


def test_a_jpeg_of_many_scans_is_refused(tmp_path):
    """2,000 of 8000 x 8000 px, 315 KB, took 24 s."""
    (tmp_path / "a.jpg").write_bytes(scans(1024, 600))
    with pytest.raises(ImageError, match="a.jpg .*601 scans, expected at most 500"):
        load_picture(tmp_path / "a.jpg")
    with whole_pictures():
        with pytest.raises(ImageError, match="601 scans"):
            shown_size(tmp_path / "a.jpg")
        assert shown_size(tmp_path / "a.jpg", whole=False) == (1024, 1024)
    (tmp_path / "b.jpg").write_bytes(scans(1024, 60))
    assert load_picture(tmp_path / "b.jpg").shape == (1024, 1024, 3)
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "c.jpg", progressive=True)
    assert load_picture(tmp_path / "c.jpg").shape == (256, 256, 3)


@pytest.mark.parametrize("value", [-5, 2**20])
def test_numbers_of_32_bits_are_refused(tmp_path, value):
    Image.fromarray(numpy.full((40, 40), value, numpy.int32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=f"a.tif .*numbers from {value} to {value}, expected 8 or 16 bits"):
        load_picture(tmp_path / "a.tif")


def test_numbers_of_16_bits_are_rounded(tmp_path):
    values = numpy.arange(65536, dtype=numpy.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = (torch.from_numpy(values.astype(numpy.float64)) / 257).round().float() / 255
    assert torch.equal(load_picture(tmp_path / "a.png")[..., 1], expected)
