from math import exp

import pytest
import torch
from subject_dla.sampling.clock import CLOCKS, FLOW_TIME_RESOLUTION, STEPS
from subject_dla.sampling.stages import PRESETS, Keyframe, Stages, plan, preset


def test_papers_thresholds_are_closed_above():
    stages = preset("paper")
    # t >= 0.95 MLLM only; 0.85 <= t < 0.95 both; below VAE only (paper, multi-stage denoising)
    found = [stages.strengths(t) for t in (1.0, 0.95, 0.9499, 0.85, 0.8499, 0.0)]
    assert found == [(1, 0), (1, 0), (1, 1), (1, 1), (0, 1), (0, 1)]
    assert stages.strengths(float(torch.tensor(0.95))) == (1, 0)  # in float32 0.949999988


def test_flux_schedule_of_25_steps_splits_4_5_16():
    # FLUX's shift at 4096 tokens: mu = 1.15, t' = e^mu / (e^mu + 1/t - 1); the count is the paper's table read with it
    sigmas = [exp(1.15) / (exp(1.15) + 1 / t - 1) if t else 0.0 for t in [1 - i / 25 for i in range(26)]]
    stages = [(s.context, s.reference) for s in plan(preset("paper"), sigmas)]
    assert [stages.count(x) for x in [(1, 0), (1, 1), (0, 1)]] == [4, 5, 16]
    assert stages == sorted(stages, key=[(1, 0), (1, 1), (0, 1)].index)  # no stage comes back


def test_share_of_steps_is_exact_on_the_grid_and_between():
    sigmas = [1.0, 0.75, 0.5, 0.25, 0.0]
    found = [STEPS.position(s, sigmas) for s in (1.0, 0.9, 0.75, 0.5 * (1 + 1e-6), 0.3, 0.25, 0.1)]
    assert found == [0, 0, 0.25, 0.5, 0.5, 0.75, 0.75]
    stages = Stages((Keyframe(0, 1, 0), Keyframe(0.5, 0, 1)), "steps")
    assert [(s.context, s.reference) for s in plan(stages, sigmas)] == [(1, 0), (1, 0), (0, 1), (0, 1)]
    rising = sigmas[::-1]  # a picture is turned into noise
    assert [STEPS.position(s, rising) for s in (0, 0.1, 0.25, 0.5 * (1 - 1e-6), 0.75, 0.9)] == [
        0, 0, 0.25, 0.5, 0.75, 0.75
    ]  # fmt: skip
    assert [(s.context, s.reference) for s in plan(stages, rising)] == [(1, 0), (1, 0), (0, 1), (0, 1)]
    assert "4 steps" in STEPS.describe_part(rising[2:], rising, 1.0)
    with pytest.raises(ValueError, match="its sigmas run from 0 to 0.5"):
        STEPS.describe_part(rising, rising[:3], 1.0)


def test_linear_blend_moves_evenly_to_the_next_keyframe():
    stages = Stages((Keyframe(1, 1, 0, "linear"), Keyframe(0.5, 0, 1)))
    assert stages.strengths(1.0) == (1, 0) and stages.strengths(0.2) == (0, 1)
    assert stages.strengths(0.75) == pytest.approx((0.5, 0.5))
    assert set(stages.variants()) == {(True, False), (True, True), (False, True)}
    assert stages.strengths(float("nan")) in [(1, 0), (0, 1)]  # some samplers make it of rising sigmas


def test_resolution_clock_keeps_4096_tokens_and_matches_the_demo_notes_at_36():
    adjust = FLOW_TIME_RESOLUTION.adjust
    assert adjust(0.95, 4096) == pytest.approx(0.95)
    assert adjust(0.95, 36) == pytest.approx(0.64, abs=0.005)
    assert adjust(0.85, 36) == pytest.approx(0.35, abs=0.005)
    stages = preset("paper", "flow_time_resolution")
    assert stages.strengths(0.7, tokens=36) == (1, 0) and stages.strengths(0.7, tokens=4096) == (0, 1)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_starts_at_the_beginning_of_its_clock(name):
    for clock, taus in (("flow_time", (0.95, 0.85)), ("steps", (0.16, 0.36))):
        stages = preset(name, clock, *taus)
        assert stages.keyframes[0].start == (0 if clock == "steps" else 1) and stages.clock is CLOCKS[clock]
        assert all(any(groups) for groups in stages.variants())


@pytest.mark.parametrize("make, words", [
    (lambda: preset("paper", tau1=0.85, tau2=0.95), ["out of order", "0.95", "0.85", "fall"]),
    (lambda: preset("paper", "steps"), ["out of order", "rise", "flow times"]),
    (lambda: preset("paper", tau1=1.5), ["1.5", "between 0 and 1"]),
    (lambda: preset("nonsense"), ["nonsense", "semantics_first"]),
    (lambda: Stages((Keyframe(1, -0.1, 1),)), ["Keyframe 1", "mllm", "-0.1"]),
    (lambda: Stages((Keyframe(1, 1, float("nan")),)), ["vae", "nan"]),
    (lambda: Stages((Keyframe(1, 1, 1, "cubic"),)), ["cubic", "linear"]),
    (lambda: Stages((Keyframe(1, 1, 1),), "sigma"), ["sigma", "flow_time"]),
    (lambda: Stages(()), ["no keyframe"]),
])  # fmt: skip
def test_bad_schedules_say_what_is_wrong(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words), error.value
