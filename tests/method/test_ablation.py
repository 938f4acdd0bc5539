"""Ablated features: zero exactly where asked, everything else bit for bit as it was."""

from itertools import product

import pytest
import torch
from subject_dla.dla import DLAConfig, DualLayerAggregator, ImageGrid, MLLMInfo, Modality, aggregate
from subject_dla.dla.ablation import ablate, groups, parse_layers, sweep, zeroed_layers
from subject_dla.tests.small.features import random_features

INFO = MLLMInfo("tiny", "internvl", layers=5, width=16)


def make_features(layers=tuple(range(6))):
    modality, mask = [[2, 0, 1, 1, 0, 2, 2], [2, 1, 0, 0, 2, 0, 2]], [[1] * 7, [1] * 5 + [0] * 2]
    grids = ((ImageGrid(1, 2),), (ImageGrid(1, 1),))
    return random_features(modality, INFO, layers, mask, torch.bfloat16, prefix=(1, 1), grids=grids)


def test_the_papers_groups_are_its_own_at_28_layers_and_cover_every_other_depth_once():
    parts = {"early": range(10), "middle": range(10, 20), "late": range(20, 29)}
    assert groups(28) == {name: tuple(layers) for name, layers in parts.items()}
    assert groups(3) == {"early": (0,), "middle": (1, 2), "late": (3,)}
    for top in range(1, 100):
        parts = groups(top)
        assert [layer for part in parts.values() for layer in part] == list(range(top + 1))
        assert len(parts) == 3 or top == 1
        if top >= 8:
            sizes = [len(part) / (top + 1) for part in parts.values()]
            assert max(abs(a - b) for a, b in zip(sizes, (10 / 29, 10 / 29, 9 / 29))) < 1 / (top + 1)


def test_layer_lists():
    assert parse_layers("0-9, 20-28", 28) == (*range(10), *range(20, 29))
    assert parse_layers(" 3 , 1 - 2,3", 28) == (1, 2, 3)
    assert parse_layers("early, LATE", 28) == (*range(10), *range(20, 29))
    assert parse_layers("middle", 36) == groups(36)["middle"] != groups(28)["middle"]
    assert parse_layers("all", 3) == (0, 1, 2, 3)


@pytest.mark.parametrize("text, part", [("0-29", "0-29"), ("9-3", "9-3"), ("1, x", "x"), ("-1", "-1"), ("1.5", "1.5")])
def test_a_wrong_layer_list_names_its_part_and_what_there_is(text, part):
    with pytest.raises(ValueError, match=f"'{part}'.*0 .*28.*early"):
        parse_layers(text, 28)
    with pytest.raises(ValueError, match="No layers"):
        parse_layers(" , ", 28)


def test_only_the_modality_and_layers_asked_for_become_zero():
    features = make_features()
    before = features.hidden_states.clone()
    found = ablate(features, text=(0, 1), image=(4, 5))
    assert torch.equal(features.hidden_states, before) and found is not features
    for row, token in product(range(2), range(7)):
        kind, real = int(features.modality[row, token]), bool(features.attention_mask[row, token])
        gone = {Modality.TEXT: (0, 1), Modality.IMAGE: (4, 5)}.get(kind, ()) if real else ()
        before[row, list(gone), token] = 0
    assert torch.equal(found.hidden_states, before)
    for name in ("layers", "info", "prefix", "grids"):
        assert getattr(found, name) == getattr(features, name)
    for name in ("modality", "image_index", "attention_mask"):
        assert getattr(found, name) is getattr(features, name)


def test_layer_numbers_are_numbers_and_not_positions():
    features = make_features(layers=(0, 3, 5))
    found = ablate(features, image=(1, 2, 3)).hidden_states[0, :, 2]
    assert found.abs().sum(1).gt(0).tolist() == [True, False, True]


def test_what_cannot_be_ablated_is_refused():
    with pytest.raises(ValueError, match="Layer 6.*0 to 5"):
        ablate(make_features(), text=(5, 6))
    with pytest.raises(ValueError, match="no image token.*Connect"):
        ablate(random_features([[2, 0, 0]], INFO), image=(1,))


def test_keep_and_zero_are_each_others_rest():
    with pytest.raises(ValueError, match="'cut'"):
        zeroed_layers("cut", (1,), 5)
    assert zeroed_layers("zero", (1, 2), 5) == (1, 2) and zeroed_layers("keep", (1, 2), 5) == (0, 3, 4, 5)
    assert zeroed_layers("keep", range(6), 5) == ()


def test_the_last_layer_is_all_that_a_new_dla_loses():
    features = make_features()
    dla = DualLayerAggregator(DLAConfig(INFO, context_width=16, heads=4))
    plain = aggregate(features, dla).tokens
    assert torch.equal(aggregate(ablate(features, text=range(5), image=range(5)), dla).tokens, plain)
    gone = aggregate(ablate(features, image=(5,)), dla)
    image = gone.modality == Modality.IMAGE
    assert bool((gone.tokens[image] == 0).all()) and torch.equal(gone.tokens[~image], plain[~image])


def test_a_sweep_is_every_group_zeroed_and_kept_per_modality():
    trials = list(sweep(28))
    parts = [f"layers {part} {mode}" for mode in ("zeroed", "kept alone") for part in ("0-9", "10-19", "20-28")]
    labels = [f"{modality}: {part}" for modality in ("text", "image") for part in parts]
    assert [trial.label for trial in trials] == ["untouched", *labels]
    for trial in trials[1:]:
        modality, part = trial.label.split(": layers ")
        touched, other = (trial.text, trial.image) if modality == "text" else (trial.image, trial.text)
        layers = parse_layers(part.split(" ")[0], 28)
        assert other == () and touched == zeroed_layers("zero" if "zeroed" in part else "keep", layers, 28)
    features = make_features()
    assert trials[0].apply(features) is features
    (_, first, second) = sweep(5, [(0, 1, 4), (3,)], ["image"], ["zero"])
    assert (first.label, second.label) == ("image: layers 0-1, 4 zeroed", "image: layer 3 zeroed")
    assert torch.equal(first.apply(features).hidden_states, ablate(features, image=(0, 1, 4)).hidden_states)
