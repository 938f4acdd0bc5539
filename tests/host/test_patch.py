"""Apply Stages on a MODEL beside what else people put on one: every guider of the host, its real step caches, attention
and tiles of other packs, compiled models, split runs."""

import logging
import math
from dataclasses import dataclass
from types import SimpleNamespace
from uuid import uuid4

import comfy.model_patcher
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.controlnet import ControlBase
from comfy_extras.nodes_custom_sampler import Guider_Basic, Guider_DualCFG
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from einops import rearrange
from subject_dla.loaders.reference_latents import reference_method
from subject_dla.sampling.patch import apply_stages
from subject_dla.sampling.staged_run import StagedRun
from subject_dla.sampling.stages import Keyframe, Stages, preset
from subject_dla.tests.host.test_guider import (
    CONTEXT,
    FIRST,
    IMAGE,
    SECOND,
    condition,
    dense_oracle,
    host,
    latent,
    seen_by,
)
from subject_dla.tests.host.test_parity import Subject
from subject_dla.tests.small.dit import on_this_host, tiny, tiny_flux

HALF = Stages((Keyframe(1, 0.5, 0.25),))
HALF_LOGS = torch.cat([
    torch.full((CONTEXT,), math.log(0.5)), torch.zeros(IMAGE), torch.full((FIRST + SECOND,), math.log(0.25))
])  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_flux()


def guided(guider, sigmas=None, sampler="euler", image=None, steps=6):
    """A run of a guider, as SamplerCustomAdvanced starts it."""
    image = torch.zeros(1, 16, 8, 8) if image is None else image
    if sigmas is None:
        sigmas = comfy.samplers.calculate_sigmas(
            guider.model_patcher.get_model_object("model_sampling"), "simple", steps
        )
    noise = comfy.sample.prepare_noise(image, 3) if not image.any() else torch.zeros_like(image)
    return guider.sample(noise, image, comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=3)


def basic(model, *conditions):
    guider = Guider_Basic(model)
    guider.set_conds(conditions[0])
    return guider


def cfg(model, *conditions):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditions[0], conditions[2])
    guider.set_cfg(2.0)
    return guider


def dual(model, *conditions, nested=False):
    guider = Guider_DualCFG(model)
    guider.set_conds(*conditions)
    guider.set_cfg(2.0, 1.5, nested=nested)
    return guider


def dual_nested(model, *conditions):
    return dual(model, *conditions, nested=True)


def perp_neg(model, *conditions):
    guider = Guider_PerpNeg(model)
    guider.set_conds(*conditions)
    guider.set_cfg(2.0, 0.7)
    return guider


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("guider", [basic, cfg, dual, dual_nested, perp_neg])
def test_every_named_condition_of_every_guider_is_staged(model, guider, sampler):
    conditions = condition(), condition(6, 9), condition(5, 8)
    bare = condition(references=0), condition(6, 9, 0), condition(5, 8, 0)
    untouched, without = (guided(guider(model, *some), sampler=sampler) for some in (conditions, bare))
    assert torch.equal(guided(guider(apply_stages(model, preset("both")), *conditions), sampler=sampler), untouched)
    off = apply_stages(model, preset("mllm_only"))
    assert torch.equal(guided(guider(off, *conditions), sampler=sampler), without)
    clone, calls = seen_by(apply_stages(model, preset("paper", tau1=0.8, tau2=0.5)))
    if guider is perp_neg:  # it would divide 0 by 0 there
        with pytest.raises(ValueError, match="Perp-Neg.*semantics_first"):
            guided(guider(clone, *conditions), sampler=sampler)
        clone, calls = seen_by(apply_stages(model, preset("semantics_first", tau1=0.8)))
    staged = guided(guider(clone, *conditions), sampler=sampler)
    assert staged.isfinite().all() and not torch.equal(staged, untouched)
    kinds = {(context > 1, bool(references)) for _, context, references in calls}
    assert kinds == {(True, False), (True, True)} | ({(False, True)} if guider is not perp_neg else set())
    assert all(
        bool(references) == (t < 0.8) and (context > 1) == (t > 0.5 or guider is perp_neg)
        for t, context, references in calls
    )
    assert torch.equal(guided(guider(model, *conditions), sampler=sampler), untouched)  # no trace


class KeepsItsOwnNegative(comfy.samplers.CFGGuider):
    """As DualModelGuider of newer hosts: what it takes where sampling starts stays in the first stage."""

    def predict_noise(self, x, timestep, model_options, seed=None):
        kept = self.__dict__.setdefault("kept", self.conds["negative"])
        conditions = self.conds["positive"], kept
        positive, negative = comfy.samplers.calc_cond_batch(self.inner_model, conditions, x, timestep, model_options)
        return negative + self.cfg * (positive - negative)


def test_a_guider_that_keeps_conditions_of_its_own_is_refused(model):
    def run(stages):
        guider = KeepsItsOwnNegative(apply_stages(model, stages))
        guider.set_conds(condition(), condition(5, 9))
        guider.set_cfg(2.0)
        return guided(guider)

    assert run(preset("both")).isfinite().all()
    with pytest.raises(RuntimeError, match="guider KeepsItsOwnNegative evaluates a condition"):
        run(preset("semantics_first", tau1=0.8))


def test_a_guider_with_a_second_model_is_refused(model):
    import comfy_extras.nodes_custom_sampler as extras

    if not hasattr(extras, "Guider_DualModel"):
        pytest.skip("not on this host")
    guider = extras.Guider_DualModel(apply_stages(model, preset("semantics_first")), tiny_flux(seed=1))
    guider.set_conds(condition(), condition(5, 9))
    guider.set_cfg(2.0)
    with pytest.raises(RuntimeError, match="guider Guider_DualModel evaluates a condition or a model"):
        guided(guider)


def cached(node, model):
    settings = {"reuse_threshold": 3.0, "start_percent": 0.1, "end_percent": 0.95, "verbose": False}
    return node.execute(model, **settings).result[0]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
def test_the_hosts_step_caches_work_as_without_stages_and_begin_anew_with_each(model, node, first):
    """`first`: the stages are put on before the cache."""

    def patched(stages):
        return cached(node, apply_stages(model, stages)) if first else apply_stages(cached(node, model), stages)

    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 20)
    conditions, bare = (condition(), None, condition(5, 9)), (condition(references=0), None, condition(5, 9, 0))
    plain, expected = seen_by(cached(node, model))  # inside the cache: the calls that it leaves to the model
    untouched = guided(cfg(plain, *conditions), sigmas)
    assert len(expected) < 2 * 20 * 0.9  # or there is nothing to see
    clone, calls = seen_by(patched(preset("both")))
    assert torch.equal(guided(cfg(clone, *conditions), sigmas), untouched) and calls == expected
    # two stages are two runs, each with a cache of its own
    clone, calls = seen_by(patched(preset("semantics_first", tau1=0.5)))
    staged = guided(cfg(clone, *conditions), sigmas)
    at = int((sigmas > 0.5).sum())
    plain, expected = seen_by(cached(node, model))
    half = guided(cfg(plain, *conditions), sigmas[at:], image=guided(cfg(plain, *bare), sigmas[: at + 1]))
    assert len(calls) < 2 * 20 * 0.9
    assert [(round(t, 4), *rest) for t, *rest in calls] == [(round(t, 4), *rest) for t, *rest in expected]
    assert torch.allclose(staged, half, atol=1e-4), (staged - half).abs().max()


def key_value_cached(model):
    node = pytest.importorskip("comfy_extras.nodes_flux")
    if not hasattr(node, "FluxKVCache"):
        pytest.skip("not on this host")
    return node.FluxKVCache.execute(model).result[0]


def test_the_hosts_cache_of_the_references_keys_begins_anew_with_each_stage():
    if not on_this_host("flux2"):
        pytest.skip("not on this host")
    subject = Subject("flux2", tiny("flux2", guidance_embed=False, depth=2, depth_single_blocks=1))
    model, conditions = subject.model, [subject.condition(9, seed) for seed in (2, 3)]
    for (_, values), *_ in conditions:
        values.pop("reference_latents_method", None)
    bare = [[[c, {k: v for k, v in values.items() if k != "reference_latents"}]] for (c, values), *_ in conditions]
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 10)
    first, second = (int((sigmas >= tau).sum()) for tau in (0.8, 0.5))

    def run(stages, image, sigmas, conditions=conditions):
        patched = model if stages is None else apply_stages(model, stages)
        positive, negative = conditions
        return guided(cfg(key_value_cached(patched), positive, None, negative), sigmas, image=image)

    ours = run(preset("paper", tau1=0.8, tau2=0.5), torch.zeros_like(subject.latent(8, 8)), sigmas)
    theirs = run(None, torch.zeros_like(ours), sigmas[: first + 1], bare)
    theirs = run(None, theirs, sigmas[first : second + 1])
    theirs = run(preset("vae_only"), theirs, sigmas[second:])
    assert torch.allclose(ours, theirs, atol=1e-4), (ours - theirs).abs().max()


class TeaCacheForTheTest:
    def wrapper(self, apply_model, args):
        raise AssertionError("never called")


def test_step_caches_of_other_packs_are_refused_by_name(model):
    clone = apply_stages(model, preset("paper"))
    clone.set_model_unet_function_wrapper(TeaCacheForTheTest().wrapper)
    with pytest.raises(ValueError, match="step cache.*TeaCacheForTheTest.*EasyCache"):
        host(clone, condition(), condition())


def sparse_attention(func, q, k, v, heads, **kwargs):
    kwargs.pop("transformer_options")
    return func(q, k, v, heads, **kwargs)


def test_attention_that_bypasses_the_override_is_refused_by_name(model):
    def sparse(executor, *args, transformer_options=None, **kwargs):
        args = list(args)
        options = next(a for a in args if isinstance(a, dict))
        args[args.index(options)] = {**options, "optimized_attention_override": sparse_attention}
        return executor(*args, **kwargs)

    clone = apply_stages(model, HALF)
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "sparse", sparse)
    with pytest.raises(RuntimeError, match="none of the attention calls of FLUX.1.*wrapper sparse"):
        host(clone, condition(), condition())
    some = apply_stages(model, HALF)
    block = model.model.diffusion_model.single_blocks[0]

    def forward(x, *args, **kwargs):
        kwargs["transformer_options"] = {
            **kwargs.get("transformer_options", {}),
            "optimized_attention_override": sparse_attention,
        }
        return type(block).forward(block, x, *args, **kwargs)

    some.add_object_patch("diffusion_model.single_blocks.0.forward", forward)
    with pytest.raises(RuntimeError, match="2 of 3 of the attention calls.*block function .*forward"):
        host(some, condition(), condition())


class Engine(torch.nn.Module):
    """As a TensorRT engine, or a model of another pack: without the blocks of the host's class."""

    dtype = torch.float32

    def forward(self, x, timestep, context, *args, **kwargs):
        return x / 2


@pytest.mark.parametrize("stages", [HALF, preset("vae_only"), preset("semantics_first")])
def test_a_model_that_another_extension_runs_is_refused_where_tokens_need_attention(stages):
    clone = apply_stages(tiny_flux(), stages)
    clone.add_object_patch("diffusion_model", Engine())
    if stages == preset("semantics_first"):
        assert host(clone, condition(), condition()).isfinite().all()
    else:
        with pytest.raises(RuntimeError, match=r"none of the attention calls of FLUX.1 \(Engine\)"):
            host(clone, condition(), condition())


@dataclass  # compares by value, so it has no hash
class Scaled:
    by: float

    def __call__(self, func, q, k, v, heads, **kwargs):
        return self.by * func(q, k, v, heads, **kwargs)


def test_an_override_of_another_extension_made_anew_at_each_step_stays_in_place(model, monkeypatch):
    runs, begin = [], StagedRun.__init__
    monkeypatch.setattr(StagedRun, "__init__", lambda self, *args: [begin(self, *args), runs.append(self)][0])
    clone, oracle = apply_stages(model, HALF), dense_oracle(model, HALF_LOGS)
    textbook = oracle.model_options["transformer_options"]["optimized_attention_override"]
    oracle.model_options["transformer_options"]["optimized_attention_override"] = lambda *args, **kwargs: (
        0.5 * textbook(*args, **kwargs)
    )

    def anew(executor, x, timestep, options, seed=None):
        options["transformer_options"]["optimized_attention_override"] = Scaled(0.5)
        return executor(x, timestep, options, seed)

    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, "anew", anew)
    conditions = condition(), None, condition(7, 9)
    ours, theirs = (guided(cfg(some, *conditions)) for some in (clone, oracle))
    assert torch.allclose(ours, theirs, atol=2e-4) and len(runs[0]._overrides) == 1


def test_a_wrapper_that_runs_the_model_twice_is_no_error(model):
    def twice(executor, *args, **kwargs):
        return (executor(*args, **kwargs) + executor(*args, **kwargs)) / 2

    clone, conditions = apply_stages(model, HALF), (condition(), condition())
    expected = host(clone, *conditions)
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "twice", twice)
    assert torch.allclose(host(clone, *conditions), expected, atol=1e-5)


def style_reference(model, tokens=5):
    """USO's: tokens of SigLIP before the context, by the host's own patch."""
    node = pytest.importorskip("comfy_extras.nodes_model_patch")
    if not hasattr(node, "UsoStyleProjectorPatch"):
        pytest.skip("not on this host")
    style, clone = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(7)), model.clone()
    patch = node.UsoStyleProjectorPatch(SimpleNamespace(model=lambda image: style), torch.zeros(1))
    patch.models = list  # none to load
    clone.set_model_post_input_patch(patch)
    return clone


@pytest.mark.parametrize("context, reference", [(0.5, 0.25), (0, 1), (1, 0.5), (2, 0)])
def test_tokens_that_a_patch_adds_to_the_context_have_no_strength(model, context, reference):
    styled = style_reference(model)  # takes one picture and condition at a time
    strengths = [1.0] * 5 + [context] * CONTEXT + [1.0] * IMAGE + [reference] * (FIRST + SECOND) * (reference > 0)
    stages, conditions = Stages((Keyframe(1, context, reference),)), (condition(), condition(seed=4))
    theirs = conditions if reference else (condition(references=0), condition(seed=4, references=0))
    theirs = host(dense_oracle(styled, torch.tensor(strengths).log()), *theirs)
    ours = host(apply_stages(styled, stages), *conditions)
    assert torch.allclose(ours, theirs, atol=2e-4), (ours - theirs).abs().max()
    assert not torch.allclose(ours, host(apply_stages(model, stages), *conditions), atol=1e-3)
    if not context:
        others = condition(seed=8), condition(9, seed=9)
        assert torch.equal(host(apply_stages(styled, stages), *others), ours)


def test_skipped_blocks_are_named_and_no_error(model, caplog):
    def skip_layer(args, extra):
        return args

    clone = apply_stages(model, HALF)
    clone.set_model_patch_replace(skip_layer, "dit", "double_block", 1)
    with caplog.at_level(logging.WARNING):
        assert host(clone, condition(), condition(), cfg=2.0).isfinite().all()
    assert [
        record.message
        for record in caplog.records
        if "1 of 3 blocks" in record.message and "skip_layer" in record.message
    ]


def test_a_prompt_that_ends_half_way_is_nothing_to_complain_of(model):
    ending = [[c, {**v, "start_percent": 0.0, "end_percent": 0.5}] for c, v in condition()]
    ours = host(apply_stages(model, HALF), ending, ending)
    assert torch.allclose(ours, host(dense_oracle(model, HALF_LOGS), ending, ending), atol=2e-4)


class ReadText(ControlBase):
    """A ControlNet that writes down what text it is given, as ComfyUI's own reads it, and adds nothing."""

    def __init__(self):
        super().__init__()
        self.read = []

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options=None):
        self.read.append(cond.get("crossattn_controlnet", cond["c_crossattn"]))

    def copy(self):
        return self


@pytest.mark.parametrize("old_node", [False, True])
def test_a_controlnet_reads_no_word_of_a_context_that_is_off(model, old_node):
    """Its attention does not pass through the override, so that the one token that is left would be a word."""
    control, conditions = ReadText(), [condition(CONTEXT, 1), condition(7, 2)]
    for _, values in [*conditions[0], *conditions[1]][: 1 if old_node else 2]:
        values |= {"control": control, "control_apply_to_uncond": old_node}
    conditions[1][0][1]["cross_attn_controlnet"] = torch.ones(1, 3, 24)
    host(apply_stages(model, preset("both")), *conditions, cfg=2.5)
    assert control.read and all(text.any() for text in control.read)
    control.read.clear()
    host(apply_stages(model, preset("vae_only")), *conditions, cfg=2.5)
    assert control.read and not any(text.any() for text in control.read)


@pytest.mark.parametrize("stages", [HALF, preset("vae_only"), preset("semantics_first", tau1=0.7)])
def test_a_condition_that_another_extension_adds_has_no_stages_and_takes_none_from_others(model, stages, caplog):
    plain, clone, added = apply_stages(model, stages), apply_stages(model, stages), []

    def with_another(executor, host_model, conds, *args):
        another = {**conds[0][0], "uuid": uuid4()}  # goes into one batch with the first
        *out, last = executor(host_model, [*conds, [another]], *args)
        added.append((out[0], last))
        return out

    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "another", with_another)
    ours, theirs = (guided(cfg(m, condition(), None, condition(7, 9))) for m in (clone, plain))
    assert torch.allclose(ours, theirs, atol=1e-4), (ours - theirs).abs().max()
    if stages is HALF:
        assert not torch.allclose(*added[0], atol=1e-3)
    assert sum("adds a condition of its own" in record.message for record in caplog.records) == 1


def in_tiles(batched):
    """A wrapper that calls the model for the left and the right half of the latent, one by one or in one batch."""

    def wrapper(apply_model, args):
        x, t, c = args["input"], args["timestep"], args["c"]
        halves = x.chunk(2, -1)
        if not batched:
            return torch.cat([apply_model(half, t, **c) for half in halves], -1)

        def twice(value):
            return torch.cat((value, value)) if isinstance(value, torch.Tensor) else value

        c = {key: [twice(v) for v in value] if isinstance(value, list) else twice(value) for key, value in c.items()}
        return torch.cat(apply_model(torch.cat(halves), twice(t), **c).chunk(2), -1)

    return wrapper


@pytest.mark.parametrize("batched", [False, True])
def test_tiles_have_right_strengths_or_a_text_about_tiles(model, batched):
    logs = torch.cat([HALF_LOGS[:CONTEXT], HALF_LOGS[CONTEXT + IMAGE // 2 :]])
    conditions = condition(), condition(seed=4)
    oracle, clone = dense_oracle(model, logs), apply_stages(model, HALF)
    for some in (oracle, clone):
        some.set_model_unet_function_wrapper(in_tiles(batched))
    assert torch.allclose(host(clone, *conditions, cfg=2.0), host(oracle, *conditions, cfg=2.0), atol=2e-4)
    if batched:
        conditions = condition(subject_reference_strengths=[0.5, 1.0]), condition(seed=4)
        with pytest.raises(ValueError, match="4 pictures for 2 conditions of 1.*tiles.*tile batch size to 1"):
            host(clone, *conditions, cfg=2.0)


def test_a_compiled_model_is_unwrapped():
    model = tiny_flux(depth=1, depth_single_blocks=0)
    clone = apply_stages(model, HALF)
    expected = host(clone, condition(), condition(), steps=2)
    torch._dynamo.reset()
    clone.add_object_patch("diffusion_model", torch.compile(model.model.diffusion_model, backend="eager"))
    ours = host(clone, condition(), condition(), steps=2)
    assert type(clone.model.diffusion_model).__name__ == "OptimizedModule"  # stays until another model is patched
    assert torch.allclose(ours, expected, atol=1e-4) and reference_method(clone, "offset") == "offset"


def test_the_clock_steps_counts_a_whole_schedule_in_a_run_that_is_split(model, caplog):
    stages = Stages((Keyframe(0, 1, 0), Keyframe(0.75, 1, 1)), "steps")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 8)
    whole = guided(cfg(apply_stages(model, stages), condition(), None, condition(5, 9)), sigmas)
    caplog.set_level(logging.INFO)
    for given in (sigmas, None):
        clone, calls = seen_by(apply_stages(model, stages, given))
        guider = cfg(clone, condition(), None, condition(5, 9))
        out = guided(guider, sigmas[4:], image=guided(guider, sigmas[:5]))
        texts = [record.message for record in caplog.records if "clock steps" in record.message]
        caplog.clear()
        assert len(texts) == 2 and all("4 steps of this run" in text for text in texts)
        assert all(
            ("8 steps of the sigmas given" if given is not None else "connect that schedule") in t for t in texts
        )
        staged = sorted({round(t, 4) for t, _, references in calls if references}, reverse=True)
        assert len(staged) == (2 if given is not None else 1 + 1), staged
        assert torch.allclose(out, whole, atol=1e-4) == (given is not None)
    with pytest.raises(ValueError, match="its sigmas run from .* to .*, but the sampler runs 8 steps"):
        guided(cfg(apply_stages(model, stages, sigmas[4:]), condition(), None, condition(5, 9)), sigmas)


@pytest.mark.parametrize("sigmas", [torch.tensor([]), torch.tensor([1.0]), torch.tensor([1, torch.nan, 0])])
def test_sigmas_that_are_no_schedule_are_refused(model, sigmas):
    with pytest.raises(ValueError, match="its sigmas are .*, expected at least two finite noise levels"):
        apply_stages(model, HALF, sigmas)


def test_a_blend_over_many_steps_keeps_the_overrides_of_one(model, monkeypatch):
    runs, begin = [], StagedRun.__init__

    def noted(self, *args):
        begin(self, *args)
        runs.append(self)

    monkeypatch.setattr(StagedRun, "__init__", noted)
    blend = Stages((Keyframe(1, 0.9, 0.1, "linear"), Keyframe(0, 0.2, 0.9)))
    guided(cfg(apply_stages(model, blend), condition(), None, condition(5, 9)), steps=20)
    assert len(runs) == 1 and len(runs[0]._overrides) == 2  # one for each condition


def test_denoise_below_1_counts_its_own_steps_as_ever(model, caplog):
    caplog.set_level(logging.INFO)
    stages, picture = Stages((Keyframe(0, 1, 0), Keyframe(0.5, 1, 1)), "steps"), latent(8, 8, seed=8)
    clone, calls = seen_by(apply_stages(model, stages))
    host(clone, condition(), condition(), samples=picture, denoise=0.5)
    assert [bool(references) for _, _, references in calls] == [False] * 3 + [True] * 3
    assert any("as the whole" in record.message for record in caplog.records)


def test_the_attention_stays_that_of_the_model(model):
    """The override is made for each model call: a control net and others that run outside the model have none."""
    seen = []

    def outside(executor, *args, **kwargs):
        seen.append("optimized_attention_override" in args[-1]["transformer_options"])
        return executor(*args, **kwargs)

    clone = apply_stages(model, HALF)
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "outside", outside)
    out = host(clone, condition(), condition())
    assert seen and not any(seen)
    assert torch.allclose(out, host(dense_oracle(model, HALF_LOGS), condition(), condition()), atol=2e-4)
    assert rearrange(out, "b c h w -> (b c h w)").isfinite().all()
