"""The copy-paste metrics, given the angles: what they must be, and what is refused."""

from math import isnan, nan, sqrt

import numpy
import pytest
import torch
from scipy import stats
from subject_dla.common.intervals import mean_interval, share_interval
from subject_dla.evaluation.copy_paste.metrics import RECALL, copy_paste_from_differences, copy_paste_report


def uniform(count, low, high, seed):
    return low + (high - low) * torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_azimuth_is_a_circle_and_polar_a_line():
    report = copy_paste_report([[359, -20], [1, 30], [350, 0]], [[1, 10], [359, 30], [-10, 0]])
    assert report.azimuth_difference.tolist() == [2, 2, 0] and report.polar_difference.tolist() == [30, 0, 0]
    assert report.azimuth == pytest.approx(4 / 3) and report.polar == pytest.approx(10)
    assert copy_paste_report([[0, 0]], [[180, 0]]).azimuth == 180
    assert copy_paste_report([[0, 0]], [[181, 0]]).azimuth == 179


def test_identical_sets_are_wholly_copied():
    angles = torch.stack([uniform(50, 0, 360, 1), uniform(50, -90, 90, 2)], dim=-1)
    report = copy_paste_report(angles, angles.clone())
    assert (report.azimuth, report.polar, report.average_recall, report.coverage) == (0, 0, 1, 1)
    assert report.recall == dict.fromkeys(RECALL, 1.0)


def test_uniform_azimuths_are_a_right_angle_apart_and_seldom_recalled():
    count, spread = 40_000, 40  # polar angles of photographs lie close together: here within 40 degrees
    angles = [torch.stack([uniform(count, 0, 360, s), uniform(count, -20, 20, s + 9)], dim=-1) for s in (1, 2)]
    report = copy_paste_report(*angles)
    expected = {k: k / 180 * (1 - (1 - k / spread) ** 2) for k in RECALL}  # two uniform differences, independent
    assert report.azimuth == pytest.approx(90, abs=1) and report.polar == pytest.approx(spread / 3, abs=0.2)
    assert report.average_recall == pytest.approx(0.042, abs=0.003)
    assert report.recall == pytest.approx(expected, abs=0.003)
    assert report.average_recall == pytest.approx(sum(report.recall.values()) / 4)


@pytest.mark.parametrize(("turn", "tilt"), [(10, 0), (0, 10), (-10, 0), (0, -10)])
def test_recall_is_strict_and_needs_both_angles(turn, tilt):
    assert copy_paste_report([[355, 5]], [[355 + turn, 5 + tilt]]).recall == {5: 0, 10: 0, 15: 1, 20: 1}
    inside = copy_paste_report([[355, 5]], [[355 + 0.999 * turn, 5 + 0.999 * tilt]])
    assert inside.recall == {5: 0, 10: 1, 15: 1, 20: 1} and inside.average_recall == 0.75


def test_a_pair_counts_where_both_pictures_have_a_front():
    reference, generated = [[0, 0]] * 4, [[0, 0], [90, 0], [90, 0], [180, 40]]
    both = copy_paste_report(reference, generated, [[0.9, 0.5], [0.9, 0.4], [0.4, 0.9], [0.6, 0.6]])
    assert both.counted.tolist() == [True, False, False, True] and both.coverage == 0.5 and both.count == 2
    assert (both.azimuth, both.polar, both.average_recall) == (90, 20, 0.5)
    ungated = both.ungated
    assert (ungated.azimuth, ungated.polar, ungated.average_recall, ungated.count) == (90, 10, 0.25, 4)
    single = copy_paste_report(reference, generated, torch.tensor([0.1, 0.8, 0.8, 0.1]), threshold=0.7)
    assert (single.azimuth, single.coverage) == (90, 0.5) and single.average_recall == 0
    assert copy_paste_report(reference, generated, [0.0] * 4, threshold=0).coverage == 1


def test_no_front_anywhere_is_reported_and_no_crash():
    report = copy_paste_report([[0, 0], [0, 0]], [[10, 0], [20, 0]], [0.4, 0.1])
    assert report.coverage == 0 and report.count == 0
    assert all(isnan(value) for value in (report.azimuth, report.polar, report.average_recall, *report.recall.values()))
    assert all(isnan(low) and isnan(high) for low, high in report.intervals.values())
    assert report.ungated.azimuth == 15


def test_arrays_lists_and_half_precision_give_the_same():
    reference, generated = [[359.0, 3.0], [90.0, 0.0]], [[4.0, 3.0], [70.0, -9.0]]
    forms = (list, numpy.array, torch.tensor, lambda v: torch.tensor(v).half(), lambda v: numpy.array(v, "int16"))
    assert {copy_paste_report(form(reference), form(generated)).azimuth for form in forms} == {12.5}


@pytest.mark.parametrize(("arguments", "message"), [
    (([[0, 0]], [[0, 0], [1, 1]]), "1 references and 2 generated"),
    (([0, 0], [[0, 0]]), r"reference has shape \(2,\), expected \(N, 2\)"),
    (([[0, 0]], [[0, 0, 0]]), r"generated has shape \(1, 3\)"),
    ((torch.zeros(0, 2), torch.zeros(0, 2)), "at least one"),
    (([[0, 0], [1]], [[0, 0]]), "reference is no table of numbers"),
    (([["a", "b"]], [[0, 0]]), "reference is no table of numbers"),
    (([[0, 0], [0, 0]], [[0, 0], [nan, 0]]), "generated line 1 is .*nan.*Leave"),
    (([[0, 0]], [[0, 0]], [0.5, 0.5]), r"confidence has shape \(2,\), expected \(1,\)"),
    (([[0, 0]], [[0, 0]], [[0.5, 0.5, 0.5]]), r"confidence has shape \(1, 3\)"),
    (([[0, 0]], [[0, 0]], [3.5]), "3.5.*softmax"),
    (([[0, 0]], [[0, 0]], [nan]), "nan.*expected 0 to 1"),
    (([[0, 0]], [[0, 0]], [0.5], 50), "threshold is 50"),
])  # fmt: skip
def test_what_is_no_pair_of_angles_is_refused_with_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        copy_paste_report(*arguments)


def test_intervals_are_the_textbooks():
    quantiles = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 10: 2.2281, 29: 2.0452, 120: 1.9799}
    for freedom, quantile in quantiles.items():  # values 0 and 1 by turns: the half interval is this many deviations
        values = torch.arange(freedom + 1) % 2.0
        mean, _, high = mean_interval(values)
        assert round((high - mean) / float(values.double().std()) * sqrt(freedom + 1), 4) == quantile
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2 and high - 2 == pytest.approx(4.30265 / sqrt(3), rel=1e-5) and 2 - low == pytest.approx(high - 2)
    assert [round(v, 4) for v in share_interval([1.0, 0.0, 0.0, 0.0, 0.0])] == [0.2, 0.0362, 0.6245]  # Wilson
    low, high = share_interval([0.0] * 10)[1:]
    assert low == 0 and high == pytest.approx(0.2775, abs=1e-4)  # none of ten is not none ever
    assert all(map(isnan, mean_interval([]))) and all(map(isnan, share_interval([])))
    assert mean_interval([7.0])[0] == 7 and isnan(mean_interval([7.0])[1])
    with pytest.raises(ValueError, match=r"\(2, 2\), expected \(N,\)"):
        mean_interval([[1, 2], [3, 4]])


def test_intervals_are_those_of_0_1_0_and_of_scipy():
    for interval, values, expected in (  # 0.1.0 computed its own quantiles
        (mean_interval, (20.5, 31.25, 7.0, 90.0, 12.5), (32.25, -9.404773755707964, 73.90477375570796)),
        (mean_interval, (-0.2, 0.1), (-0.05, -1.955930710426202, 1.855930710426202)),
        (share_interval, (0.25, 0.5, 0.5, 1.0, 0.0, 0.75), (0.5, 0.2705498680446641, 0.7294501319553359)),
        (share_interval, (1.0,) * 7, (1.0, 0.6456695649333126, 1.0)),
    ):
        assert interval(values) == pytest.approx(expected, abs=1e-12)
    for hits, count in ((0, 3), (1, 5), (7, 12), (40, 40)):
        wilson = stats.binomtest(hits, count).proportion_ci(method="wilson")
        assert share_interval([1.0] * hits + [0.0] * (count - hits))[1:] == pytest.approx(tuple(wilson), abs=1e-12)


def test_stored_differences_give_what_the_angles_gave():
    reference, generated = ([[359, -20], [1, 30], [350, 0], [0, 0]], [[1, 10], [359, 30], [-10, 0], [90, 8]])
    expected = copy_paste_report(reference, generated, [0.9, 0.9, 0.1, 0.9])
    found = copy_paste_from_differences(expected.azimuth_difference, expected.polar_difference, expected.counted)
    assert found.intervals == expected.intervals and found.ungated == expected.ungated
    assert (found.azimuth, found.count, found.coverage) == (expected.azimuth, 3, 0.75)
    stored = copy_paste_from_differences([2.0, 181.0, 2.0], [30, 0, 4], [1, 0, 1])
    assert stored.azimuth == 2 and stored.count == 2 and stored.recall == {5: 0.5, 10: 0.5, 15: 0.5, 20: 0.5}
    assert copy_paste_from_differences([2.0], [1.0]).coverage == 1


@pytest.mark.parametrize("scores", [(0.0, 1.0), (0.0, 0.25, 0.5, 1.0), (0.0, 0.0, 0.0, 1.0)])
def test_intervals_of_shares_hold_the_true_mean_in_about_95_of_100_draws(scores):
    generator, truth, held = torch.Generator().manual_seed(0), sum(scores) / len(scores), 0
    for _ in range(1000):
        drawn = torch.tensor(scores)[torch.randint(len(scores), (40,), generator=generator)]
        low, high = share_interval(drawn)[1:]
        held += low <= truth <= high
    assert 930 <= held <= 975
