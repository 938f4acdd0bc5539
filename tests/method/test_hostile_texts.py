"""Recipes, lists and shards from elsewhere that would take time or memory by the square of their size."""

import tarfile
import time

import pytest
from subject_dla.common.files import DataError
from subject_dla.common.list_files import DataReader
from subject_dla.common.tar_files import tar_members
from subject_dla.training.data.sources import find_shards
from subject_dla.training.recipe import LONGEST, Recipe, RecipeError, read_toml, template
from subject_dla.training.reporting.losses import read_table


@pytest.mark.parametrize("text", [
    "x = " + "[" * 20_000, "x = " + "{a=" * 10_000, "training.steps = " + "9" * 5000,
    ".".join(["a"] * 100_000) + " = 1", "x = 1\nx = 2",
])  # fmt: skip
def test_toml_without_end_is_refused_by_its_name(text):
    with pytest.raises(RecipeError, match=r"^options: (not TOML|has [\d,]+ characters, expected at most)"):
        read_toml(text, "options")


def test_a_huge_number_is_named():
    with pytest.raises(RecipeError, match="training.seed is a number of 80,000 bits, expected a whole number from 0"):
        Recipe.from_dict(read_toml("training.seed = 0x" + "f" * 20_000))


def test_the_longest_toml_is_read_in_a_moment():
    assert len(template()) < LONGEST / 2
    began = time.process_time()
    assert read_toml(".".join(["a"] * (LONGEST // 2 - 2)) + "=1")
    assert time.process_time() - began < 10


def header(body: bytes, kind: bytes) -> bytes:
    made = tarfile.TarInfo("header")
    made.type, made.size = kind, len(body)
    file = tarfile.TarInfo("a.jpg")
    file.size = 4
    return made.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512) + file.tobuf() + b"data" + bytes(1532)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("length", [60_000, 1_000_000])
def test_a_header_of_digits_is_refused(tmp_path, kind, length):
    (tmp_path / "a.tar").write_bytes(header(b"1" * length, kind))
    began = time.process_time()
    with pytest.raises(DataError, match=r"a.tar: a header (holds a number|is said to have)"):
        list(tar_members(tmp_path / "a.tar"))
    assert time.process_time() - began < 3


def test_long_names_are_read(tmp_path):
    name = "/".join(["9" * 250, "ü" * 100, "x" * 200 + ".jpg"])
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
            tar.addfile(tarfile.TarInfo(name))
        assert [member.member for member in tar_members(tmp_path / "a.tar")] == [name]


@pytest.mark.parametrize("pattern", ["{0..999}{0..999}{0..999}.tar", "{a,b}" * 40 + ".tar", "{0..9999999}.tar"])
def test_a_pattern_of_more_shards_than_there_can_be_is_refused(tmp_path, pattern):
    with pytest.raises(DataError, match="stands for .* shards, expected"):
        find_shards(tmp_path / pattern)


@pytest.mark.parametrize("name", ["long field", "long line"])
def test_a_table_of_losses_without_end_is_named_in_a_few_words(tmp_path, name):
    text = "x" * 200_000 if name == "long field" else "x," * 200_000
    for head in ("", "step,condition,stage,mean,low,high,samples\n"):
        (tmp_path / "validation.csv").write_text(f"{head}{text}\n")
        with pytest.raises(ValueError, match="validation.csv: line [12].*move|Move") as error:
            read_table(tmp_path / "validation.csv")
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_list_of_nothing_but_wrong_entries_is_given_up(tmp_path, name):
    text = "[" + "0," * 1_000_000 + "0]" if name == "a.json" else "x\n" * 1_000_000
    (tmp_path / name).write_text(text)
    reader = DataReader()
    with pytest.raises(DataError, match=f"{name}: 100,001 of its first 100,001 entries cannot be used, such as entry"):
        list(reader.parsed(tmp_path / name, tmp_path))
    assert len(reader.problems) == 100_001


def test_a_list_with_some_wrong_entries_is_read(tmp_path):
    good = '{"prompt": "a fox", "image_path": "a.jpg"}\n'
    (tmp_path / "a.jsonl").write_text(("[\n" + good) * 110_000)
    reader = DataReader()
    assert sum(1 for _ in reader.parsed(tmp_path / "a.jsonl", tmp_path)) == len(reader.problems) == 110_000
