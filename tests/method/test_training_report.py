"""Validation tables and the pictures of a training run."""

from itertools import product

import numpy
import pytest
import scipy.stats
import torch
from PIL import Image
from subject_dla.common.drawing.axes import Axes, round_ticks
from subject_dla.common.drawing.canvas import Canvas
from subject_dla.common.drawing.palette import BLUE, ORANGE
from subject_dla.common.drawing.sheet import contact_sheet
from subject_dla.training.reporting.losses import Loss, read_table, table, with_all, write_table
from subject_dla.training.reporting.plots import loss_curve, validation_plot
from subject_dla.training.reporting.progress import History, Progress

COLUMNS = "step,condition,stage,mean,low,high,samples"
ROWS = [
    Loss("vae", "t >= 0.95", 0.2, 0.17, 0.24, 30),
    Loss("vae", "t < 0.95", 0.6, 0.56, 0.63, 10),
    Loss("mllm", "t >= 0.95", 0.1, 0.1, 0.1, 8),
]


def where(image: Image.Image, colour) -> numpy.ndarray:
    """(n, 2) rows and columns of the pixels in exactly this colour."""
    return numpy.argwhere((numpy.asarray(image) == colour).all(axis=-1))


def test_all_flow_times_weigh_the_bins_by_their_samples():
    found = {row.condition: row for row in with_all(ROWS) if row.bin == "all"}
    vae = found["vae"]
    assert vae.mean == pytest.approx(0.75 * 0.2 + 0.25 * 0.6) and vae.samples == 40
    assert vae.mean - vae.low == pytest.approx(((0.75 * 0.03) ** 2 + (0.25 * 0.04) ** 2) ** 0.5)
    assert vae.high - vae.mean == pytest.approx(((0.75 * 0.04) ** 2 + (0.25 * 0.03) ** 2) ** 0.5)
    given = Loss("vae", "all", 9.0, 8.0, 10.0, 40)
    assert [row for row in with_all([given, *ROWS]) if (row.condition, row.bin) == ("vae", "all")] == [given]


@pytest.mark.parametrize("count", [2, 3, 5, 16, 200])
def test_a_bins_interval_is_students_t(count):
    losses = torch.rand(count, generator=torch.Generator().manual_seed(count)).double()
    row = Loss.of("both", "t < 0.85", losses.tolist())
    low, high = scipy.stats.t.interval(0.95, count - 1, losses.mean().item(), scipy.stats.sem(losses.numpy()))
    assert (row.mean, row.low, row.high) == pytest.approx((losses.mean().item(), low, high), rel=1e-9)
    assert (row.condition, row.bin, row.samples) == ("both", "t < 0.85", count)
    assert Loss.of("both", "t < 0.85", [0.25]) == Loss("both", "t < 0.85", 0.25, 0.25, 0.25, 1)


def test_a_line_has_step_loss_pace_and_time_left():
    history = History("a", {}, losses=[0.5, 0.25])
    ends = {10: ", 4 s left", 302: ", 3 min left", 14_402: ", 2 h 0 min left", 2: ""}
    for steps, end in ends.items():
        line = f"step 2/{steps}, loss 0.2500, 0.50 s/step{end}"
        assert Progress(history, steps, 0.5).line == line
    assert Progress(history, 10, text="left out: a.png").line == "step 2/10: left out: a.png"


def test_table_has_a_line_per_condition_and_a_column_per_bin():
    lines = table(ROWS).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(line) for line in lines}) == 1  # aligned
    assert cells[0] == ["held-out loss", "t >= 0.95", "t < 0.95", "all"]
    assert cells[2] == ["MLLM only", "0.1000 (0.1000 to 0.1000)", "", "0.1000 (0.1000 to 0.1000)"]
    assert cells[3][:3] == ["VAE only", "0.2000 (0.1700 to 0.2400)", "0.6000 (0.5600 to 0.6300)"]


def test_csv_keeps_every_digit_and_a_step_only_once(tmp_path):
    path, exact = tmp_path / "validation.csv", [Loss("both", "all, really", 1 / 3, 0.1 + 0.2, 1e-17, 7)]
    write_table(path, 200, ROWS)
    write_table(path, 100, exact)
    write_table(path, 200, ROWS[:2])
    assert read_table(path) == {100: exact, 200: ROWS[:2]} and list(read_table(path)) == [100, 200]
    assert path.read_text().splitlines()[0] == COLUMNS
    assert [file.name for file in tmp_path.iterdir()] == ["validation.csv"]


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "", f"{COLUMNS}\n1,vae,all,oops,1,1,1\n"])
def test_a_file_that_is_no_such_table_is_named_and_left_alone(tmp_path, text):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.csv: line .* move"):
        write_table(path, 1, ROWS)
    assert path.read_text() == text


def test_loss_curve_shows_each_value_at_its_height():
    losses = [0.8 if step < 500 else 0.4 for step in range(1000)]
    image = loss_curve(range(1000), losses, [(0, 0.6), (999, 0.6)])
    mean, held_out = where(image, BLUE), where(image, ORANGE)
    mean, held_out = mean[mean[:, 0] > 50], held_out[held_out[:, 0] > 50]  # without the legend
    early, late = (numpy.median(mean[side, 0]) for side in (mean[:, 1] < 300, mean[:, 1] > 600))
    assert early < late - 100  # higher losses lie higher
    assert numpy.median(held_out[:, 0]) == pytest.approx((early + late) / 2, abs=2)
    assert image.width >= 768


def test_axis_is_logarithmic_beyond_a_factor_of_ten_only():
    blank = Canvas(200, 200)
    for values, logarithmic in (((0.1, 1.1), True), ((0.1, 0.9), False), ((-1, 100), False), ((0, 100), False)):
        assert Axes(blank, (10, 10, 190, 190), [0, 1], values).log is logarithmic
    panel = Axes(blank, (10, 10, 190, 190), [0, 1], (0.01, 100))
    low, middle, high = (panel.at(0, y)[1] for y in (0.01, 1, 100))
    assert middle == pytest.approx((low + high) / 2)
    assert panel.at(0, 0)[1] == panel.at(0, 1e-9)[1]  # what has no logarithm lies at the edge


def test_odd_runs_can_be_drawn():
    nan = float("nan")
    for steps, losses, held_out in (
        ([], [], []), ([1], [0.5], []), ([], [], [(5, 0.2)]), ([3, 4], [nan, nan], [(4, nan)]),
        ([1, 2], [0.0, 0.0], []), ([1, 2], [-0.5, float("inf")], []),
        (range(200), [nan] * 100 + [1e30] * 100, [(0, 1e-30)]),
    ):  # fmt: skip
        assert loss_curve(steps, losses, held_out).size == (768, 384)
    with pytest.raises(ValueError, match="2 steps and 1 losses"):
        loss_curve([1, 2], [0.5])


def test_validation_plot_has_a_panel_per_bin_and_a_line_per_condition():
    means = product(("t >= 0.95", "t < 0.95"), (("mllm", 0.3), ("vae", 0.5)))
    rows = [Loss(condition, name, mean, mean - 0.02, mean + 0.02, 9) for name, (condition, mean) in means]
    image = validation_plot(dict.fromkeys((0, 100, 200), rows))
    for left, top in ((0, 40), (384, 40), (0, 270)):  # two bins, and all flow times
        part = image.crop((left, top, left + 384, top + 230))
        mllm, vae = (where(part, colour) for colour in (BLUE, ORANGE))
        assert len(mllm) > 200 and len(vae) > 200
        assert mllm[:, 0].min() > vae[:, 0].max()  # the lower loss lies lower
    assert len(where(image.crop((384, 270, 768, 500)), BLUE)) == 0
    validation_plot({})


def test_sheet_shows_every_picture_whole_and_its_label_above():
    red, green, blue = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    wide, tall = Image.new("RGB", (400, 100), red), Image.new("RGB", (100, 400), green)
    small, square = Image.new("L", (8, 8), 7), Image.new("RGB", (64, 64), blue)
    long = "a prompt with many words " * 40
    sheet = contact_sheet([("references", [wide, tall]), (long, [square] * 4), ("", [small])])
    assert len(where(sheet, red)) == 256 * 64 and len(where(sheet, green)) == 64 * 256
    squares = where(sheet, blue)
    assert len(squares) == 4 * 256 * 256  # nothing over them, all four inside the sheet
    ink = where(sheet, (40, 40, 46))
    between = ink[(ink[:, 0] > where(sheet, green)[:, 0].max()) & (ink[:, 0] < squares[:, 0].min())]
    assert 40 < between[:, 0].max() - between[:, 0].min() < 70  # three lines
    assert between[:, 1].max() < sheet.width - 10
    assert len(where(sheet, (7, 7, 7))) == 256 * 256
    assert contact_sheet([]).width == 768


@pytest.mark.parametrize("low, high", [(0, 1), (0.31, 0.32), (-3, 25000), (99, 101), (1e-9, 3e-9)])
def test_ticks_are_round_and_inside(low, high):
    ticks = round_ticks(low, high, 5)
    assert 2 <= len(ticks) <= 6 and all(low - 1e-12 <= tick <= high + 1e-12 for tick in ticks)
    assert f"{ticks[1] - ticks[0]:.3e}"[:5] in ("1.000", "2.000", "5.000")
