"""Strengths beside what a host may run attention with: kernels that round to 8 bits, sparse ones, compiled models."""

import importlib
from functools import partial

import comfy.ldm.flux.math
import comfy.ldm.modules.attention as host_attention
import comfy.model_patcher
import comfy.patcher_extension
import pytest
import torch
from einops import rearrange
from subject_dla.loaders.host import exact_attention
from subject_dla.sampling import attention
from subject_dla.sampling.attention import KeyStrengthAttention
from subject_dla.sampling.patch import apply_stages
from subject_dla.sampling.stages import Keyframe, Stages, preset
from subject_dla.tests.host.test_guider import condition, host
from subject_dla.tests.small.dit import tiny_flux

HALF = Stages((Keyframe(1, 0.5, 0.25),))
ONLY_PART = torch.cat([torch.zeros(32, 48), torch.ones(32, 48)])  # of a reference, beside a condition that has all


@pytest.fixture(scope="module")
def model():
    return tiny_flux()


def rounded(x, tokens):
    """(b, h, n, d) in 8 bits, one scale for so many tokens."""
    blocks = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % tokens)).unflatten(2, (-1, tokens))
    scale = blocks.abs().amax((-2, -1), keepdim=True).clamp(min=1e-9) / 127
    return ((blocks / scale).round() * scale).flatten(2, 3)[:, :, : x.shape[2]]


def attention_int8(q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
    """As Comfy Kitchen's: queries rounded in blocks of 32 tokens, keys of 64, any head width."""
    if not skip_reshape:
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    return exact_attention()(rounded(q, 32), rounded(k, 64), v, heads, mask=mask, skip_reshape=True, **kwargs)


def chosen_by_flag(model, monkeypatch):
    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", host_attention.wrap_attn(attention_int8))
    return model.clone()


def chosen_by_node(model, monkeypatch):
    clone = model.clone()
    if not hasattr(clone, "set_model_optimized_attention"):
        pytest.skip("not on this host")
    clone.set_model_optimized_attention(attention_int8)
    return clone


def attention_override_sage(func, *args, **kwargs):
    return attention_int8(*args, **kwargs)


def chosen_by_another_pack(model, monkeypatch):
    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = attention_override_sage
    return clone


@pytest.mark.parametrize("choose", [chosen_by_flag, chosen_by_node, chosen_by_another_pack])
def test_a_kernel_that_rounds_does_not_get_strengths(model, choose, monkeypatch, caplog):
    conditions = condition(subject_reference_masks=[ONLY_PART, None]), condition(seed=4)
    expected = host(apply_stages(model, HALF), *conditions, cfg=2.0)
    assert not caplog.records
    patched = apply_stages(choose(model, monkeypatch), HALF)
    assert torch.allclose(host(patched, *conditions, cfg=2.0), expected, atol=1e-3)
    assert [record.message.count("computed by PyTorch instead of") for record in caplog.records] == [1]
    monkeypatch.setattr(attention, "INEXACT", ())
    assert (host(patched, *conditions, cfg=2.0) - expected).abs().max() > 0.1  # what it would make of them


@pytest.mark.parametrize("choose", [chosen_by_flag, chosen_by_another_pack])
def test_a_kernel_that_rounds_is_kept_where_no_strength_is_between(model, choose, monkeypatch, caplog):
    conditions = condition(), condition(seed=4)
    exact = host(apply_stages(model, preset("vae_only")), *conditions)
    patched = apply_stages(choose(model, monkeypatch), preset("vae_only"))
    ours = host(patched, *conditions)
    assert 0 < (ours - exact).abs().max() < 0.1 and not caplog.records


def reproduced_sparse_attention(model, kernel):
    """As Model Sparse Attention of 0.37: an override on top of others, put there again at every step.

    It calls the others for a mask, few tokens, another head width, and where queries are not as many as keys.
    """
    installed = []

    def install(patcher, timestep=None, model_options=None):
        options = (model_options or patcher.model_options)["transformer_options"]
        previous = options.get("optimized_attention_override")
        if previous not in installed:
            installed.append(partial(override, previous))
            options["optimized_attention_override"] = installed[-1]

    def override(previous, func, q, k, v, heads, mask=None, **kwargs):
        q3, k3 = (x if kwargs.get("skip_reshape") else x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k))
        if mask is not None or q3.shape != k3.shape or q3.shape[-1] != 16:
            return (func if previous is None else partial(previous, func))(q, k, v, heads, mask=mask, **kwargs)
        return rearrange(kernel(q3), "b h n d -> b n (h d)")

    clone = model.clone()
    install(clone)
    clone.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_PREPARE_STATE, "sparse", install)
    return clone


def hosts_sparse_attention(model, kernel, monkeypatch):
    """The node itself, with its tests for CUDA left out."""
    node = pytest.importorskip("comfy_extras.nodes_sparse_attention", reason="not on this host")
    monkeypatch.setattr(node, "_ineligible", lambda q, k, v, d: None if q.shape == k.shape and d == 16 else "shapes")
    monkeypatch.setattr(node.ck, "sol_attn", lambda q, *args, **kwargs: kernel(q), raising=False)
    return node.apply_block_sparse_attention(
        model, tau=1.3, topk_ratio=0.0, vsa=False, start_percent=0.0, end_percent=1.0, min_tokens=0, dense_blocks=set(),
        sink_conditioning="off", extra_tokens=0, verbose=False,
    )  # fmt: skip


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("real", [False, True])
def test_sparse_attention_is_dense_where_tokens_are_weighted_or_left_out(model, real, first, monkeypatch):
    """`first`: the stages are put on before it."""
    calls, conditions = [], (condition(), condition(5, 9))

    def kernel(q):
        calls.append(q.shape)
        return torch.zeros_like(q)

    def patched(stages):
        sparse = partial(hosts_sparse_attention, monkeypatch=monkeypatch) if real else reproduced_sparse_attention
        return sparse(apply_stages(model, stages), kernel) if first else apply_stages(sparse(model, kernel), stages)

    for stages in (HALF, preset("vae_only")):
        ours, expected = (host(some, *conditions, cfg=2.0) for some in (patched(stages), apply_stages(model, stages)))
        assert torch.allclose(ours, expected, atol=1e-4) and not calls
    assert not torch.allclose(host(patched(preset("both")), *conditions, cfg=2.0), expected, atol=1e-2) and calls
    whole = len(calls)
    calls.clear()
    host(patched(Stages((Keyframe(1, 0.5, 0.25), Keyframe(0.5, 1, 1)))), *conditions, cfg=2.0)
    assert 0 < len(calls) < whole  # sparse again with all at 1


def test_keywords_that_are_not_ours_reach_the_kernel():
    q, k, v = torch.randn(3, 1, 2, 5, 16)
    logs = torch.tensor([[-0.7, 0, 0, 0, 0]])
    theirs = dict(preferred_attention=object(), low_precision_attention=False, _inside_attn_wrapper=True, new=object())

    def kernel(*args, **kwargs):
        assert {name: kwargs.pop(name) for name in theirs} == theirs
        return exact_attention()(*args, **kwargs)

    for strengths in (logs, logs * float("inf"), torch.zeros(1, 5)):
        override = KeyStrengthAttention(strengths.nan_to_num(0, neginf=-torch.inf), 1, torch.device("cpu"))
        assert override(kernel, q, k, v, 2, skip_reshape=True, **theirs).shape == (1, 5, 32)
    with pytest.raises(AssertionError):
        override(partial(kernel, new=1), q, k, v, 2, skip_reshape=True, **{**theirs, "new": 2})


def test_tensors_in_the_hosts_containers_arrive_as_tensors():
    container = getattr(host_attention, "AttentionTensorContainer", None)
    if container is None:
        pytest.skip("not on this host")
    q, k, v = torch.randn(3, 1, 5, 32)
    override = KeyStrengthAttention(torch.tensor([[-0.7, 0, 0, 0, 0]]), 1, torch.device("cpu"))
    options = {"optimized_attention_override": override}
    contained = [container(x) for x in (q, k, v)]
    out = host_attention.optimized_attention(*contained, 2, transformer_options=options)
    assert torch.equal(out, host_attention.optimized_attention(q, k, v, 2, transformer_options=options))
    assert override.applied == 2


def test_a_model_compiled_without_guards_on_its_options_has_the_strengths_of_each_stage(monkeypatch):
    """TorchCompileModel from 0.33 on: code compiled for one override would be run for another."""
    node = importlib.import_module("comfy_extras.nodes_torch_compile")
    if not hasattr(node, "skip_torch_compile_dict"):
        pytest.skip("not on this host")
    set_wrapper = node.set_torch_compile_wrapper
    monkeypatch.setattr(node, "set_torch_compile_wrapper", lambda **k: set_wrapper(**{**k, "backend": "eager"}))
    # the CPU's asks for free memory, at which torch would compile the rest apart
    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", host_attention.attention_pytorch)
    model, conditions = tiny_flux(depth=1, depth_single_blocks=0), (condition(), condition())
    stages = Stages((Keyframe(1, 1, 1), Keyframe(0.7, 0.5, 0.25), Keyframe(0.4, 1, 0.9)))
    expected = host(apply_stages(model, stages), *conditions)
    torch._dynamo.reset()
    compiled = node.TorchCompileModel.execute(apply_stages(model, stages), "inductor").result[0]
    assert torch.allclose(host(compiled, *conditions), expected, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # at strengths 1
