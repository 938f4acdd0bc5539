"""Image Guidance against its formula written out over three predictions of the host, with every family, alone and with
stages, step caches and the guidance functions of other packs."""

import logging

import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.samplers import calc_cond_batch
from comfy_extras.nodes_cfg import CFGNorm
from comfy_extras.nodes_custom_sampler import Guider_Basic, Guider_DualCFG
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_model_advanced import RescaleCFG
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from comfy_extras.nodes_slg import SkipLayerGuidanceDiTSimple
from subject_dla.nodes.sample import SubjectImageGuidance
from subject_dla.sampling.guider import staged_guider
from subject_dla.sampling.image_guidance import apply_image_guidance
from subject_dla.sampling.patch import apply_stages
from subject_dla.sampling.stages import Keyframe, Stages, preset
from subject_dla.tests.host.test_guider import condition, host, seen_by
from subject_dla.tests.host.test_parity import Subject, skip_what_the_host_lacks
from subject_dla.tests.host.test_patch import cached, guided
from subject_dla.tests.small.dit import FAMILIES, tiny, tiny_flux

FULL, TEXT, NONE, NEGATIVE = condition(), condition(references=0), condition(5, 9, 0), condition(5, 9)
TWO_STAGES = preset("semantics_first", tau1=0.7)


@pytest.fixture(scope="module")
def model():
    return tiny_flux()


class ByHand(comfy.samplers.CFGGuider):
    """The formula, over a run of the model for each of three conditions; `batched`: one run for all, as caches want."""

    def __init__(self, model, conditions, text_scale, image_scale, batched=False):
        super().__init__(model)
        self.inner_set_conds(dict(zip(("positive", "text", "none"), conditions)))
        self.scales, self.batched = (text_scale, image_scale), batched

    def predict_noise(self, x, timestep, model_options, seed=None):
        conds, run = [self.conds[name] for name in ("positive", "none", "text")], (x, timestep, model_options)
        if self.batched:
            references = any(condition.get("reference_latents") for condition in conds[0])
            full, none, text = [*calc_cond_batch(self.inner_model, conds[: 2 + references], *run), None][:3]
            text = text if references else full
        else:
            full, none, text = (calc_cond_batch(self.inner_model, [cond], *run)[0] for cond in conds)
        text_scale, image_scale = self.scales
        return none + text_scale * (text - none) + image_scale * (full - text)


def basic(model, positive):
    guider = Guider_Basic(model)
    guider.set_conds(positive)
    return guider


def cfg(model, positive=FULL, negative=NEGATIVE, scale=2.5):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(scale)
    return guider


def near(a, b):
    return (a - b).abs().max() < 1e-3 * b.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_samples_by_the_formula(family):
    skip_what_the_host_lacks(family)
    subject = Subject(family, tiny(family))
    plain, guidance = subject.model, apply_image_guidance(subject.model, 1.5)
    full, text = subject.condition(9, 2), subject.condition(9, 2, False)
    negative, none = subject.condition(9, 3), subject.condition(9, 3, False)  # its references are left out
    for sampler in ("euler", "dpmpp_2m"):
        for batch in (1, 3):
            image = torch.zeros_like(subject.latent(8, 8, batch))
            for scale in (2.5, 1.0):
                subject.model = guidance
                ours = subject.host(full, negative, sampler, batch, scale, steps=3)
                noise = comfy.sample.prepare_noise(image, 7)
                sigmas = comfy.samplers.calculate_sigmas(plain.get_model_object("model_sampling"), "simple", 3)
                by_hand = ByHand(plain, (full, text, none), scale, 1.5)
                steps = comfy.samplers.sampler_object(sampler), sigmas
                theirs = by_hand.sample(noise, image, *steps, disable_pbar=True, seed=7)
                assert near(ours, theirs.cpu()), (sampler, batch, scale, (ours - theirs).abs().max())
                subject.model = plain
                assert not near(ours, subject.host(full, none, sampler, batch, scale, steps=3))


@pytest.mark.parametrize("scale", [0.0, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("image_scale", [0.0, 1.0, 4.0])
def test_every_pair_of_scales(model, scale, image_scale):
    ours = guided(cfg(apply_image_guidance(model, image_scale), scale=scale))
    assert near(ours, guided(ByHand(model, (FULL, TEXT, NONE), scale, image_scale)))


def test_the_same_scale_twice_is_ordinary_cfg_without_references_in_the_negative(model):
    ours = guided(cfg(apply_image_guidance(model, 2.5)))
    assert near(ours, guided(cfg(model, FULL, NONE))) and not near(ours, guided(cfg(model)))


@pytest.mark.parametrize("guider", [basic, lambda model, positive: cfg(model, positive, NEGATIVE, 1.0)])
def test_without_cfg_scale_1_is_the_hosts_picture_at_its_cost_and_others_cost_one_evaluation(model, guider):
    plain, expected = seen_by(model)
    untouched = guided(guider(plain, FULL))
    clone, calls = seen_by(model)
    assert torch.equal(guided(guider(apply_image_guidance(clone, 1.0), FULL)), untouched) and calls == expected
    calls.clear()
    ours = guided(guider(apply_image_guidance(clone, 2.0), FULL))
    assert near(ours, guided(ByHand(model, (FULL, TEXT, NONE), 1.0, 2.0)))
    assert len(calls) == 2 * len(expected)
    assert {(context, references) for _, context, references in calls} == {(7, 2), (7, 0)}


def test_a_scale_that_is_no_number_is_refused(model):
    with pytest.raises(ValueError, match="its scale is nan, expected a finite number"):
        apply_image_guidance(model, float("nan"))


def test_the_host_batches_what_it_can_of_the_three(model):
    batches, (clone, calls) = [], seen_by(apply_image_guidance(model, 1.5))

    def counted(executor, model, conds, *args):
        batches.append(len(conds))
        return executor(model, conds, *args)

    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "counted", counted)
    same_length = condition(7, 9, 0)
    ours = guided(cfg(clone, FULL, same_length))
    assert batches == [3] * 6 and [call[1:] for call in calls] == [(7, 2), (7, 0)] * 6
    assert near(ours, guided(ByHand(model, (FULL, TEXT, same_length), 2.5, 1.5)))


def test_without_references_the_picture_is_the_hosts_and_the_log_says_so(model, caplog):
    clone, calls = seen_by(model)
    ours = host(apply_image_guidance(clone, 3.0), TEXT, NONE, cfg=2.0)
    assert "had no effect" in caplog.text and "positive condition has none" in caplog.text
    plain, expected = seen_by(model)
    assert torch.equal(ours, host(plain, TEXT, NONE, cfg=2.0)) and calls == expected


def test_a_model_that_does_not_read_references_is_reported(model, caplog, monkeypatch):
    read = model.model.extra_conds
    monkeypatch.setattr(model.model, "extra_conds", lambda reference_latents=None, **kwargs: read(**kwargs))
    ours = host(apply_image_guidance(model, 3.0), FULL, NEGATIVE, cfg=2.0)
    assert "does not read them" in caplog.text and near(ours, host(model, FULL, NEGATIVE, cfg=2.0))


def test_references_in_the_negative_are_left_out_and_the_log_says_so(model, caplog):
    with caplog.at_level(logging.INFO):
        with_references, without = (
            guided(cfg(apply_image_guidance(model, 1.5), FULL, some)) for some in (NEGATIVE, NONE)
        )
    assert torch.equal(with_references, without)
    assert sum("negative condition are left out" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("stages", [
    TWO_STAGES, preset("paper", tau1=0.8, tau2=0.5), preset("vae_only"), Stages((Keyframe(1, 0.5, 0.4),)),
], ids=["semantics_first", "paper", "vae_only", "strengths"])  # fmt: skip
def test_with_stages_in_either_order(model, stages, sampler):
    """The three conditions of the formula are those of the stage."""
    first = apply_stages(apply_image_guidance(model, 1.5), stages)
    second = apply_image_guidance(apply_stages(model, stages), 1.5)
    ours = guided(cfg(first), sampler=sampler)
    assert torch.equal(ours, guided(cfg(second), sampler=sampler))
    staged = staged_guider(apply_image_guidance(model, 1.5), stages, FULL, NEGATIVE, 2.5)
    assert torch.equal(ours, guided(staged, sampler=sampler))
    by_hand = guided(ByHand(apply_stages(model, stages), (FULL, TEXT, NONE), 2.5, 1.5), sampler=sampler)
    assert near(ours, by_hand), (ours - by_hand).abs().max()
    assert not near(ours, guided(cfg(apply_image_guidance(model, 1.5)), sampler=sampler))


def test_a_stage_without_references_costs_no_third_evaluation(model, caplog):
    clone, calls = seen_by(apply_image_guidance(apply_stages(model, TWO_STAGES), 1.5))
    guided(cfg(clone))
    seen = {early: [call[1:] for call in calls if (call[0] > 0.7) == early] for early in (True, False)}
    assert seen[True] and seen[True] == [(7, 0), (5, 0)] * (len(seen[True]) // 2)
    assert seen[False] and seen[False] == [(7, 2), (5, 0), (7, 0)] * (len(seen[False]) // 3)
    ours = guided(cfg(apply_image_guidance(apply_stages(model, preset("mllm_only")), 1.5)))
    assert torch.equal(ours, guided(cfg(model, TEXT, NONE))) and "stage schedule leaves them out" in caplog.text


class Recorder:
    """Guidance functions of another pack: what they get, and the host's own way."""

    def __init__(self):
        self.calls = []

    def __deepcopy__(self, memo):  # the host copies a model's options
        return self

    def pre_cfg(self, args):
        self.calls.append(("pre", len(args["conds"]), len(args["conds_out"]), args["cond_scale"]))
        return args["conds_out"]

    def post_cfg(self, args):
        self.calls.append(("post", args["cond_denoised"], args["uncond_denoised"], args["denoised"]))
        return args["denoised"]

    def calc(self, args):
        positive, negative = args["conds"]
        self.calls.append(("calc",))
        return calc_cond_batch(args["model"], [positive, negative], args["input"], args["sigma"], args["model_options"])


@pytest.mark.parametrize("calculates", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_guidance_functions_of_other_packs_run_once_a_step_on_two_predictions(model, calculates, before):
    recorder, clone = Recorder(), apply_image_guidance(model, 1.5) if before else model.clone()
    clone.set_model_sampler_pre_cfg_function(recorder.pre_cfg)
    clone.set_model_sampler_post_cfg_function(recorder.post_cfg)
    if calculates:
        clone.set_model_sampler_calc_cond_batch_function(recorder.calc)
    ours = guided(cfg(clone if before else apply_image_guidance(clone, 1.5)), steps=4)
    assert near(ours, guided(ByHand(model, (FULL, TEXT, NONE), 2.5, 1.5), steps=4))
    kinds = [call[0] for call in recorder.calls]
    assert kinds == (["calc"] * calculates + ["pre", "post"]) * 4
    assert {call[1:] for call in recorder.calls if call[0] == "pre"} == {(2, 2, 2.5)}
    for _, positive, negative, denoised in (call for call in recorder.calls if call[0] == "post"):
        assert near(negative + 2.5 * (positive - negative), denoised)


@pytest.mark.parametrize("node, settings", [
    (RescaleCFG, (0.7,)), (CFGNorm, (1.0,)), (SkipLayerGuidanceDiTSimple, (0.0, 1.0, "0", "")),
])  # fmt: skip
def test_the_hosts_own_guidance_nodes_see_ordinary_cfg_at_equal_scales(model, node, settings):
    def patch(model):
        if hasattr(node, "execute"):
            return node.execute(model, *settings).result[0]
        return getattr(node(), node.FUNCTION)(model, *settings)[0]  # older hosts

    ours = guided(cfg(apply_image_guidance(patch(model), 2.5)))
    theirs = guided(cfg(patch(model), FULL, NONE))
    assert near(ours, theirs) and not near(theirs, guided(cfg(model, FULL, NONE)))


def test_guiders_with_a_guidance_of_their_own_are_refused(model):
    clone = apply_image_guidance(model, 1.5)
    dual, perp_neg = Guider_DualCFG(clone), Guider_PerpNeg(clone)
    dual.set_conds(FULL, NEGATIVE, NONE)
    dual.set_cfg(2.0, 1.5)
    perp_neg.set_conds(FULL, NEGATIVE, NONE)
    perp_neg.set_cfg(2.0, 0.7)
    for guider, name in ((dual, "Guider_DualCFG"), (perp_neg, "Guider_PerpNeg"), (ByHand, "ByHand")):
        guider = guider(clone, (FULL, TEXT, NONE), 2, 1) if guider is ByHand else guider
        with pytest.raises(RuntimeError, match=f"{name}.*sampling_function.*cfg_cond2_negative"):
            guided(guider)
    other = comfy.samplers.CFGGuider(clone)
    other.inner_set_conds({"prompt": FULL})
    with pytest.raises(ValueError, match="CFGGuider.*sampling_function"):
        guided(other)


def test_the_node_leaves_no_trace_and_a_second_one_takes_the_place_of_the_first(model):
    untouched, options = host(model, FULL, NEGATIVE, cfg=2.0), repr(model.model_options)
    (clone,) = SubjectImageGuidance.execute(model, 3.0).result
    (again,) = SubjectImageGuidance.execute(clone, 1.5).result
    one, other = (host(some, FULL, NEGATIVE, cfg=2.0) for some in (again, apply_image_guidance(model, 1.5)))
    assert torch.equal(one, other) and not torch.equal(one, host(clone, FULL, NEGATIVE, cfg=2.0))
    assert torch.equal(host(model, FULL, NEGATIVE, cfg=2.0), untouched) and repr(model.model_options) == options


@pytest.mark.parametrize("stages", [None, preset("both"), TWO_STAGES], ids=["alone", "both", "two_stages"])
@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
def test_the_hosts_step_caches_keep_all_three_predictions(model, node, stages):
    def staged(model):
        return model if stages is None else apply_stages(model, stages)

    plain, expected = seen_by(staged(cached(node, model)))
    theirs = guided(ByHand(plain, (FULL, TEXT, NONE), 2.5, 1.5, batched=True), steps=20)
    for order in (
        lambda model: apply_image_guidance(staged(cached(node, model)), 1.5),
        lambda model: cached(node, staged(apply_image_guidance(model, 1.5))),
    ):
        clone, calls = seen_by(order(model))
        ours = guided(cfg(clone), steps=20)
        assert near(ours, theirs), (ours - theirs).abs().max()
        assert {t for t, *_ in calls} == {t for t, *_ in expected}
        assert len({t for t, *_ in calls}) < 18  # or the cache did nothing


@pytest.mark.parametrize("stages", [None, TWO_STAGES], ids=["alone", "two_stages"])
def test_areas_and_prompts_that_end_half_way(model, stages):
    def staged(model):
        return model if stages is None else apply_stages(model, stages)

    def positive(references):
        first, second = condition(references=references), condition(6, 12, references=references)
        return [*first, [second[0][0], {**second[0][1], "area": (8, 4, 0, 4), "end_percent": 0.6}]]

    ours = guided(cfg(staged(apply_image_guidance(model, 1.5)), positive(2)))
    assert near(ours, guided(ByHand(staged(model), (positive(2), positive(0), NONE), 2.5, 1.5)))
    assert not near(ours, guided(cfg(staged(apply_image_guidance(model, 1.5)))))
