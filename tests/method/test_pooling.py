"""The pooling is the paper's in both readings, starts as the last layer, learns, and stays within its memory."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from einops import rearrange
from subject_dla.common import bootstrap
from subject_dla.dla import DLAConfig, DualLayerAggregator, MLLMInfo, Modality
from subject_dla.dla.aggregator import MAX_CHUNK_BYTES
from subject_dla.dla.pooling import HeadScoredPooling, chunk_length
from subject_dla.tests.small.features import random_features
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

INFO = MLLMInfo("tiny", "internvl", layers=5, width=32)
FORMS = {"softmax": {"scores": "states"}, "linear": {"pooling": "linear"}, "heads": {"pooling": "softmax"}}
SMALL_CHUNKS = 40_000  # bytes: two or three tokens at a time


def make_features(scale=1.0, dtype=torch.float32):
    modality = torch.randint(0, 3, (2, 9), generator=torch.Generator().manual_seed(1))
    modality[:, :3] = torch.tensor([0, 1, 2])
    return random_features(modality, INFO, scale=scale, dtype=dtype)  # one massive channel, as MLLMs have


def make_dla(trained=True, dtype=torch.float32, **config) -> DualLayerAggregator:
    """`trained`: no weight is at its start. pooling "heads": softmax as new DLAs have it, "softmax": as 0.1.0's."""
    torch.manual_seed(2)
    config = {"context_width": INFO.width, "heads": 4, **config}
    config |= FORMS[config.get("pooling", "softmax")]
    dla = DualLayerAggregator(DLAConfig(INFO, **config), dtype=dtype)
    if trained:
        move(dla, 0.3)
    return dla


@torch.no_grad()
def move(dla, spread):
    for parameter in dla.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=spread)


def run(dla, features, **settings):
    with torch.no_grad():
        return dla(features, **settings)


def reference_norm(x):
    return torch.stack([row / (row.pow(2).mean() + 1e-6).sqrt() for row in x])


def reference_attention(attention, x):
    theirs = nn.MultiheadAttention(x.shape[-1], attention.heads, batch_first=True)
    if hasattr(attention, "qkv"):
        theirs.in_proj_weight, theirs.in_proj_bias = attention.qkv.weight, attention.qkv.bias
    else:  # each head's queries, then its keys
        settings = dict(h=attention.heads, two=2)
        qk = [rearrange(p, "(h two d) ... -> (two h d) ...", **settings) for p in attention.qk.parameters()]
        qkv = [torch.cat(pair) for pair in zip(qk, attention.value.parameters())]
        theirs.in_proj_weight, theirs.in_proj_bias = map(nn.Parameter, qkv)
    theirs.out_proj.weight, theirs.out_proj.bias = attention.out.weight, attention.out.bias
    mixed, heads = theirs(x[None], x[None], x[None], need_weights=True, average_attn_weights=False)
    return mixed[0], heads[0]


def reference_token(pooling, x):
    """As plainly as possible: one token (M, C) -> (C,), torch's own attention."""
    for block in pooling.blocks:
        x = x + reference_attention(block.attention, reference_norm(x))[0]
        if block.up is not None:
            hidden = reference_norm(x) @ block.up.weight.T + block.up.bias
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
            x = x + hidden @ block.down.weight.T + block.down.bias
    if isinstance(pooling, HeadScoredPooling):
        normed = reference_norm(x)
        mixed, heads = reference_attention(pooling, normed)  # (M, C), (H, M, M)
        own, *read = (normed @ vector for vector in pooling.score.weight)
        scores = own + sum(head @ numbers for head, numbers in zip(heads, read))
        weights, last, gate = scores.softmax(0), torch.eye(len(x))[-1], pooling.gate.weight[0, 0]
        return (gate * weights + (1 - gate) * last) @ (x + mixed)
    if pooling.layers is not None:  # (b): a linear map over the layers
        return sum(weight * state for weight, state in zip(pooling.layers.weight[0], x))
    scores = torch.stack([reference_norm(state[None])[0] @ pooling.score.weight[0] for state in x])
    pooled = sum(weight * state for weight, state in zip(scores.exp() / scores.exp().sum(), x))
    gate = pooling.gate.weight[0, 0]
    return (1 - gate) * x[-1] + gate * pooled


@pytest.mark.parametrize("modalities", ["dual", "shared"])
@pytest.mark.parametrize("pooling", ["softmax", "linear", "heads"])
@pytest.mark.parametrize("subset", [None, (0, 3, 4)])
def test_pooling_is_the_plain_formula_token_by_token(pooling, modalities, subset):
    features = make_features()
    dla = make_dla(pooling=pooling, modalities=modalities, layer_subset=subset)
    found = run(dla, features)
    for b in range(2):
        for t in range(9):
            image = features.modality[b, t] == Modality.IMAGE
            name = "shared" if modalities == "shared" else "image" if image else "text"
            with torch.no_grad():
                states = features.hidden_states[b, :, t][list(subset or range(6))]
                expected = reference_token(dla.pooling[name], states)
            torch.testing.assert_close(found[b, t], expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("blocks", [1, 3])
def test_scores_from_heads_are_the_plain_form_whose_score_is_linear_in_the_attentions_output(blocks):
    """With the products of value map, output map and Linear(C -> 1) as vectors: attention first, then the score."""
    pooling = make_dla(pooling="heads", blocks=blocks).pooling["text"]
    score, states = torch.randn(32), make_features().hidden_states[0, :, :1].transpose(0, 1)
    with torch.no_grad():
        vectors = score @ pooling.out.weight
        of_heads = [part @ rows for part, rows in zip(vectors.split(8), pooling.value.weight.split(8))]
        pooling.score.weight.copy_(torch.stack([score, *of_heads]))
        pooling.gate.weight.fill_(1)
        x = states[0]
        for block in pooling.blocks:
            x = x + reference_attention(block.attention, reference_norm(x))[0]
        mixed = reference_attention(pooling, reference_norm(x))[0]
        weights = ((reference_norm(x) + mixed) @ score).softmax(0)
        torch.testing.assert_close(pooling(states)[0], weights @ (x + mixed), rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(pooling.layer_weights(states, torch.float32)[0], weights, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("pooling", "share"), [("heads", 0.55), ("linear", 0.86)])
def test_maps_behind_the_last_softmax_or_activation_run_once_a_token(pooling, share):
    """Share of the operations that every layer's maps would take, at InternVL3's 29 layers."""
    info = MLLMInfo("wide", "internvl", layers=28, width=1024)
    dla = DualLayerAggregator(DLAConfig(info, 1024, heads=8, **FORMS[pooling])).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        dla(random_features([[0] * 8], info))
    maps = {"heads": 4, "linear": 24}[pooling] * 1024 * 1024  # multiplications for a token and layer
    assert counter.get_total_flops() / (2 * 8 * 29 * maps) < share


@pytest.mark.parametrize("heads", [1, 16, 32])
def test_heads_in_parts_are_the_plain_formula(heads):
    """One head; more heads than layers, whose sums of states come in parts."""
    dla, features = make_dla(pooling="heads", heads=heads, modalities="shared"), make_features()
    found = run(dla, features)
    with torch.no_grad():
        expected = reference_token(dla.pooling["shared"], features.hidden_states[1, :, 4])
    torch.testing.assert_close(found[1, 4], expected, rtol=2e-4, atol=2e-4)


def test_an_odd_number_of_heads_is_the_plain_formula():
    info = MLLMInfo("odd", "internvl", layers=2, width=30)
    dla = DualLayerAggregator(DLAConfig(info, 30, heads=5, modalities="shared"))
    move(dla, 0.3)
    features = random_features([[0, 1, 0]], info)
    with torch.no_grad():
        expected = [reference_token(dla.pooling["shared"], states) for states in features.hidden_states[0].unbind(1)]
        torch.testing.assert_close(dla(features)[0], torch.stack(expected), rtol=2e-4, atol=2e-4)


def test_half_of_the_heads_at_a_time_takes_the_states_of_internvl3_8b_in_14_chunks():
    """1,500 text and 2,048 image tokens; 24 where queries and keys of all heads are made at once."""
    step = chunk_length(29, 3584, 28, torch.bfloat16, MAX_CHUNK_BYTES, head_scored=True)
    assert -(-1500 // step) - (-2048 // step) == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooling", ["softmax", "heads"])
def test_the_result_is_rounded_once(dtype, pooling):
    features, dla = make_features(dtype=dtype), make_dla(pooling=pooling, dtype=dtype)
    found = run(dla, features)
    image = features.modality == Modality.IMAGE
    for name, group in (("text", ~image), ("image", image)):
        states = features.hidden_states.transpose(1, 2)[group].transpose(0, 1).contiguous().transpose(0, 1)
        with torch.no_grad():
            pooled = dla.pooling[name](states, dtype)
        assert pooled.dtype == torch.float32 and torch.equal(found[group], pooled.to(dtype))


def test_gate_one_is_the_papers_softmax_alone():
    dla = make_dla()
    for pooling in dla.pooling.values():
        nn.init.ones_(pooling.gate.weight)
    weights = dla.layer_weights(make_features())
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9))
    assert (weights > 0).all()


def test_linear_weights_may_be_negative_and_are_the_same_for_every_token():
    dla = make_dla(pooling="linear")
    dla.pooling["text"].layers.weight.data = torch.tensor([[-1.0, 0, 2, 0, 0, 0.5]])
    weights = dla.layer_weights(make_features())
    assert weights[0, 0].tolist() == weights[0, 2].tolist() == [-1.0, 0, 2, 0, 0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooling", ["softmax", "linear", "heads"])
@pytest.mark.parametrize("modalities", ["dual", "shared", "last"])
@pytest.mark.parametrize("width", [32, 48, 20])
def test_a_new_dla_is_exactly_the_last_layer(dtype, pooling, modalities, width):
    features = make_features(dtype=dtype, scale=100)
    dla = make_dla(False, dtype, pooling=pooling, modalities=modalities, context_width=width, refiner_blocks=2)
    expected = torch.zeros(2, 9, width, dtype=dtype)
    expected[..., : min(width, 32)] = features.hidden_states[:, -1, :, :width]
    found = run(dla, features)
    assert found.dtype == dtype and torch.equal(found, expected)


@pytest.mark.parametrize("pooling", ["softmax", "linear", "heads"])
def test_a_new_dla_learns_from_the_first_step(pooling):
    features, dla = make_features(), make_dla(False, pooling=pooling, context_width=48, refiner_blocks=1)
    optimizer = torch.optim.SGD(dla.parameters(), lr=0.1)
    target = torch.randn(2, 9, 48)
    outputs, live = [], set()
    for _ in range(3):
        outputs.append(dla(features))
        optimizer.zero_grad()
        (outputs[-1] - target).square().mean().backward()
        step = {name for name, p in dla.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        for modality in ("text", "image"):
            assert any(name.startswith(f"pooling.{modality}.") for name in step)
        live |= step
        optimizer.step()
    assert not torch.equal(outputs[0], outputs[1])
    # within three steps (attention waits for the gate), no weight may stay dead
    assert live == {name for name, _ in dla.named_parameters()}


@pytest.mark.parametrize("pooling", ["softmax", "linear", "heads"])
def test_chunks_and_neighbours_do_not_change_a_token(pooling):
    features, dla = make_features(), make_dla(pooling=pooling, context_width=48)
    whole = run(dla, features)
    # matrix kernels round differently for other shapes and thread counts (1.5e-5 seen); a leak is as large as `whole`
    chunked = run(dla, features, max_chunk_bytes=1)
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(dla, features, max_chunk_bytes=SMALL_CHUNKS), whole, rtol=1e-4, atol=1e-4)
    weights = dla.layer_weights(features, max_chunk_bytes=1)
    torch.testing.assert_close(weights, dla.layer_weights(features), rtol=1e-5, atol=1e-6)

    other = features.hidden_states.clone()
    other[:, :, 4:] = 7.0
    changed = run(dla, dataclasses.replace(features, hidden_states=other), max_chunk_bytes=1)
    assert torch.equal(changed[:, :4], chunked[:, :4])
    assert not torch.equal(changed[:, 4:], whole[:, 4:])


def test_gradients_do_not_depend_on_chunks():
    features = make_features()
    grads = []
    for size in (SMALL_CHUNKS, 2**28):
        dla = make_dla(pooling="linear")
        dla(features, max_chunk_bytes=size).square().sum().backward()
        grads.append([p.grad for p in dla.parameters()])
    for small, large in zip(*grads):
        torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-2)


def test_each_modality_has_its_own_pooling():
    features, dla = make_features(), make_dla()
    before = run(dla, features)
    with torch.no_grad():
        dla.pooling["image"].score.weight.add_(1)
    changed = (run(dla, features) != before).any(-1)
    assert torch.equal(changed, features.modality == Modality.IMAGE)


def test_refiner_looks_both_ways_and_only_at_kept_tokens():
    features, dla = make_features(), make_dla(refiner_blocks=2)
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[:, 4] = False
    before = run(dla, features, keep=keep)
    assert (before[:, 4] == 0).all()

    def after(token):
        other = features.hidden_states.clone()
        other[:, :, token] += 1
        return run(dla, dataclasses.replace(features, hidden_states=other), keep=keep)

    assert torch.equal(after(4), before)
    assert (after(8) != before).any(-1)[:, :4].all()
    assert (after(0) != before).any(-1)[:, 5:].all()


def test_features_that_do_not_belong_are_refused():
    features, dla = make_features(), make_dla(layer_subset=(0, 3, 4))
    text = r"belongs to tiny \(internvl, 5 layers, width 32\).*come from other \(qwen2_5_vl.*Load tiny.*train"
    with pytest.raises(ValueError, match=text):
        run(dla, dataclasses.replace(features, info=dataclasses.replace(INFO, name="other", family="qwen2_5_vl")))
    few = dataclasses.replace(features, hidden_states=features.hidden_states[:, [0, 4]], layers=(0, 4))
    with pytest.raises(ValueError, match="Layer 3 of tiny is not in these features, which hold layers 0, 4"):
        run(dla, few)
    assert dla.config.required_layers == (0, 3, 4)
    assert DLAConfig(INFO, 32, modalities="last", heads=4, vit_blend=0.5).required_layers == (0, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooling", ["softmax", "linear", "heads"])
def test_massive_activations_neither_overflow_nor_drown_the_rest(dtype, pooling):
    features = make_features(scale=1e4)
    # rounded here as well, so that only the arithmetic differs
    features = dataclasses.replace(features, hidden_states=features.hidden_states.clamp(-6e4, 6e4).to(dtype))
    dla = make_dla(False, pooling=pooling, context_width=48, refiner_blocks=1)
    move(dla, 0.1)
    exact = run(dla, dataclasses.replace(features, hidden_states=features.hidden_states.float()))
    low = run(dla.to(dtype), features).float()
    assert low.isfinite().all() and (low - exact).norm() / exact.norm() < 0.02


@pytest.mark.skipif(sys.platform == "win32", reason="measured with getrusage, which Windows lacks")
@pytest.mark.parametrize("pooling", ["softmax", "linear", "heads"])
def test_peak_memory_is_one_chunk_and_a_fraction_of_the_input(pooling):
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, bootstrap.__file__, "tests.small.peak_memory", pooling]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.5  # unchunked it is 4 (softmax) to 6 (linear)
