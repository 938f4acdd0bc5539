"""The forms of a bias on attention's keys, against a softmax in double precision, and which form is chosen."""

import math

import pytest
import torch
from einops import rearrange, repeat
from subject_dla.loaders.host import exact_attention
from subject_dla.sampling import key_bias
from subject_dla.sampling.attention import KeyStrengthAttention, Regions
from subject_dla.sampling.key_bias import MOST_RUNS, QueryBias, attention_with_key_bias, runs_of

CONTEXT, IMAGE = slice(0, 3), slice(3, 19)
REFERENCES = [slice(19, 23), slice(23, 29)]
MOST = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def tensors(dtype, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 2, 29, 16, generator=generator).to(dtype) for _ in range(3)]


def biases(soft):
    """Of keys, and of queries where `soft`: two pictures that differ in both."""
    bias = torch.zeros(2, 29)
    bias[0, CONTEXT], bias[1, REFERENCES[0]], bias[1, REFERENCES[1]] = -0.7, -3e3, 0.4
    if not soft:
        return bias, None
    columns = torch.zeros(29, 2)
    for group, span in enumerate(REFERENCES):
        columns[span, group] = 1
    rows = torch.randn(2, 29, 2, generator=torch.Generator().manual_seed(1))
    return bias, QueryBias(rows, columns)


def textbook(q, k, v, bias, query_bias, scale=0.25):
    logits = q.double() @ k.double().transpose(-1, -2) * scale + bias[:, None, None]
    if query_bias is not None:
        logits += (query_bias.rows @ query_bias.columns.T)[:, None]
    return logits.softmax(-1) @ v.double()


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("form", ["parts", "mask", "channels", None])
def test_every_form_is_textbook_attention(form, soft, dtype):
    if form == "mask" and (soft or dtype != torch.float32):
        pytest.skip("not chosen there")
    q, k, v = tensors(dtype)
    bias, query_bias = biases(soft)
    theirs, runs = textbook(q, k, v, bias, query_bias), runs_of(bias, query_bias)
    assert runs == [CONTEXT, IMAGE, *REFERENCES]
    options = dict(query_bias=query_bias, runs=runs, form=form)
    out = attention_with_key_bias(exact_attention(), q, k, v, 2, bias, **options, skip_output_reshape=True)
    assert out.dtype == dtype and (out - theirs).abs().max() < MOST[dtype]
    joined = attention_with_key_bias(exact_attention(), q, k, v, 2, bias, **options)
    assert torch.equal(joined, rearrange(out, "b h n d -> b n (h d)"))


def test_a_scale_of_the_models_is_kept():
    q, k, v = tensors(torch.float32)
    bias, query_bias = biases(True)
    options = dict(query_bias=query_bias, runs=runs_of(bias, query_bias), form="parts", skip_output_reshape=True)
    out = attention_with_key_bias(exact_attention(), q, k, v, 2, bias, **options, scale=0.5)
    assert (out - textbook(q, k, v, bias, query_bias, 0.5)).abs().max() < 1e-6


def test_keys_with_a_bias_each_have_no_runs():
    assert runs_of(torch.zeros(1, 5)) == [slice(0, 5)]
    assert len(runs_of(torch.arange(float(MOST_RUNS))[None])) == MOST_RUNS
    assert runs_of(torch.arange(MOST_RUNS + 1.0)[None]) == []


def test_pytorchs_attention_on_a_processor_has_one_row_of_a_mask_and_other_kernels_channels(monkeypatch):
    """A mask of its own shape takes no memory: 29 numbers for each picture, whatever the number of queries."""
    q, k, v = tensors(torch.float32)
    bias, query_bias = biases(True)
    calls = []

    def kernel(q, k, v, heads, mask=None, **kwargs):
        calls.append((q.shape[-1], None if mask is None else (tuple(mask.shape), mask.untyped_storage().nbytes())))
        return exact_attention()(q, k, v, heads, mask=mask, **kwargs)

    attention_with_key_bias(kernel, q, k, v, 2, bias)
    assert calls == [(24, None)]
    calls.clear()
    monkeypatch.setattr(key_bias, "exact_attention", lambda: kernel)
    theirs = textbook(q, k, v, bias, None)
    out = attention_with_key_bias(kernel, q, k, v, 2, bias, skip_output_reshape=True)
    assert (out - theirs).abs().max() < 1e-6
    assert calls == [(16, ((2, 1, 29, 29), 2 * 29 * 4))]
    for soft, mask, dtype in (
        (query_bias, None, torch.float32),
        (None, torch.zeros(29, 29), torch.float32),
        (None, None, torch.float16),
    ):
        calls.clear()
        attention_with_key_bias(kernel, *(x.to(dtype) for x in (q, k, v)), 2, bias, soft, mask=mask)
        assert calls[0][0] == 24


@pytest.mark.parametrize("dtype", MOST)
def test_regions_and_strengths_by_parts(dtype, monkeypatch):
    """As on CUDA: the whole override, a hard and a soft region, against a softmax in double precision."""
    q, k, v = tensors(dtype, 4)
    logs, weights = torch.zeros(2, 29), torch.zeros(2, 2, 16)
    logs[0, REFERENCES[0]], logs[1, CONTEXT] = math.log(0.5), math.log(0.3)
    weights[:, 0, :8], weights[0, 1, 8:], weights[1, :, 10:13] = -math.inf, -math.inf, torch.tensor([-0.2, -1, -2])
    override = KeyStrengthAttention(logs, 2, torch.device("cpu"), regions=Regions(IMAGE, REFERENCES, weights))
    forms = []

    def parts(attention, q, k, v, query_bias, runs, kwargs):
        forms.append(len(runs))
        return "parts"

    monkeypatch.setattr(key_bias, "_form", parts)
    out = override(exact_attention(), q, k, v, 2, skip_reshape=True, skip_output_reshape=True)
    assert forms and min(forms) >= 2
    bias = repeat(logs, "c k -> c q k", q=29).clone()
    for index, span in enumerate(REFERENCES):
        bias[:, IMAGE, span] += weights[:, index, :, None]
    logits = q.double() @ k.double().transpose(-1, -2) / 4 + repeat(bias, "c q k -> (c b) 1 q k", b=2)
    assert (out - logits.softmax(-1) @ v.double()).abs().max() < MOST[dtype]
