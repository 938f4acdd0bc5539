"""No picture or caption of training data and benchmarks is left out without a word."""

import io
import os
import tarfile

import pytest
from PIL import Image
from subject_dla.common.files import DataError
from subject_dla.common.list_files import DataReader, is_list, read_json_list, read_text
from subject_dla.common.picture_files import PICTURES, load_picture
from subject_dla.training.data.dataset import read_data

FORMATS = {".jpe": "JPEG", ".jfif": "JPEG", ".jpeg": "JPEG", ".jpg": "JPEG", ".bmp": "BMP", ".gif": "GIF"}
FORMATS |= {".tif": "TIFF", ".tiff": "TIFF", ".png": "PNG", ".webp": "WEBP"}


def make(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        suffix = name[name.rindex(".") :].lower()
        Image.new("RGB", (40, 40), (number, 90, 9)).save(folder / name, FORMATS[suffix])


@pytest.mark.parametrize("upper", [False, True])
def test_every_kind_of_picture_is_used_with_its_caption(tmp_path, upper):
    names = [f"{suffix[1:]}{suffix.upper() if upper else suffix}" for suffix in PICTURES]
    make(tmp_path / "fox", names)
    for suffix in PICTURES:
        (tmp_path / "fox" / f"{suffix[1:]}{'.TXT' if upper else '.txt'}").write_text(f"a fox as {suffix}")
    data = read_data(tmp_path, validation=0.0)
    assert not data.problems and {e.prompt for e in data.training} == {f"a fox as {suffix}" for suffix in PICTURES}
    ((_, sizes),) = DataReader().subjects(tmp_path)  # as benchmarks read it
    assert sorted(path.name for path in sizes) == sorted(names) and set(sizes.values()) == {(40, 40)}
    for name in names:
        assert load_picture(tmp_path / "fox" / name).shape == (40, 40, 3)


def test_what_cannot_be_used_is_named(tmp_path):
    make(tmp_path / "fox", ["1.jpg", "2.jpg"])
    fox = tmp_path / "fox"
    for name in ("1.txt", "1.TXT", "2.Txt"):
        (fox / name).write_text(f"caption of {name}")
    (fox / "3.HEIC").write_bytes(b"1")
    (fox / "4.jpg").symlink_to(fox / "nothing")
    (fox / "5.txt").symlink_to(fox / "nothing")
    if hasattr(os, "mkfifo"):
        os.mkfifo(fox / "6.jpg")
    problems, reader = read_data(tmp_path, validation=0.0).problems, DataReader()
    assert len(list(reader.subjects(tmp_path))) == 1
    for found in (problems, reader.problems):
        assert any(line.startswith("fox/3.HEIC: is .heic, expected .jpg, ") for line in found), found
        assert "fox/4.jpg: does not exist." in found
        if hasattr(os, "mkfifo"):
            assert "fox/6.jpg: is a pipe, socket or device, expected a file." in found
    if (fox / "1.TXT").read_text() == "caption of 1.TXT":  # names differ by case here
        assert "fox/1.TXT: is beside 1.txt, expected one caption of a picture" in problems
        assert "fox/5.txt: does not exist." in problems
        captions = {e.prompt for e in read_data(tmp_path, validation=0.0).training}
        assert captions == {"caption of 1.txt", "caption of 2.Txt"}


def test_a_picture_of_floating_point_values_is_named(tmp_path):
    Image.new("F", (40, 40), 0.5).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="a.tif .*floating-point values"):
        load_picture(tmp_path / "a.tif")


def test_texts_and_lists_of_gigabytes_are_refused_before_they_are_read(tmp_path):
    make(tmp_path / "fox", ["1.jpg", "2.jpg", "3.jpg"])
    (tmp_path / "fox" / "1.txt").write_text("a fox")
    for name in ("fox/2.txt", "a.json", "a.jsonl"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(8 * 10**9)
    assert any("8,000,000,000 bytes, expected at most" in line for line in read_data(tmp_path / "").problems)
    with pytest.raises(DataError, match="2.txt has 8,000,000,000 bytes"):
        read_text(tmp_path / "fox" / "2.txt")
    with pytest.raises(DataError, match="a.json has 8,000,000,000 bytes"):
        read_json_list(tmp_path / "a.json")
    for name, text in (("a.json", "a.json has 8,000,000,000 bytes"), ("a.jsonl", "a.jsonl: a line has over")):
        with pytest.raises(DataError, match=text):
            list(DataReader().parsed(tmp_path / name, tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
def test_a_pipe_as_a_list_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="a.jsonl is a pipe"):
        is_list(tmp_path / "a.jsonl")


def test_folders_in_subjects_and_captions_of_others_are_named(tmp_path):
    make(tmp_path / "fox", ["1.jpg", "2.jpg"])
    make(tmp_path / "fox" / "more", ["3.jpg"])
    for name in ("1.txt", "2.caption", "4.txt", "._1.txt"):
        (tmp_path / "fox" / name).write_text(f"caption of {name}")
    problems, reader = read_data(tmp_path, validation=0.0).problems, DataReader()
    list(reader.subjects(tmp_path))
    nested = "fox/more: is a folder inside a subject's, expected its pictures right in it: move them there"
    assert problems == (
        "fox/2.caption: is .caption, expected .txt: rename it", "fox/4.txt: has no picture of its name", nested
    )  # fmt: skip
    assert reader.problems == [nested]


def test_captions_whose_names_other_systems_do_not_tell_apart_are_used(tmp_path):
    make(tmp_path / "fox", ["IMG_1.JPG", "Caf\u00e9.jpg", "b.jpg"])
    for name in ("img_1.txt", "Cafe\u0301.txt"):
        (tmp_path / "fox" / name).write_text(f"caption of {name}")
    data = read_data(tmp_path, validation=0.0)
    assert not data.problems
    assert {(e.target.name, e.prompt) for e in data.training} == {
        ("IMG_1.JPG", "caption of img_1.txt"), ("Caf\u00e9.jpg", "caption of Cafe\u0301.txt")
    }  # fmt: skip


def shard(path, names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            data = io.BytesIO()
            if name.endswith(".txt"):
                data.write(b"a fox")
            else:
                Image.new("RGB", (40, 40)).save(data, "JPEG")
            info = tarfile.TarInfo(name)
            info.size = data.tell()
            data.seek(0)
            tar.addfile(info, data)


def test_every_shard_is_read_and_a_reference_of_another_kind_is_named(tmp_path):
    shard(tmp_path / "a.tar", ["1.jpg", "1.txt", "1.ref0.jpg", "1.depth.png"])
    shard(tmp_path / "b.TAR", ["2.jpg", "2.txt", "2.ref0.jpg"])
    shard(tmp_path / "c.tar", ["fox/3.jpg", "fox/3.txt", "fox/3.ref0.heic", "fox/4.jpg", "fox/4.txt"])
    data = read_data(tmp_path, validation=0.0)
    assert [e.target.tar.name for e in data.training] == ["a.tar", "b.TAR"]
    assert any(line.startswith("c.tar fox/3: has .ref0.heic, which is .heic, expected .jpg") for line in data.problems)
