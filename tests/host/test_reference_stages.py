"""A schedule for each reference, multiplied into the run's: as running with strengths set by hand for every step."""

from math import inf, log

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_easycache import EasyCacheNode
from subject_dla.loaders.conditioning import ReferenceSettings, add_references
from subject_dla.sampling import patch, staged_run
from subject_dla.sampling.patch import apply_stages
from subject_dla.sampling.reference_stages import RunSchedule
from subject_dla.sampling.stages import Keyframe, Stages, preset
from subject_dla.tests.host.test_guider import seen_by
from subject_dla.tests.host.test_parity import Subject, skip_what_the_host_lacks
from subject_dla.tests.host.test_regions import (
    LEFT,
    MASKS,
    REGIONS,
    STRENGTHS,
    by_keys,
    context_of,
    dense,
    with_settings,
)
from subject_dla.tests.host.test_regions import textbook as dense_textbook
from subject_dla.tests.small.dit import FAMILIES, tiny, tiny_flux

STAGES = "subject_reference_stages"
STEPS = 6
ON, OFF = Stages((Keyframe(1, 0.5, 1),)), Stages((Keyframe(1, 1, 0),))
EARLY = Stages((Keyframe(1, 1, 1), Keyframe(0.8, 1, 0)))
LATE = Stages((Keyframe(0, 1, 0), Keyframe(0.5, 1, 0.7)), "steps")
RISING = Stages((Keyframe(0.9, 1, 0.2, "linear"), Keyframe(0.3, 1, 1.4)), "flow_time_resolution")


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request):
    skip_what_the_host_lacks(request.param)
    return Subject(request.param, tiny(request.param))


@pytest.fixture(scope="module")
def flux():
    return Subject("flux", tiny_flux(24))


def sigmas_of(subject, steps=STEPS):
    device = torch.device("cpu")
    return comfy.samplers.KSampler(subject.model, steps, device, "euler", "simple", 1.0).sigmas.tolist()


def strengths_at(stages, sigma, sigmas, tokens):
    return stages.strengths(stages.clock.position(sigma, sigmas), tokens)


def by_hand(subject, stages, own, steps=STEPS):
    """One schedule in which the reference strength of each step is the product, without linear blends."""
    sigmas, tokens = sigmas_of(subject, steps), subject.tokens(8, 8)
    keyframes = []
    for step, sigma in enumerate(sigmas[:-1]):
        context, reference = strengths_at(stages, sigma, sigmas, tokens)
        factor = strengths_at(own, sigma, sigmas, tokens)[1]
        keyframes.append(Keyframe(step / steps, context, reference * 1.0 * factor))
    return Stages(keyframes, "steps")


@pytest.mark.parametrize("batch", [1, 3])
def test_a_constant_1_is_no_schedule_and_all_off_is_mllm_only_bit_for_bit(subject, batch):
    pair = subject.condition(9, 2), subject.condition(9, 3)
    both = subject.staged(preset("both"), *pair, batch=batch)
    constant = [with_settings(c, **{STAGES: [ON, None]}) for c in pair]
    assert torch.equal(subject.staged(preset("both"), *constant, batch=batch), both)
    off = [with_settings(c, **{STAGES: [OFF, Stages((Keyframe(0, 1, 0),), "steps")]}) for c in pair]
    without = subject.staged(preset("mllm_only"), *pair, batch=batch)
    assert torch.equal(subject.staged(preset("both"), *off, batch=batch), without) and not torch.equal(both, without)


@pytest.mark.parametrize("own", [EARLY, LATE, RISING], ids=["early", "late", "rising"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_all_references_under_one_schedule_are_a_run_with_the_products_bit_for_bit(subject, own, sampler):
    """Also where the product falls to 0: both leave the references out."""
    run = Stages((Keyframe(1, 1, 0), Keyframe(0.93, 0.8, 0.5, "linear"), Keyframe(0.4, 1, 1)))
    pair = subject.condition(9, 2), subject.condition(9, 3)
    scheduled = [with_settings(c, **{STAGES: [own, own]}) for c in pair]
    for stages in (run, preset("both")):
        ours = subject.staged(stages, *scheduled, sampler, steps=STEPS)
        theirs = subject.staged(by_hand(subject, stages, own), *pair, sampler, steps=STEPS)
        assert torch.equal(ours, theirs) and not torch.equal(ours, subject.staged(stages, *pair, sampler, steps=STEPS))


@pytest.mark.parametrize("batch", [1, 3])
def test_each_reference_follows_its_own_against_textbook_attention_set_by_hand_at_each_step(
    subject, batch, monkeypatch
):
    """With regions, strengths and a mask; positions stay those with all references where one is off."""
    sigmas, tokens = sigmas_of(subject), subject.tokens(8, 8)
    run = Stages((Keyframe(1, 0.7, 1), Keyframe(0.5, 1, 0.6)))
    regions, strengths, masks = [None, LEFT], [0.9, 0.5], [LEFT, None]
    pair = subject.condition(9, 2), subject.condition(9, 3)
    settings = {STRENGTHS: strengths, MASKS: masks, REGIONS: regions}
    schedules = [[EARLY, RISING], [LATE, None]]  # positive, negative
    ours = [with_settings(c, **settings, **{STAGES: own}) for c, own in zip(pair, schedules)]
    ours = subject.staged(run, *ours, batch=batch, steps=STEPS)

    biases: dict = {}

    def set_by_hand(sigma):
        context, reference = strengths_at(run, sigma, sigmas, tokens)
        for index, own in enumerate(schedules):
            factors = [1 if s is None else strengths_at(s, sigma, sigmas, tokens)[1] for s in own]
            products = [reference * strength * factor for strength, factor in zip(strengths, factors)]
            log_or_removed = (context, *(max(p, 1e-300) for p in products))
            bias = dense(subject, context_of(subject, 9), regions, log_or_removed, masks)
            biases.update(by_keys(subject, index, bias.masked_fill(bias < log(1e-200), -inf)))

    clone = dense_textbook(subject.model, biases)
    # Qwen-Image 2.1's would keep the first step's
    clone.model_options["transformer_options"]["qwen_image21_cache"] = {"device": "off"}

    def at_each_step(executor, x, timestep, *args, **kwargs):
        set_by_hand(float(timestep.flatten()[0]))
        return executor(x, timestep, *args, **kwargs)

    clone.add_wrapper_with_key(patch.PREDICT_NOISE, "by hand", at_each_step)
    monkeypatch.setattr(subject, "model", clone)
    theirs = subject.host(*pair, batch=batch, steps=STEPS)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max(), (ours - theirs).abs().max() / theirs.abs().max()


def test_the_last_reference_off_is_the_host_without_it_where_its_position_moves_no_other(subject):
    if subject.backbone.name in ("omnigen2", "boogu", "z_image", "qwen_image21"):
        pytest.skip("places the picture behind the references")
    pair = subject.condition(9, 2), subject.condition(9, 3)
    scheduled = [with_settings(c, **{STAGES: [None, OFF]}) for c in pair]
    ours = subject.staged(preset("both"), *scheduled)
    first = [with_settings(c, reference_latents=c[0][1]["reference_latents"][:1]) for c in pair]
    theirs = subject.host(*first)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_calls_have_both_latents_or_none(flux):
    """Of two references one goes out at 0.8, the other comes in half-way."""
    clone, calls = seen_by(flux.model)
    positive = with_settings(flux.condition(9, 2), **{STAGES: [EARLY, LATE]})
    model, flux.model = flux.model, clone
    try:
        flux.staged(preset("both"), positive, None, cfg=1.0, steps=STEPS)
        assert [references for _, _, references in calls] == [2] * STEPS
        calls.clear()
        positive = with_settings(positive, **{STAGES: [LATE, LATE]})
        flux.staged(preset("both"), positive, None, cfg=1.0, steps=STEPS)
        assert [references for _, _, references in calls] == [0] * (STEPS // 2) + [2] * (STEPS // 2)
    finally:
        flux.model = model


def entry(*settings):
    values = add_references([[torch.zeros(1, 1, 1), {}]], [torch.zeros(1, 1, 2, 2)] * len(settings), settings, None)[0]
    return {"cross_attn": values[0], **values[1]}


def own(stages, strength=1.0):
    return ReferenceSettings(strength, stages=stages)


@pytest.mark.parametrize("run, conditions, expected", [
    ("both", [entry()], [(True, True)]), ("both", [entry(own(None))], [(True, True)]),
    ("both", [entry(own(EARLY))], [(True, True), (True, False)]),
    ("both", [entry(own(EARLY), own(None))], [(True, True)]),
    ("both", [entry(own(EARLY)), entry(own(ON))], [(True, True)]), ("both", [entry(own(OFF))], [(True, False)]),
    ("both", [entry(own(EARLY), own(None, 0))], [(True, True), (True, False)]),
    ("paper", [entry(own(EARLY), own(LATE))], [(True, False), (True, True), (False, True), (False, False)]),
    ("mllm_only", [entry(own(RISING))], [(True, False)]),
])  # fmt: skip
def test_a_run_has_the_variants_that_its_schedules_can_reach(run, conditions, expected):
    assert RunSchedule.of(preset(run), conditions).variants() == expected


def test_a_keyframe_of_a_reference_begins_the_step_cache_anew_and_refuses_others(flux, monkeypatch):
    began = []
    monkeypatch.setattr(staged_run, "restart_cache", lambda *_: began.append(1))
    first = Stages((Keyframe(0, 1, 1), Keyframe(0.2, 1, 0.5)), "steps")
    positive = with_settings(flux.condition(9, 2), **{STAGES: [first, LATE]})
    flux.staged(preset("both"), positive, None, cfg=1.0, steps=STEPS)
    assert len(began) == 2
    monkeypatch.undo()

    settings = {"reuse_threshold": 3.0, "start_percent": 0.1, "end_percent": 0.95, "verbose": False}
    cached = EasyCacheNode.execute(flux.model, **settings).result[0]
    monkeypatch.setattr(flux, "model", apply_stages(cached, preset("both")))
    bare = flux.condition(9, 2)
    scheduled = [with_settings(bare, **{STAGES: schedules}) for schedules in ([ON, ON], [LATE, ON])]
    assert torch.equal(flux.host(scheduled[0], bare, steps=20), flux.host(bare, bare, steps=20))
    assert flux.host(scheduled[1], bare, steps=20).isfinite().all()

    class FirstBlockCache:
        def __call__(self, apply_model, args):
            return apply_model(args["input"], args["timestep"], **args["c"])

    flux.model.set_model_unet_function_wrapper(FirstBlockCache())
    flux.host(scheduled[0], bare)
    with pytest.raises(ValueError, match="step cache.*FirstBlockCache"):
        flux.host(scheduled[1], bare)


def test_what_cannot_work_is_refused_before_the_run(flux, monkeypatch):
    early = with_settings(flux.condition(9, 2), **{STAGES: [EARLY, EARLY]})
    with pytest.raises(ValueError, match="At sigma 0.*VAE tokens alone.*own schedule"):
        flux.staged(preset("paper"), early, None, cfg=1.0, steps=STEPS)
    late = with_settings(flux.condition(9, 2), **{STAGES: [LATE, None]})
    assert flux.staged(preset("paper"), late, None, cfg=1.0, steps=STEPS).isfinite().all()
    with pytest.raises(ValueError, match="^Staged Sampler: .*counts steps.*dpm_adaptive"):
        flux.staged(preset("both"), late, None, "dpm_adaptive", cfg=1.0)
    for module in ("conditions", "patch"):
        monkeypatch.setattr(f"subject_dla.sampling.{module}.backbone_of", lambda m: None)
    with pytest.raises(ValueError, match="schedules of single references.*token layout"):
        flux.staged(preset("both"), late, None, cfg=1.0)
