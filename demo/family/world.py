"""The demo's world: wooden toys on wheels, each in a known view and some place, and the prompts that ask for them.

A toy has coarse traits (kind, colours) and fine ones (decal, pattern of the body). Prompts and captions name coarse
traits alone; the fine ones are in the pictures only. Azimuth and polar angle are Orient Anything's: at azimuth 0 a toy
faces the camera, at 90 it faces image-left; polar is the camera's elevation, in degrees. All of it is our choice: the
paper's data are not public.
"""

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
AZIMUTH_JITTER, POLAR_JITTER = 8.0, 3.0  # degrees, uniform, each way: a view's name is no exact angle
SAME_VIEW = 0.8  # share of training pairs whose target has the reference's view: the bias of real pairs
NAMED_SHARES = {"view": 0.35, "turn": 0.15, "": 0.5}  # of training prompts, by Example.named
TWO_TOYS, TWO_VIEWS = 0.06, 0.08  # shares of examples with two references
# Held-out pairs of views: by split, the bin of the target's view for each bin of the reference's.
HELD_OUT_TURNS = {"test": (3, 6, 0, 7, 1, 2, 4, 5), "validation": (5, 4, 7, 1, 6, 0, 3, 2)}


@dataclass(frozen=True)
class Toy:
    """A toy by its traits, values of KINDS, COLOURS, DECALS and PATTERNS."""

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
        """The coarse traits in words."""
        return f"a {self.kind} with a {self.body} body, a {self.top} top and {self.wheels} wheels"


@dataclass(frozen=True)
class View:
    """Azimuth and polar angle in degrees."""

    azimuth: float
    polar: float

    @property
    def bin(self) -> int:
        """The index of the nearest view in VIEWS."""
        return round(self.azimuth / 45) % 8

    @property
    def name(self) -> str:
        """The nearest view in VIEWS."""
        return VIEWS[self.bin]

    @property
    def level(self) -> str:
        """The nearest height in LEVELS."""
        return min(LEVELS, key=lambda level: abs(LEVELS[level] - self.polar))

    def caption(self) -> str:
        """The view in words."""
        return f"seen from the {self.name} {self.level}"


@dataclass(frozen=True)
class Picture:
    """What a picture shows; `seed` is of the background's details. Two toys are side by side in the same view."""

    toys: tuple[Toy, ...]
    view: View
    place: str
    seed: int

    def caption(self) -> str:
        """The picture in words, fine traits left out."""
        toys = " next to ".join(toy.caption() for toy in self.toys)
        return f"{toys}, {self.place}, {self.view.caption()}"


@dataclass(frozen=True)
class Example:
    """References, a prompt and the target that it asks for.

    Args:
        prompt: The prompt.
        references: One or two pictures.
        target: What the prompt asks for.
        named: How the prompt names the target's view: "view" (by its name), "turn" (relative to the reference) or "".
        reasoning: Whether the target follows from prompt and reference together only.
    """

    prompt: str
    references: tuple[Picture, ...]
    target: Picture
    named: str
    reasoning: bool


def random_toy(draw: random.Random, split: str) -> Toy:
    """A toy of this split."""
    while True:
        body, top, wheels = (draw.choice(tuple(COLOURS)) for _ in PARTS)
        decal_colour = draw.choice([colour for colour in COLOURS if colour != body])
        toy = Toy(draw.choice(KINDS), body, top, wheels, draw.choice(DECALS), decal_colour, draw.choice(PATTERNS))
        if toy.split == split:
            return toy


def random_view(draw: random.Random, bin: int | None = None, level: str | None = None) -> View:
    """A view, jittered, in this bin of VIEWS and at this height of LEVELS (None: a random one)."""
    bin = draw.randrange(8) if bin is None else bin
    level = level or draw.choice(tuple(LEVELS))
    azimuth = (45 * bin + draw.uniform(-AZIMUTH_JITTER, AZIMUTH_JITTER)) % 360
    return View(round(azimuth, 2), round(LEVELS[level] + draw.uniform(-POLAR_JITTER, POLAR_JITTER), 2))


def random_picture(draw: random.Random, toys: tuple[Toy, ...], view: View, place: str | None = None) -> Picture:
    """These toys in this view, in this place (None: a random one)."""
    if place is None:
        place = draw.choice(PLACES) if draw.random() < 0.5 else f"on a {draw.choice(tuple(COLOURS))} carpet"
    return Picture(toys, view, place, draw.getrandbits(32))


def random_example(draw: random.Random, split: str) -> Example:
    """An example of the training data: one reference or two, and mostly the reference's view again."""
    share = draw.random()
    count = 2 if share < TWO_TOYS else 1
    toys = tuple(random_toy(draw, split) for _ in range(count))
    first = random_picture(draw, toys[:1], random_view(draw))
    references = [first]
    if count == 2:
        references.append(random_picture(draw, toys[1:], random_view(draw)))
    elif share < TWO_TOYS + TWO_VIEWS:
        references.append(random_picture(draw, toys, random_view(draw)))
    start = first.view.bin
    if draw.random() < SAME_VIEW:
        bin, level = start, first.view.level
    else:
        bin, level = draw.choice([bin for bin in range(8) if _turn_split(start, bin) == split]), None
    view = random_view(draw, bin, level)
    named = draw.choices(tuple(NAMED_SHARES), tuple(NAMED_SHARES.values()))[0]
    return make_example(draw, references, toys, view, named)


def test_example(draw: random.Random, test_set: str) -> Example:
    """A case of the evidence, on a toy of the test split.

    Args:
        draw: The random numbers.
        test_set: "view" names a view at least 90 degrees from the reference's (half of the cases: a pair of views that
            training never had), "free" names none, "reasoning" asks for relative views and colours of parts.
    """
    toy = random_toy(draw, "test")
    reference = random_picture(draw, (toy,), random_view(draw))
    start = reference.view.bin
    if test_set == "view":
        far = [bin for bin in range(8) if 2 <= (bin - start) % 8 <= 6]
        new = [bin for bin in far if _turn_split(start, bin) == "test"]
        bin = draw.choice(new if new and draw.random() < 0.5 else [bin for bin in far if bin not in new])
        return make_example(draw, [reference], (toy,), random_view(draw, bin), "view", "")
    if test_set == "free":
        return make_example(draw, [reference], (toy,), reference.view, "", "")
    bin = (start + draw.choice((2, 4, 6))) % 8
    part = draw.choice(PARTS) if draw.random() < 0.5 else ""
    view = random_view(draw, bin)
    named = draw.choice(("view", "turn")) if part else "turn"
    return make_example(draw, [reference], (toy,), view, named, part)


def _turn_split(reference: int, target: int) -> str:
    return next((split for split, turns in HELD_OUT_TURNS.items() if turns[reference] == target), "training")


def make_example(
    draw: random.Random,
    references: list[Picture],
    toys: tuple[Toy, ...],
    view: View,
    named: str,
    part: str | None = None,
) -> Example:
    """The example whose prompt asks for `toys` in `view`.

    Args:
        draw: The random numbers.
        references: Pictures of the toys.
        toys: The target's toys.
        view: The target's view.
        named: As in Example; "turn" becomes "view" where no phrase of TURNS fits.
        part: Ask for a carpet in the colour of this part of the toy ("" = never, None = in 15 % of the cases).
    """
    turn = (view.bin - references[0].view.bin) * 45 % 360
    turns = {amount % 360: phrase for phrase, amount in TURNS.items()}
    if named == "turn" and (turn not in turns or len(references) > 1):
        named = "view"
    noun = "the two toys side by side" if len(toys) > 1 else draw.choice((f"the {toys[0].kind}", "the toy"))
    if part is None:
        part = draw.choice(PARTS) if len(references) == 1 and draw.random() < 0.15 else ""
    target = random_picture(draw, toys, view, f"on a {getattr(toys[0], part)} carpet" if part else None)
    place = f"on a carpet in the colour of its {part}" if part else target.place
    level = f" {view.level}" if named and draw.random() < 0.7 else ""
    phrase = {"view": f", seen from the {view.name}{level}", "turn": f", {turns.get(turn)}{level}", "": ""}[named]
    reasoning = bool(part) or named == "turn"
    return Example(f"{noun} {place}{phrase}", tuple(references), target, named, reasoning)
