"""Labels in any script, and of any length."""

import itertools
import time

import numpy
import pytest
from PIL import Image, ImageDraw
from subject_dla.common.drawing.sheet import labelled_sheet
from subject_dla.common.drawing.text import text_width, wrap, write

CHINESE = "图像中的主体在一块长满苔藓的岩石上，旁边有瀑布，从后面看，逆光，黄昏时分的光线，远处是雪山和湖水"


def drawn(text: str) -> numpy.ndarray:
    image = Image.new("L", (400, 40), 255)
    write(ImageDraw.Draw(image), (4, 30), text, 0, 20, "ls")
    return numpy.asarray(image)


@pytest.mark.parametrize("letters", ["äőłß", "ЖфЮ", "Ωλ", "黄昏从", "ひカ砂", "모래위", "سلام", "→≤–"])
def test_letters_of_any_script_are_not_boxes(letters):
    pictures = [drawn(letter) for letter in letters]
    assert all((picture < 128).sum() > 10 for picture in pictures)
    assert not any(numpy.array_equal(a, b) for a, b in itertools.combinations(pictures, 2))  # as boxes would be
    assert numpy.array_equal(drawn("plain"), drawn("plain "))  # no box for a space


def test_a_text_of_several_fonts_has_one_baseline_and_its_width():
    mixed = "duck 鸭子 duck"
    columns = numpy.flatnonzero((drawn(mixed) < 128).any(0))
    assert abs(columns.max() + 1 - 4 - text_width(mixed, 20)) < 4
    plain, both = drawn("duck"), drawn("duck鸭")
    width = round(text_width("duck", 20))
    assert numpy.array_equal(plain[:, : 3 + width], both[:, : 3 + width])


def test_chinese_is_wrapped_not_cut():
    lines = wrap(CHINESE, 256, 13)
    assert "".join(lines) == CHINESE and 2 <= len(lines) <= 3
    assert all(text_width(line, 13) <= 256 for line in lines)
    long = wrap(CHINESE * 3, 256, 13)
    assert len(long) == 3 and long[-1].endswith("...") and text_width(long[-1], 13) <= 256
    assert wrap("a word and averyverylongfilename_without_spaces.png", 80, 13)[0] == "a word and"


def test_a_label_of_a_megabyte_takes_no_time_and_no_space():
    started = time.monotonic()
    picture = Image.new("RGB", (8, 8))
    for label in ("x" * 10**6, "字" * 10**6, "a " * 10**6, "a\n" * 10**6):
        assert labelled_sheet([picture], [label], title=label).height < 2000
    assert time.monotonic() - started < 20  # it was minutes
