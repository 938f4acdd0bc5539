"""Regions: image tokens outside one do not read its reference, against textbook attention with the dense mask."""

from math import inf, log

import comfy.patcher_extension
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from subject_dla.sampling.attention import KeyStrengthAttention, Regions
from subject_dla.sampling.patch import add_stages
from subject_dla.sampling.stages import Keyframe, Stages, preset
from subject_dla.tests.host.test_parity import Subject, skip_what_the_host_lacks
from subject_dla.tests.small.dit import FAMILIES, tiny, tiny_flux

STRENGTHS, MASKS, REGIONS = (f"subject_reference_{name}" for name in ("strengths", "masks", "regions"))
SIDE = 8  # of the canvas, in latent elements
PIXELS = 4 * SIDE  # of regions
LEFT = torch.zeros(PIXELS, PIXELS)
LEFT[:, : PIXELS // 2] = 1
TOP = torch.zeros(PIXELS, PIXELS)
TOP[: PIXELS // 4] = 1
SOFT = torch.linspace(0, 1, PIXELS).repeat(PIXELS, 1)  # exact zeros and ones at neither edge's token alone
SOFT[:, : PIXELS // 4] = 0
SOFT[:, -PIXELS // 4 :] = 1


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request):
    skip_what_the_host_lacks(request.param)
    return Subject(request.param, tiny(request.param), SIDE)


def with_settings(conditioning, **settings):
    return [[tokens, {**values, **settings}] for tokens, values in conditioning]


def token_weights(subject, region, area=(SIDE, SIDE, 0, 0)):
    """(image tokens,) mean of the region in each token's square, by reshaping; area: as a condition's."""
    side = subject.backbone.patch_size * (PIXELS // SIDE)
    weight = rearrange(region, "(y b) (x a) -> y x b a", b=side, a=side).mean((-1, -2))
    height, width, top, left = (part // subject.backbone.patch_size for part in area)
    return weight[top : top + height, left : left + width].flatten()


def dense(subject, context, regions, strengths=(1, 1, 1), masks=(None, None), area=(SIDE, SIDE, 0, 0)):
    """(queries, keys) bias of one condition; strengths: of the context and each reference."""
    parts = subject.layout(context, *area[:2])
    columns = torch.cat([torch.full((count,), log(strengths[0])) if name == "context" else
                         torch.zeros(count) for name, count in parts])  # fmt: skip
    ends = torch.tensor([0] + [count for _, count in parts]).cumsum(0).tolist()
    spans = {name: slice(*span) for (name, _), span in zip(parts, zip(ends, ends[1:]))}
    rows = []
    for index, mask in enumerate(masks):
        weight = torch.ones(dict(parts)[index])
        if mask is not None:
            size = [length // subject.backbone.patch_size for length in subject.references[index]]
            weight = F.interpolate(mask[None, None], size=size, mode="area").flatten()
        columns[spans[index]] = (weight * strengths[1 + index]).log()
        columns[spans.get(f"padding {index}", slice(0, 0))] = log(strengths[1 + index])
    rows = repeat(columns, "k -> q k", q=ends[-1]).clone()
    for index, region in enumerate(regions):
        if region is not None:
            logs = token_weights(subject, region, area).log()[:, None]
            for span in (spans[index], spans.get(f"padding {index}", slice(0, 0))):
                rows[spans["image"], span] += logs
    return rows


def textbook(model, biases):
    """A clone whose joint attention is a softmax written out; biases: {(index of the condition, keys): its bias}."""

    def attention(func, q, k, v, heads, mask=None, skip_reshape=False, transformer_options=None, **kwargs):
        keys = k.shape[2] if skip_reshape else k.shape[1]
        found = [biases.get((index, keys)) for index in transformer_options["cond_or_uncond"]]
        if found[0] is None:  # a refiner's
            return func(q, k, v, heads, mask=mask, skip_reshape=skip_reshape, transformer_options=transformer_options,
                        **kwargs)  # fmt: skip
        assert mask is None or mask.dtype == torch.bool
        if not skip_reshape:
            width = q.shape[-1] // heads
            q, k, v = (rearrange(x, "b n (h d) -> b h n d", d=width) for x in (q, k, v))
        bias = repeat(torch.stack(found), "c q k -> (c b) 1 q k", b=len(q) // len(found))
        k, v = (repeat(x, "b h n d -> b (h g) n d", g=heads // x.shape[1]) for x in (k, v))
        # with the host's cache of keys, there are no queries behind the image's
        logits = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5 + bias[:, :, : q.shape[2]]
        logits = logits if mask is None else logits.masked_fill(~mask, -inf)
        return rearrange(logits.softmax(-1) @ v.double(), "b h n d -> b n (h d)").to(q.dtype)

    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = attention
    return clone


def context_of(subject, tokens):
    return 512 if subject.backbone.name == "flux2" else tokens  # the host fills it up


def by_keys(subject, index, bias):
    """A condition's bias for each of its attention calls, by (its index, keys)."""
    if subject.backbone.references_in_context:  # which follow it here: a call for each piece
        ends = [context_of(subject, 9), *(subject.tokens(*size) for size in subject.references)]
        ends = [0, *torch.tensor(ends).cumsum(0).tolist(), len(bias)]
        return {(index, end): bias[start:end, :end] for start, end in zip(ends, ends[1:])}
    calls = {(index, len(bias)): bias}
    if subject.backbone.contextless_blocks:
        start = sum(
            subject.layout(context_of(subject, 9))[i][1] for i in range(2 if subject.backbone.name == "z_image" else 1)
        )
        calls[index, len(bias) - start] = bias[start:, start:]
    return calls


def of_host(subject, biases, *arguments, **options):
    """The host's run, with textbook attention."""
    calls = {key: found for index, bias in biases for key, found in by_keys(subject, index, bias).items()}
    found, subject.model = subject.model, textbook(subject.model, calls)
    try:
        return subject.host(*arguments, **options)
    finally:
        subject.model = found


NOISE = (torch.rand(4, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1).clamp(min=0)
NOISE = repeat(NOISE, "n y x -> n (y b) (x a)", b=PIXELS // SIDE, a=PIXELS // SIDE)  # many patterns
CASES = {
    "halves": dict(regions=[LEFT, 1 - LEFT]),
    "overlap, one everywhere": dict(regions=[TOP, None]),
    "soft": dict(regions=[SOFT, 1 - LEFT]),
    "soft, both": dict(regions=[SOFT, 1 - SOFT], negative=[None, SOFT.T]),
    "strengths and masks": dict(regions=[LEFT, SOFT], strengths=(0.6, 0.5, 1.5), masks=(SOFT.T.contiguous(), None)),
    "negative without": dict(regions=[LEFT, 1 - LEFT], negative=[None, None]),
    "negative elsewhere": dict(regions=[LEFT, 1 - LEFT], negative=[TOP, LEFT]),
    "noise": dict(regions=[NOISE[0], NOISE[1]], negative=[NOISE[2], NOISE[3]], strengths=(1, 0.5, 1.5)),
}


@pytest.mark.shows("strengths", "regions")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_regions_equal_textbook_attention_with_the_dense_mask(subject, case, batch):
    case = CASES[case]
    regions, strengths, masks = case["regions"], case.get("strengths", (1, 1, 1)), case.get("masks", (None, None))
    settings = {STRENGTHS: list(strengths[1:]), MASKS: list(masks)}
    negative = case.get("negative", regions)
    bare = subject.condition(9, 2), subject.condition(9, 3)
    pair = [with_settings(c, **settings, **{REGIONS: r}) for c, r in zip(bare, (regions, negative))]
    ours = subject.staged(Stages((Keyframe(1, strengths[0], 1),)), *pair, batch=batch)
    context = context_of(subject, 9)
    biases = [dense(subject, context, r, strengths, masks) for r in (regions, negative)]
    theirs = of_host(subject, enumerate(biases), *bare, batch=batch)
    scale = theirs.abs().max()
    assert (ours - theirs).abs().max() < 1e-5 * scale, (ours - theirs).abs().max() / scale
    without = subject.staged(preset("both"), *bare, batch=batch)
    assert (ours - without).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_region_of_the_whole_canvas_is_no_region_bit_for_bit(subject, strength):
    stages, pair = Stages((Keyframe(1, 1, strength),)), (subject.condition(9, 2), subject.condition(9, 3))
    whole = [with_settings(c, **{REGIONS: [torch.ones(30, 50), torch.ones(7, 5)]}) for c in pair]
    assert torch.equal(subject.staged(stages, *whole, batch=2), subject.staged(stages, *pair, batch=2))


def test_a_condition_with_an_area_has_its_part_of_the_region(subject):
    """Beside the others, two areas of a size in one call, and the negative's copies for them that the host makes."""
    areas = [(8, 4, 0, 4), (8, 4, 0, 0)]
    bare = [subject.condition(9, 2), subject.condition(9, 3)]
    regions = [[SOFT.T.contiguous(), LEFT], [TOP, None], [TOP, SOFT]]
    positive = with_settings(bare[0], **{REGIONS: regions[0]})
    for area, seen in zip(areas, regions[1:]):
        positive += with_settings(bare[0], area=area, **{REGIONS: seen})
    negative = with_settings(bare[1], **{REGIONS: [1 - LEFT, SOFT]})
    ours = subject.staged(preset("both"), positive, negative, batch=2)
    explicit = negative + [[tokens, {**values, "area": area}] for area in areas for tokens, values in negative]
    assert torch.allclose(ours, subject.staged(preset("both"), positive, explicit, batch=2), atol=1e-5)

    for area, seen in zip(areas, regions[1:]):  # alone, against the dense mask
        one = with_settings(bare[0], area=area)
        ours = subject.staged(preset("both"), with_settings(one, **{REGIONS: seen}), None, cfg=1.0)
        biases = [(0, dense(subject, context_of(subject, 9), seen, area=area))]
        theirs = of_host(subject, biases, one, one, cfg=1.0)
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_copies_for_areas_keep_the_strengths_of_their_own_condition(subject):
    """The host adds to the negative a copy of the positive's area, with the negative's references."""
    area = {"area": (8, 4, 0, 4)}
    positive = subject.condition(9, 2) + with_settings(subject.condition(9, 5), **area, **{STRENGTHS: [0.3, 2.0]})
    negative = with_settings(subject.condition(9, 3), **{STRENGTHS: [1.0, 0.5]})
    explicit = negative + with_settings(negative, **area)
    ours, theirs = (subject.staged(preset("both"), positive, c) for c in (negative, explicit))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_regions_follow_the_stages_and_go_with_references_that_are_off():
    subject = Subject("flux", tiny_flux(24), SIDE)
    positive = with_settings(subject.condition(9, 2), **{REGIONS: [LEFT, 1 - LEFT]})
    bare = subject.condition(9, 2, references=False)
    out = subject.staged(preset("mllm_only"), positive, bare)
    assert torch.equal(out, subject.host(bare, bare))
    one_off = with_settings(positive, **{STRENGTHS: [0.0, 1.0]})
    second = [[t, {**v, "reference_latents": v["reference_latents"][1:]}] for t, v in subject.condition(9, 2)]
    second = with_settings(second, **{REGIONS: [1 - LEFT]})
    ours, theirs = (subject.staged(preset("both"), positive, None, cfg=1.0) for positive in (one_off, second))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_queries_are_split_by_what_they_read_and_zeros_and_ones_need_no_bias(dtype, most):
    """Kernel calls of one joint attention: shapes, and the output against a softmax in double precision."""
    context, image, references = 3, 16, [slice(19, 23), slice(23, 29)]
    weights = torch.zeros(2, 2, image)  # two conditions
    weights[:, 0, :8], weights[:, 1, 8:] = -inf, -inf
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, 2, 29, 16, generator=generator).to(dtype) for _ in range(3))
    calls = []

    def kernel(q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
        calls.append((q.shape[2], k.shape[2], q.shape[3]))
        return rearrange(F.scaled_dot_product_attention(q, k, v, mask), "b h n d -> b n (h d)")

    def check(weights, logs, expected):
        calls.clear()
        regions = Regions(slice(context, context + image), references, weights)
        override = KeyStrengthAttention(logs, 2, torch.device("cpu"), regions=regions)
        out = override(kernel, q, k, v, 2, skip_reshape=True)
        assert sorted(calls) == expected and override.applied == 1
        bias = repeat(logs, "c k -> c q k", q=29).clone()
        for index, span in enumerate(references):
            bias[:, context : context + image, span] += weights[:, index, :, None]
        bias = repeat(bias, "c q k -> (c b) 1 q k", b=2)
        logits = q.double() @ k.double().transpose(-1, -2) / 4 + bias
        theirs = rearrange(logits.softmax(-1) @ v.double(), "b h n d -> b n (h d)")
        assert (out - theirs).abs().max() < most
        apart = override(kernel, *(rearrange(x, "b h n d -> b n (h d)") for x in (q, k, v)), 2)
        assert torch.equal(out, apart)
        assert override(kernel, q[:, :, :5], k, v, 2, skip_reshape=True).shape[1] == 5 and override.applied == 2

    none = torch.zeros(2, 29)
    check(weights, none, [(8, 23, 16), (8, 25, 16), (13, 29, 16)])
    removed = none.clone()
    removed[:, :3] = -inf  # the context's keys
    check(weights, removed, [(8, 20, 16), (8, 22, 16), (13, 26, 16)])
    soft = weights.clone()
    soft[:, 0, 10:12] = -0.7
    check(soft, none, [(2, 23, 24), (6, 23, 16), (8, 25, 16), (13, 29, 16)])
    soft[1, :, :4] = 0  # the other condition's first row reads both
    check(soft, none, [(2, 23, 24), (4, 25, 16), (4, 29, 24), (6, 23, 16), (13, 29, 16)])
    strengths = none.clone()
    strengths[0, 19:23], strengths[1, 23:] = -0.5, 0.4
    check(soft, strengths, [(2, 23, 24), (4, 25, 24), (4, 29, 24), (6, 23, 24), (13, 29, 24)])


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.float16, 2e-3)])
def test_many_patterns_are_one_kernel_call(dtype, most):
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 3, 32, generator=generator).round().log()  # zeros and ones at random: 64 patterns possible
    references = [slice(32, 36), slice(36, 40), slice(40, 43)]
    q, k, v = (torch.randn(2, 2, 43, 128, generator=generator).to(dtype) for _ in range(3))
    calls = []

    def kernel(q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
        calls.append(q.shape[2])
        return rearrange(F.scaled_dot_product_attention(q, k, v, mask), "b h n d -> b n (h d)")

    regions = Regions(slice(0, 32), references, weights)
    out = KeyStrengthAttention(torch.zeros(2, 43), 1, torch.device("cpu"), regions=regions)(
        kernel, q, k, v, 2, skip_reshape=True
    )
    assert len(calls) == 2 and sum(calls) == 43
    bias = torch.zeros(2, 1, 43, 43)
    for index, span in enumerate(references):
        bias[:, 0, :32, span] += weights[:, index, :, None]
    theirs = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), bias.double())
    assert (out - rearrange(theirs, "b h n d -> b n (h d)")).abs().max() < most


def test_keys_that_one_condition_lacks_are_removed_in_half_precision():
    q, k, v = torch.randn(3, 2, 1, 5, 128, generator=torch.Generator().manual_seed(0)).half()
    logs = torch.zeros(2, 5)
    logs[1, 3:] = -inf

    def kernel(q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
        return rearrange(F.scaled_dot_product_attention(q, k, v, mask), "b h n d -> b n (h d)")

    out = KeyStrengthAttention(logs, 1, torch.device("cpu"))(kernel, q, k, v, 1, skip_reshape=True)
    theirs = F.scaled_dot_product_attention(*(x.float() for x in (q, k, v)), attn_mask=logs[:, None, None])
    assert (out.float() - theirs[:, 0]).abs().max() < 5e-3


def test_an_attention_mask_is_split_alike():
    weights = torch.zeros(1, 1, 4)
    weights[:, :, :2] = -inf
    q, k, v = torch.randn(3, 1, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    override = KeyStrengthAttention(
        torch.zeros(1, 8), 1, torch.device("cpu"), regions=Regions(slice(2, 6), [slice(6, 8)], weights)
    )

    def kernel(q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
        return F.scaled_dot_product_attention(q, k, v, mask)

    bias = torch.zeros(8, 8)
    bias[2:4, 6:] = -inf
    for mask in (torch.randn(1, 1, 8, 8), torch.randn(8, 8), torch.randn(1, 1, 1, 8), torch.randn(1, 1, 8, 1)):
        out = override(kernel, q, k, v, 2, mask=mask, skip_reshape=True, skip_output_reshape=True)
        assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v, mask + bias), atol=1e-6)


def test_tiles_and_unknown_layouts_are_refused(monkeypatch):
    subject = Subject("flux", tiny_flux(24), SIDE)
    positive = with_settings(subject.condition(9, 2), **{REGIONS: [LEFT, None]})

    def tiled(executor, x, timestep, *arguments, **options):
        return torch.cat([executor(half, timestep, *arguments, **options) for half in x.chunk(2, -1)], -1)

    model, subject.model = subject.model, subject.model.clone()
    subject.model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "tiles", tiled)
    with pytest.raises(ValueError, match="latent of 4 x 8 where the condition covers 8 x 8.*tile"):
        subject.staged(preset("both"), positive, None, cfg=1.0)
    subject.staged(preset("both"), subject.condition(9, 2), None, cfg=1.0)
    subject.model = model
    for module in ("conditions", "patch"):
        monkeypatch.setattr(f"subject_dla.sampling.{module}.backbone_of", lambda m: None)
    with pytest.raises(ValueError, match="regions.*token layout"):
        subject.staged(preset("both"), positive, None, cfg=1.0)


def test_a_patched_model_in_the_hosts_sampler_reads_regions_and_an_unpatched_one_ignores_them():
    subject = Subject("flux", tiny_flux(24), SIDE)
    bare = subject.condition(9, 2), subject.condition(9, 3)
    pair = [with_settings(c, **{REGIONS: [LEFT, 1 - LEFT]}) for c in bare]
    expected = subject.staged(preset("both"), *pair)
    assert torch.equal(subject.host(*pair), subject.host(*bare))
    subject.model = subject.model.clone()
    add_stages(subject.model.model_options, preset("both"))
    assert torch.equal(subject.host(*pair), expected) and not torch.equal(expected, subject.host(*bare))
