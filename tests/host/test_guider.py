"""The staged guider on a tiny FLUX: what the DiT itself is given, call by call, and what strengths do to attention."""

import math
from unittest.mock import Mock

import comfy.ldm.flux.layers
import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import pytest
import torch
from einops import rearrange
from subject_dla.sampling.guider import StagedGuider, staged_guider
from subject_dla.sampling.patch import add_stages, apply_stages
from subject_dla.sampling.sample import staged_sample
from subject_dla.sampling.staged_run import StagedRun
from subject_dla.sampling.stages import Keyframe, Stages, preset
from subject_dla.tests.small.dit import tiny_flux

WIDTH = 24


@pytest.fixture(scope="module")
def model():
    return tiny_flux(WIDTH)


def latent(h, w, batch=1, seed=1):
    return torch.randn(batch, 16, h, w, generator=torch.Generator().manual_seed(seed))


def condition(tokens=7, seed=2, references=2, **values):
    context = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    values = {"pooled_output": None, "guidance": 3.5, **values}
    if references:
        values["reference_latents"] = [latent(8, 6, seed=5), latent(4, 8, seed=6)][:references]
    return [[context, values]]


def run(
    model, stages, positive, negative=None, cfg=1.0, sampler="euler", steps=6, batch=1, scheduler="simple", **latents
):
    denoise = latents.pop("denoise", 1.0)
    values = {"samples": torch.zeros(batch, 16, 8, 8), **latents}
    out = staged_sample(model, 3, steps, cfg, sampler, scheduler, positive, negative, values, denoise, stages)
    return out["samples"]


def host(model, positive, negative, cfg=1.0, sampler="euler", steps=6, batch=1, scheduler="simple", **latents):
    denoise, mask = latents.pop("denoise", 1.0), latents.pop("noise_mask", None)
    image = latents.get("samples", torch.zeros(batch, 16, 8, 8))
    noise = comfy.sample.prepare_noise(image, 3)
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, scheduler, positive, negative, image, denoise=denoise, noise_mask=mask,
        disable_pbar=True, seed=3,
    )  # fmt: skip


def seen_by(model):
    """(model clone, list of (flow time, context tokens, references) per DiT call), through the host's own wrapper."""
    calls = []

    def wrapper(executor, x, timestep, context, y, guidance, ref_latents=None, *args, **kwargs):
        calls.append((float(timestep[0]), context.shape[1], len(ref_latents or ())))
        return executor(x, timestep, context, y, guidance, ref_latents, *args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "seen", wrapper)
    return clone, calls


def test_every_sampler_switches_exactly_at_the_thresholds(model):
    failures = []
    for name in (name for name in comfy.samplers.SAMPLER_NAMES if "gpu" not in name):
        clone, calls = seen_by(model)
        stages = preset("paper", tau1=0.85, tau2=0.6)
        run(clone, stages, condition(), condition(5, 9, 0), cfg=2.0, sampler=name, steps=8)
        for t, context, references in calls:
            t = round(t, 4)
            if abs(t - 0.85) < 1e-3 or abs(t - 0.6) < 1e-3:
                continue
            if references not in (0, 2 if t < 0.85 else 0) or (context == 1) != (t < 0.6):
                failures.append((name, t, context, references))
        if not {(c > 1, bool(r)) for _, c, r in calls} >= {(True, False), (True, True), (False, True)}:
            failures.append((name, "a stage was skipped", sorted({(c, r) for _, c, r in calls})))
        if not name.startswith(("dpm_fast", "dpm_adaptive")):
            sigmas = comfy.samplers.KSampler(model, 8, torch.device("cpu"), name, "simple", 1.0).sigmas[:-1].tolist()
            missing = [s for s in sigmas if not any(abs(s - t) < 2e-3 for t, _, _ in calls)]
            if missing:
                failures.append((name, "steps without a call", missing))
    assert not failures, failures


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "euler_ancestral"])
def test_steps_clock_switches_at_its_step(model, sampler):
    clone, calls = seen_by(model)
    stages = Stages((Keyframe(0, 1, 0), Keyframe(0.5, 1, 1)), "steps")
    run(clone, stages, condition(), sampler=sampler, scheduler="beta")
    sigmas = comfy.samplers.KSampler(model, 6, torch.device("cpu"), sampler, "beta", 1.0).sigmas.tolist()
    for t, _, references in calls:
        assert references == (2 if t <= sigmas[3] * 1.0001 else 0), (t, sigmas)


def test_image_to_image_and_inpainting_equal_the_host(model):
    picture = latent(8, 8, batch=2, seed=8)
    mask = torch.zeros(1, 8, 8)
    mask[:, :, 4:] = 1
    for extra in ({"denoise": 0.5}, {"noise_mask": mask}, {"denoise": 0.6, "noise_mask": mask}):
        args = dict(cfg=2.0, samples=picture, **extra)
        ours = run(model, preset("both"), condition(), condition(5, 9), **args)
        theirs = host(model, condition(), condition(5, 9), **args)
        assert torch.equal(ours, theirs), extra
        staged = run(model, preset("paper"), condition(), condition(5, 9), **args)
        assert staged.isfinite().all() and not torch.equal(staged, theirs)


def dense_oracle(model, log_strength):
    """The host's CFG with textbook attention: softmax of every joint logit plus ln(strength), written out."""

    def attention(func, q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
        assert skip_reshape and mask is None
        logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + log_strength
        return rearrange(logits.softmax(-1) @ v, "b h n d -> b n (h d)")

    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = attention
    return clone


CONTEXT, IMAGE, FIRST, SECOND = 7, 16, 12, 8  # tokens: 8x8 latent -> 16, references 8x6 -> 12 and 4x8 -> 8


@pytest.mark.parametrize("mllm, vae", [(0.5, 1), (1, 0.25), (0.3, 0.6), (1.5, 1)])
def test_strength_between_is_ln_strength_on_the_groups_logits(model, mllm, vae):
    context, references = torch.full((CONTEXT,), math.log(mllm)), torch.full((FIRST + SECOND,), math.log(vae))
    expected = torch.cat([context, torch.zeros(IMAGE), references])
    theirs = host(dense_oracle(model, expected), condition(), condition(seed=4), cfg=2.0, batch=2)
    ours = run(model, Stages((Keyframe(1, mllm, vae),)), condition(), condition(seed=4), cfg=2.0, batch=2)
    assert torch.allclose(ours, theirs, atol=2e-4), (ours - theirs).abs().max()


def test_context_off_is_attention_over_the_other_keys_alone(model):
    removed = torch.zeros(1 + IMAGE + FIRST + SECOND)
    removed[0] = -math.inf
    theirs = host(dense_oracle(model, removed), condition(1), condition(1, 4), cfg=2.0)
    ours = run(model, preset("vae_only"), condition(), condition(3, 4), cfg=2.0)
    assert torch.allclose(ours, theirs, atol=2e-4)
    others = run(model, preset("vae_only"), condition(20, 99), condition(11, 98), cfg=2.0)
    assert torch.equal(ours, others)  # nothing of the removed tokens is left, bit for bit


def test_each_reference_has_its_own_strength_and_mask(model):
    mask = torch.ones(8 * 8, 6 * 8)
    mask[:, :16] = 0  # the left third of the first reference's picture: one of its three columns of tokens
    keys = torch.zeros(CONTEXT + IMAGE + FIRST + SECOND)
    first = torch.zeros(4, 3)
    first[:, 0] = -math.inf
    keys[CONTEXT + IMAGE :] = torch.cat([first.flatten(), torch.full((SECOND,), math.log(0.5))])
    masked = condition(subject_reference_strengths=[1.0, 0.5], subject_reference_masks=[mask, None])
    ours = run(model, preset("both"), masked)
    assert torch.allclose(ours, host(dense_oracle(model, keys), condition(), condition()), atol=2e-4)
    kept = condition(references=1)  # a reference of strength 0 is left out exactly
    ours = run(model, preset("both"), condition(subject_reference_strengths=[1.0, 0.0]))
    assert torch.equal(ours, host(model, kept, kept))


def test_another_override_on_the_model_still_runs(model):
    calls = []

    def counted(func, *args, **kwargs):
        calls.append(args[1].shape)
        return func(*args, **kwargs)

    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = counted
    ours, theirs = (run(which, preset("vae_only"), condition()) for which in (clone, model))
    assert torch.equal(ours, theirs) and calls


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "uni_pc"])
def test_a_patched_model_in_the_hosts_sampler_equals_the_staged_sampler(model, sampler):
    stages, conditions = preset("paper", tau1=0.8, tau2=0.5), (condition(), condition(5, 9))
    untouched = host(model, *conditions, cfg=2.0, sampler=sampler)
    clone = model.clone()
    add_stages(clone.model_options, preset("both"))
    assert torch.equal(host(clone, *conditions, cfg=2.0, sampler=sampler), untouched)
    add_stages(clone.model_options, stages)  # takes the place of the other
    ours = run(model, stages, *conditions, cfg=2.0, sampler=sampler)
    assert torch.equal(host(clone, *conditions, cfg=2.0, sampler=sampler), ours) and not torch.equal(ours, untouched)
    assert torch.equal(run(clone, preset("both"), *conditions, cfg=2.0, sampler=sampler), untouched)
    assert torch.equal(host(model, *conditions, cfg=2.0, sampler=sampler), untouched)  # no trace


def test_predict_noise_outside_a_run_is_refused(model):
    guider = StagedGuider(model, preset("both"))
    guider.set_conds(condition())
    with pytest.raises(RuntimeError, match="Call sample"):
        guider.predict_noise(latent(8, 8), torch.ones(1))
    guider.inner_model = model.model
    with pytest.raises(RuntimeError, match="Call sample"):
        guider(latent(8, 8), torch.ones(1))


def test_area_conditions_get_their_own_image_tokens(model):
    half = [[c, {**v, "area": (8, 4, 0, 0)}] for c, v in condition(5, 9)]
    out = run(model, Stages((Keyframe(1, 0.5, 0.5),)), condition() + half, condition(seed=4), cfg=2.0)
    assert out.isfinite().all()


def test_interrupt_reaches_the_caller(model):
    clone, interrupt = model.clone(), comfy.model_management.InterruptProcessingException
    wrapper = Mock(side_effect=interrupt())
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "stop", wrapper)
    with pytest.raises(interrupt):
        run(clone, preset("both"), condition())


@pytest.mark.parametrize("stages, positive, options, words", [
    (preset("both"), [[torch.zeros(1, 3, 99), {}]], {}, ["width 99", "width 24", "positive"]),
    (preset("vae_only"), condition(references=0), {}, ["no reference latent", "Add Identity", "mllm_only"]),
    (preset("both"), condition(), {"cfg": 2.5}, ["CFG is 2.5", "negative"]),
    (preset("both", "steps"), condition(), {"sampler": "dpm_adaptive"}, ["dpm_adaptive", "flow_time"]),
])  # fmt: skip
def test_conditions_that_cannot_work_are_refused(model, stages, positive, options, words):
    with pytest.raises(ValueError) as error:
        run(model, stages, positive, **options)
    assert all(word in str(error.value) for word in words), error.value


def test_a_schedule_of_references_without_any_is_logged(model, caplog):
    for name, logged in (("both", False), ("mllm_only", False), ("semantics_first", True)):
        caplog.clear()
        out = run(model, preset(name), condition(references=0))
        assert ("no condition has a reference latent" in caplog.text) == logged, name
        assert torch.equal(out, host(model, condition(references=0), condition(references=0)))


def test_unknown_layout_takes_0_and_1_only(model, monkeypatch):
    for module in ("conditions", "patch"):
        monkeypatch.setattr(f"subject_dla.sampling.{module}.backbone_of", lambda m: None)
    half = Stages((Keyframe(1, 0.5, 1),)), condition()
    for stages, positive in (half, (preset("both"), condition(subject_reference_strengths=[0.5, 1]))):
        with pytest.raises(ValueError, match="token layout"):
            run(model, stages, positive)
    assert torch.equal(run(model, preset("both"), condition()), host(model, condition(), condition()))


def test_model_without_the_hosts_attention_is_told_so(model, monkeypatch):
    def attention(q, k, v, pe, mask=None, transformer_options=None):
        return rearrange(torch.nn.functional.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")

    monkeypatch.setattr(comfy.ldm.flux.layers, "attention", attention)
    with pytest.raises(RuntimeError, match="optimized_attention_override"):
        run(model, Stages((Keyframe(1, 0.5, 1),)), condition())


def test_messages_of_a_run_begin_with_the_node_that_has_the_schedule(model, caplog, monkeypatch):
    """Also those that arise in the sampler: of a Staged Guider, a Staged Sampler, and a sampler behind Apply Stages."""
    positive, steps = condition(), preset("both", "steps")

    def sampled(guider, sampler="euler"):
        image, found = torch.zeros(1, 16, 8, 8), comfy.samplers.sampler_object(sampler)
        sigmas = torch.linspace(1.0, 0.0, 4)
        return guider.sample(torch.randn(1, 16, 8, 8), image, found, sigmas, disable_pbar=True, seed=1)

    def behind(stages):
        guider = comfy.samplers.CFGGuider(apply_stages(model, stages))
        guider.set_conds(positive, positive)
        return guider

    for title, run_it in {
        "Staged Guider": lambda: sampled(staged_guider(model, steps, positive, None, 1.0), "dpm_adaptive"),
        "Staged Sampler": lambda: run(model, steps, positive, sampler="dpm_adaptive"),
        "Apply Stages": lambda: sampled(behind(steps), "dpm_adaptive"),
    }.items():
        with pytest.raises(ValueError, match=f"^{title}: The stage schedule counts steps") as error:
            run_it()
        assert str(error.value).count("Apply Stages") == (title == "Apply Stages")

    blend = Stages((Keyframe(1.0, 1, 1), Keyframe(0.5, 1, 0)))
    caplog.clear()
    sampled(staged_guider(model, blend, condition(references=0), None, 1.0))
    assert "Staged Guider: no condition has a reference latent" in caplog.text and "Apply Stages" not in caplog.text
    guider = staged_guider(model, blend, positive, None, 1.0)

    def refuse(self, *args, **kwargs):
        raise RuntimeError("Apply Stages: the guider was called")

    monkeypatch.setattr(StagedRun, "apply_model", refuse)
    with pytest.raises(RuntimeError, match="^Staged Guider: the guider was called$"):
        sampled(guider)
