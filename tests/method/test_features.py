"""Features refuse what would be misread later; which tokens go to the DiT; how they are compacted."""

import dataclasses
import re

import pytest
import torch
from subject_dla.dla import ImageGrid, MLLMInfo, Modality, aggregate, kept_tokens
from subject_dla.tests.small.features import random_features

INFO = MLLMInfo("tiny", "qwen2_5_vl", layers=4, width=8)
T, I, M = Modality.TEXT, Modality.IMAGE, Modality.TEMPLATE  # noqa: E741


def features(rows, mask=None, info=INFO, prefix=None):
    return random_features(rows, info, mask=mask, prefix=prefix)


GOOD = features([[M, T, I]])


@pytest.mark.parametrize("change, text", [
    ({"hidden_states": GOOD.hidden_states[0]}, "expected floating (B, M, T, C)"),
    ({"hidden_states": GOOD.hidden_states.long()}, "torch.int64"),
    ({"hidden_states": GOOD.hidden_states[..., :7]}, "width 7, expected 8"),
    ({"layers": (0, 1, 2, 3)}, "holds 5 layers, but layers names 4"),
    ({"layers": (0, 1, 3, 2, 4)}, "ascending numbers from 0 to 4"),
    ({"layers": (0, 1, 2, 3, 5)}, "ascending numbers from 0 to 4"),
    ({"modality": GOOD.modality.long()}, "modality is torch.int64"),
    ({"modality": GOOD.modality + 2}, "modality holds 4"),
    ({"image_index": -torch.ones_like(GOOD.image_index)}, "image_index must be 0 or more at image tokens"),
    ({"attention_mask": GOOD.attention_mask[:, :2]}, "attention_mask is torch.bool (1, 2)"),
    ({"attention_mask": ~GOOD.attention_mask}, "without a single token"),
    ({"prefix": (4,)}, "prefix is (4,)"),
    ({"grids": ((ImageGrid(1, 2),),)}, "grids are of [[2]] tokens by prompt and image, expected [[1]]"),
    ({"grids": ((),)}, "grids are of [[]]"),
    ({"grids": ()}, "grids are of []"),
])  # fmt: skip
def test_bad_features_are_refused_by_name(change, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        dataclasses.replace(GOOD, **change)


def test_a_grid_places_tokens_row_by_row_or_tile_by_tile():
    assert ImageGrid(2, 3).raster().tolist() == [[0, 1, 2], [3, 4, 5]] and ImageGrid(2, 3).tokens == 6
    tiled = ImageGrid(4, 6, tiles=[2, 3], thumbnail=True)  # six tiles of 2 x 2 tokens and one of the whole image
    assert tiled == ImageGrid(4, 6, (2, 3), True) and tiled.tokens == 28
    assert tiled.raster()[:2].tolist() == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]] and tiled.raster()[3, 5] == 23
    for wrong in (dict(rows=0, columns=2), dict(rows=4, columns=6, tiles=(3, 3)), dict(rows=4, columns=6, tiles=(2,))):
        with pytest.raises(ValueError, match="expected 1 or more rows"):
            ImageGrid(**wrong)
    with pytest.raises(ValueError, match="thumbnail"):
        ImageGrid(2, 2, thumbnail=True)


def kept(row, template, *, mask=None, drop=True, prefix=None):
    info = dataclasses.replace(INFO, drop_leading_template=drop)
    return kept_tokens(features([row], mask and [mask], info, prefix), template)[0].int().tolist()


def test_template_tokens_are_kept_or_dropped_as_asked():
    row = [M, M, T, T, M, I, I, M, T, M]
    assert kept(row, "keep") == [1] * 10
    assert kept(row, "drop") == [0, 0, 1, 1, 0, 1, 1, 0, 1, 0]
    assert kept(row, "auto") == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]  # as Qwen-Image
    assert kept(row, "auto", drop=False) == [1] * 10  # as OmniGen2
    assert kept(row, "auto", prefix=(3,)) == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="template is 'none'"):
        kept(row, "none")


def test_what_stays_at_the_edges():
    assert kept([M, M, M, I, I, M, T], "auto") == [0, 0, 1, 1, 1, 1, 1]  # the marker before a leading image
    # an empty prompt keeps what the stock model keeps, and never nothing
    assert kept([M, M, M, M], "auto", prefix=(2,)) == [0, 0, 1, 1]
    assert kept([M, M, M, M], "auto") == [0, 0, 0, 1]
    assert kept([M, M, M, M], "drop", mask=[1, 1, 1, 0]) == [0, 0, 1, 0]
    # left padding is dropped with the template
    assert kept([M, M, M, T, T], "auto", mask=[0, 1, 1, 1, 1]) == [0, 0, 0, 1, 1]
    assert kept([M, M, M, T, T], "keep", mask=[0, 1, 1, 1, 1]) == [0, 1, 1, 1, 1]


def test_context_is_the_kept_tokens_in_order_padded_on_the_right():
    given = features([[M, M, T, T, I, I], [M, T, T, I, I, M]], mask=[[1] * 6, [0, 0, 1, 1, 1, 1]])
    grids = ((ImageGrid(1, 2),), (ImageGrid(2, 1),))
    context = aggregate(dataclasses.replace(given, grids=grids))
    assert context.grids == grids and context.row(1).grids == grids[1:] and aggregate(given).grids is None
    last = given.hidden_states[:, -1]
    assert context.tokens.shape == (2, 4, 8)
    assert torch.equal(context.tokens[0], last[0, 2:]) and torch.equal(context.tokens[1], last[1, 2:])
    assert context.attention_mask.all()

    context = aggregate(given, template="drop")
    assert context.attention_mask.int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert torch.equal(context.tokens[1], torch.cat([last[1, 2:5], torch.zeros(1, 8)]))
    assert context.modality.tolist() == [[T, T, I, I], [T, I, I, M]]
    assert context.image_index.tolist() == [[-1, -1, 0, 0], [-1, 0, 0, -1]]


def test_vit_blend_mixes_the_embeddings_into_image_tokens_alone():
    given = features([[T, I, M]], info=dataclasses.replace(INFO, drop_leading_template=False))
    first, last = given.hidden_states[0, 0], given.hidden_states[0, -1]
    tokens = aggregate(given, vit_blend=0.25).tokens[0]
    torch.testing.assert_close(tokens[1], 0.75 * last[1] + 0.25 * first[1])
    assert torch.equal(tokens[0], last[0]) and torch.equal(tokens[2], last[2])
    top = dataclasses.replace(given, hidden_states=given.hidden_states[:, -1:], layers=(4,))
    with pytest.raises(ValueError, match="Layer 0 of tiny is not in these features, which hold layer 4"):
        aggregate(top, vit_blend=0.25)


def test_features_that_overflowed_are_named_before_the_dit_turns_them_into_black():
    given = features([[T, I]])
    given.hidden_states[0, -1, 1, 3] = float("inf")
    with pytest.raises(ValueError, match="not finite.*tiny.*bf16 or fp32"):
        aggregate(given)
