"""The demo's world: wooden toys on wheels, each with coarse traits (kind, colours) and fine ones (a decal, the body's
pattern), seen from a known azimuth and polar, somewhere; and the prompts that ask for them. Words name coarse traits
alone, as captions do: the fine ones are in the pictures.

Azimuth and polar as Orient Anything's (docs/systems.md): at azimuth 0 the toy faces the camera, at 90 it faces image-left;
polar is the camera's elevation, in degrees. Everything here is our choice: the paper's data are not public.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import asdict, dataclass

KINDS = ("car", "truck", "train", "boat", "duck")
COLOURS = {
    "red": (205, 38, 38), "orange": (242, 140, 30), "yellow": (245, 220, 60), "green": (45, 150, 60),
    "blue": (45, 85, 205), "purple": (130, 60, 170), "pink": (245, 150, 195), "white": (240, 240, 240),
}  # fmt: skip
DECALS = ("star", "disc", "cross", "ring", "triangle", "heart")
PATTERNS = ("plain", "striped", "checked")
PARTS = ("body", "top", "wheels")
VIEWS = ("front", "front left", "left", "back left", "back", "back right", "right", "front right")  # azimuth / 45
LEVELS = {"at eye level": 5.0, "from slightly above": 22.0, "from high above": 42.0}
PLACES = ("on grass", "on sand", "in the snow", "on a road", "at night")
TURNS = {"from the other side": 180, "turned a quarter to the left": 90, "turned a quarter to the right": -90}
AZIMUTH_JITTER, POLAR_JITTER = 8.0, 3.0  # uniform, each way: a view's word names no exact angle
SAME_VIEW = 0.8  # share of training pairs whose target repeats the reference's view: the bias of real pairs
SAID = {"view": 0.35, "turn": 0.15, "": 0.5}  # shares of training prompts by what they say of the view
TWO_TOYS, TWO_VIEWS = 0.06, 0.08  # shares of examples with two references
SPLITS = ("training", "validation", "test")


@dataclass(frozen=True)
class Toy:
    kind: str
    body: str
    top: str
    wheels: str
    decal: str
    decal_colour: str
    pattern: str

    @property
    def split(self) -> str:
        """By a hash of all traits: a toy is never in two splits."""
        number = int(hashlib.sha256(repr(asdict(self)).encode()).hexdigest()[:8], 16) / 16**8
        return "test" if number < 0.1 else "validation" if number < 0.15 else "training"

    def caption(self) -> str:
        return f"a {self.kind} with a {self.body} body, a {self.top} top and {self.wheels} wheels"


@dataclass(frozen=True)
class View:
    azimuth: float
    polar: float

    @property
    def name(self) -> str:
        return VIEWS[round(self.azimuth / 45) % 8]

    @property
    def level(self) -> str:
        return min(LEVELS, key=lambda level: abs(LEVELS[level] - self.polar))

    def caption(self) -> str:
        return f"seen from the {self.name} {self.level}"


@dataclass(frozen=True)
class Picture:
    """What a picture shows; `seed` is of the place's details. Two toys stand side by side in the same view."""

    toys: tuple[Toy, ...]
    view: View
    place: str
    seed: int

    def caption(self) -> str:
        toys = " next to ".join(toy.caption() for toy in self.toys)
        return f"{toys}, {self.place}, {self.view.caption()}"


@dataclass(frozen=True)
class Example:
    """`named`: what the prompt says of the target's view: "view" (its name), "turn" (relative to the reference) or "".
    `reasoning`: the prompt cannot be drawn without looking at the reference."""

    prompt: str
    references: tuple[Picture, ...]
    target: Picture
    named: str
    reasoning: bool


def random_toy(draw: random.Random, split: str) -> Toy:
    while True:
        body, top, wheels = (draw.choice(tuple(COLOURS)) for _ in PARTS)
        decal_colour = draw.choice([colour for colour in COLOURS if colour != body])
        toy = Toy(draw.choice(KINDS), body, top, wheels, draw.choice(DECALS), decal_colour, draw.choice(PATTERNS))
        if toy.split == split:
            return toy


def random_view(draw: random.Random, bin: int | None = None, level: str | None = None) -> View:
    bin = draw.randrange(8) if bin is None else bin
    level = level or draw.choice(tuple(LEVELS))
    azimuth = (45 * bin + draw.uniform(-AZIMUTH_JITTER, AZIMUTH_JITTER)) % 360
    return View(round(azimuth, 2), round(LEVELS[level] + draw.uniform(-POLAR_JITTER, POLAR_JITTER), 2))


def bin_of(view: View) -> int:
    return VIEWS.index(view.name)


def held_out_turns() -> dict[str, dict[int, int]]:
    """Of each split that is held out: from the reference's view bin to the target's. Training never pairs these two."""
    return {"test": dict(enumerate((3, 6, 0, 7, 1, 2, 4, 5))), "validation": dict(enumerate((5, 4, 7, 1, 6, 0, 3, 2)))}


def turn_split(reference: int, target: int) -> str:
    return next((split for split, turns in held_out_turns().items() if turns[reference] == target), "training")


def random_picture(draw: random.Random, toys: tuple[Toy, ...], view: View, place: str | None = None) -> Picture:
    if place is None:
        place = draw.choice(PLACES) if draw.random() < 0.5 else f"on a {draw.choice(tuple(COLOURS))} carpet"
    return Picture(toys, view, place, draw.getrandbits(32))


def test_example(draw: random.Random, which: str) -> Example:
    """One of the evaluation's cases, on a toy of the test split. which: "view" = names a view at least 90 degrees from the
    reference's (half of them a pair of views that training never had), "free" = names none, "reasoning" = relative views
    and colours of parts."""
    toy = random_toy(draw, "test")
    reference = random_picture(draw, (toy,), random_view(draw))
    start = bin_of(reference.view)
    far = [bin for bin in range(8) if 2 <= (bin - start) % 8 <= 6]
    if which == "view":
        new = [bin for bin in far if turn_split(start, bin) == "test"]
        bin = draw.choice(new if new and draw.random() < 0.5 else [bin for bin in far if bin not in new])
        return ask(draw, [reference], (toy,), random_view(draw, bin), "view", "")
    if which == "free":
        return ask(draw, [reference], (toy,), reference.view, "", "")
    bin = (start + draw.choice((2, 4, 6))) % 8
    part = draw.choice(PARTS) if draw.random() < 0.5 else ""
    return ask(
        draw, [reference], (toy,), random_view(draw, bin), draw.choice(("view", "turn")) if part else "turn", part
    )


def random_example(draw: random.Random, split: str) -> Example:
    """A reference or two, a prompt and the target it asks for, as the training data have them: biased to the reference's
    view, which half of the prompts say nothing of."""
    kind = draw.random()
    count = 2 if kind < TWO_TOYS else 1
    toys = tuple(random_toy(draw, split) for _ in range(count))
    first = random_picture(draw, toys[:1], random_view(draw))
    references = [first]
    if count == 2:
        references.append(random_picture(draw, toys[1:], random_view(draw)))
    elif kind < TWO_TOYS + TWO_VIEWS:
        references.append(random_picture(draw, toys, random_view(draw)))
    start = bin_of(first.view)
    if draw.random() < SAME_VIEW:
        bin, level = start, first.view.level
    else:
        bin, level = draw.choice([bin for bin in range(8) if turn_split(start, bin) == split]), None
    view = random_view(draw, bin, level)
    return ask(draw, references, toys, view, named=draw.choices(tuple(SAID), tuple(SAID.values()))[0])


def ask(
    draw: random.Random,
    references: list[Picture],
    toys: tuple[Toy, ...],
    view: View,
    named: str,
    part: str | None = None,
) -> Example:
    """The example whose prompt asks for `toys` in `view`. part: ask for a carpet in the colour of that part of the
    reference's toy ("" = never, None = at times)."""
    turn = (bin_of(view) - bin_of(references[0].view)) * 45 % 360
    turns = {amount % 360: words for words, amount in TURNS.items()}
    if named == "turn" and (turn not in turns or len(references) > 1):
        named = "view"
    noun = "the two toys side by side" if len(toys) > 1 else draw.choice((f"the {toys[0].kind}", "the toy"))
    if part is None:
        part = draw.choice(PARTS) if len(references) == 1 and draw.random() < 0.15 else ""
    if part:
        colour = getattr(toys[0], part)
        target = random_picture(draw, toys, view, f"on a {colour} carpet")
        place = f"on a carpet in the colour of its {part}"
    else:
        target = random_picture(draw, toys, view)
        place = target.place
    level = f" {view.level}" if named and draw.random() < 0.7 else ""
    words = {"view": f", seen from the {view.name}{level}", "turn": f", {turns.get(turn)}{level}", "": ""}[named]
    reasoning = bool(part) or named == "turn"
    return Example(f"{noun} {place}{words}", tuple(references), target, named, reasoning)
