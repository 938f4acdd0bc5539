"""The demo's world: splits do not share toys or pairs of views, and prompts describe their targets."""

import random

import pytest
from subject_dla.demo.family import world
from subject_dla.demo.family.layout import MODELS, ROOT


@pytest.fixture(scope="module")
def training():
    draw = random.Random("test")
    return [world.random_example(draw, "training") for _ in range(3000)]


def test_toys_and_turns_of_the_splits_are_disjoint(training):
    assert {toy.split for example in training for toy in example.target.toys} == {"training"}
    turns = {(e.references[0].view.bin, e.target.view.bin) for e in training}
    held_out = {split: set(enumerate(targets)) for split, targets in world.HELD_OUT_TURNS.items()}
    assert not turns & (held_out["test"] | held_out["validation"]) and not held_out["test"] & held_out["validation"]
    assert all(first != second for pairs in held_out.values() for first, second in pairs)
    assert len(turns) == 64 - 16
    draw = random.Random("cases")
    cases = [world.test_example(draw, "view") for _ in range(300)]
    assert {case.target.toys[0].split for case in cases} == {"test"}
    asked = {(c.references[0].view.bin, c.target.view.bin) for c in cases}
    assert asked & held_out["test"] and all((second - first) % 8 in range(2, 7) for first, second in asked)


def test_the_bias_of_the_data(training):
    same = [e.references[0].view.bin == e.target.view.bin for e in training]
    assert 0.79 < sum(same) / len(same) < 0.86  # SAME_VIEW, and the others that meet it by chance
    named = [example.named for example in training]
    assert 0.46 < named.count("") / len(named) < 0.54


def test_words_name_no_fine_trait(training):
    """Fine traits must come from the references' pictures alone."""
    texts = [text.replace(",", "") for example in training for text in (example.prompt, example.target.caption())]
    words = {word for text in texts for word in text.split()}
    assert words.isdisjoint((*world.DECALS, *world.PATTERNS)) and words >= {*world.KINDS, *world.COLOURS, *world.PARTS}


def test_a_prompt_describes_its_target(training):
    for example in training:
        view, toy = example.target.view, example.target.toys[0]
        if example.named == "view":
            assert f"seen from the {view.name}" in example.prompt
        if example.named == "turn":
            words = next(words for words in world.TURNS if words in example.prompt)
            turn = (view.bin - example.references[0].view.bin) * 45
            assert (turn - world.TURNS[words]) % 360 == 0
        if "in the colour of its" in example.prompt:
            part = example.prompt.split("in the colour of its ")[1].split(",")[0].split()[0]
            assert example.target.place == f"on a {getattr(toy, part)} carpet"
        else:
            assert example.target.place in example.prompt
        assert example.reasoning == (example.named == "turn" or "in the colour of its" in example.prompt)


def test_the_family_is_small_enough_to_ship():
    files = [*MODELS.rglob("*"), *(ROOT / "demo").glob("oracle.*")]
    assert sum(file.stat().st_size for file in files if file.is_file()) < 40 * 2**20
