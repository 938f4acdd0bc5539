"""What the evidence's page says, section by section."""

import json
from pathlib import Path

import torch

from ..family.oracle import COARSE, FINE
from .page import Page
from .results import ResultStore
from .rows import AGAIN, BOTH, GRID, HEADLINE, LAYERS, MLLM, PAPER, ROWS, SCHEDULES, SEEDS
from .score import chance_agreement

UNNAMED = ("azimuth", "polar", "recall", "coarse", "fine")  # columns where the prompt names no view


def write_page(file: Path, store: ResultStore, data: Path, seconds: float) -> dict:
    """Writes the page and its pictures.

    Args:
        file: The page; its pictures go to the folder `evidence` beside it.
        store: The results.
        data: Folder of the cases.
        seconds: Duration of the drawing.

    Returns:
        Every metric and verdict of the page.
    """
    page = Page(store, data, file.parent)
    for section in (_introduction, _copy_paste, _pooling, _training, _layer_roles, _reasoning):
        section(page)
    file.write_text("\n".join(page.lines) + "\n", encoding="utf-8")
    return {"page": str(file), "seconds": round(seconds), **page.metrics}


def _introduction(page: Page) -> None:
    page.write("""\
# Evidence

Written by `nox -s evidence` from pictures of held-out toys; no number on this page is typed by hand. The world, its
models and their training: [the demo family](demo-family.md). Every metric is read by the oracle from pictures of 112 px
and given with its 95 % interval; a claim holds or is contradicted where the intervals do not overlap. *Case by case* is
the paired difference of two rows over the same cases. Identity is the share of a toy's traits that the oracle finds
(coarse: kind and three colours; fine: decal, its colour, the body's pattern). The oracle's own errors are the floor:

| oracle on | azimuth ° | polar ° | average recall | coarse | fine |
| --- | --- | --- | --- | --- | --- |""")
    floor = json.loads((page.store.models.parent / "oracle.json").read_text(encoding="utf-8"))["floor"]
    for name, values in floor.items():
        cells = [str(values[key]) for key in ("azimuth", "polar", "average recall", "coarse", "fine")]
        page.write(f"| {name} | {' | '.join(cells)} |")
    toys = [entry["pictures"][0].toys[0] for entry in page.entries]
    coarse, fine = (chance_agreement(toys, names) for names in (COARSE, FINE))
    page.write(
        f"\nAnother toy of the test split has {coarse:.2f} of the coarse traits and {fine:.2f} of the fine ones."
    )
    missing = sorted({row.arm for row in ROWS if not page.store.has_weights(row) and page.store.read(row)})
    if missing:
        why = "their weights do not ship (`demo/evidence/recorded.json`)"
        page.write(f"\nNot drawn again, since {why}: {', '.join(missing)}.")


def _copy_paste(page: Page) -> None:
    page.write("""
## 1. Copy-paste, view and identity

200 prompts that name a view at least 90° from the reference's, with the weights that ship.""")
    headline = page.table("schedule", {name: page.scores("headline", name) for name in SCHEDULES})
    page.picture("headline", tuple(SCHEDULES))
    page.verdict(
        "staged denoising copies the pose less than both conditions throughout", "recall", BOTH, HEADLINE, headline
    )
    page.verdict(
        "MLLM tokens alone lose fine identity, which the VAE's tokens bring back", "fine", HEADLINE, MLLM, headline
    )
    page.write("The same with DLA and LoRA trained from two other seeds, and with other noise:")
    _seeds(page, "headline", tuple(SCHEDULES), ("recall", "follows", "coarse", "fine"))

    page.write("### Thresholds\n\nThe paper's are for 4096 image tokens, these pictures have 49.")
    staged = {name: headline[name] for name in (PAPER, HEADLINE)}
    page.table("thresholds", staged | {name: page.scores("grid", name) for name in GRID})
    page.picture("grid", tuple(GRID))

    page.write("""\
### No view named

The prompt asks for no view: another one than the reference's is variety, not prompt following. 60 cases.""")
    page.table("no view named", {name: page.scores("free", name) for name in SCHEDULES}, UNNAMED)
    page.write("""\
### No view named, fresh cases

The most common request: a subject in another place, with no word about its pose. After a look at an earlier family's
metrics for the table above, two claims about the paper's thresholds on raw flow time were written down, and 200 fresh
cases were drawn for them.""")
    again = page.table("no view named, fresh cases", {name: page.scores("again", name) for name in AGAIN}, UNNAMED)
    claim = "where no view is named, staged denoising"
    page.verdict(f"{claim} copies the pose less than both conditions throughout", "recall", BOTH, PAPER, again)
    page.verdict(f"{claim} keeps fine identity better than MLLM tokens alone", "fine", PAPER, MLLM, again)
    _seeds(page, "again", AGAIN, ("recall", "coarse", "fine"))


def _seeds(page: Page, part: str, names: tuple[str, ...], columns: tuple[str, ...]) -> None:
    rows = {f"{name}, seed {seed}": page.scores(part, name, arm) for name in names for seed, arm in enumerate(SEEDS)}
    page.table("three seeds", rows, columns)


def _pooling(page: Page) -> None:
    page.write("""\
## 2. Last layer, one pooling, two poolings

Each pair trained in the same two training stages. All three start as the last layer, which the DiT was trained with,
and 1,200 steps change little of that. *Single LAP* has one layerwise attention pooling for text and image tokens. Half
of the cases for the two others.""")
    arms = {"last layer": ("pooling", "demo-last"), "single LAP": ("pooling", "demo-lap"), "DLA": ("headline", "demo")}
    table = page.table("connection", {
        f"{name}, {how}": page.scores(part, how, arm) for name, (part, arm) in arms.items() for how in (MLLM, HEADLINE)
    })  # fmt: skip
    for how in (MLLM, HEADLINE):
        dla, last, single = (f"{name}, {how}" for name in ("DLA", "last layer", "single LAP"))
        page.verdict(
            f"the last layer alone loses identity against pooling all layers ({how})", "fine", dla, last, table
        )
        page.verdict(f"two poolings follow the prompt better than one ({how})", "follows", dla, single, table)


def _training(page: Page) -> None:
    page.write("""\
## 3. Two-stage and single-stage training

As many steps; half of the cases for the others; *single-stage* with the same shares of conditions, and with both
throughout, as in training that does not plan for staged denoising.""")
    arms = {
        "two-stage": ("headline", "demo"), "single-stage": ("training", "demo-single"),
        "single-stage, both throughout": ("training", "demo-single-both"),
    }  # fmt: skip
    table = page.table("training; sampling", {
        f"{name}; {how}": page.scores(part, how, arm)
        for name, (part, arm) in arms.items() for how in (BOTH, PAPER, HEADLINE)
    })  # fmt: skip
    for how in (PAPER, HEADLINE):
        for column in ("fine", "follows"):
            claim = f"staged denoising needs weights that have seen each condition alone ({column}, {how})"
            page.verdict(claim, column, f"two-stage; {how}", f"single-stage, both throughout; {how}", table)


def _layer_roles(page: Page) -> None:
    page.write("""\
## 4. Layer roles

MLLM only, with groups of the MLLM's nine layers (0 = embeddings) zeroed in one modality. A new DLA reads the last layer
alone; layers that so short a training has not taught it to read make no difference.""")
    groups = [f"{action} {group}" for action in ("without", "only") for group in LAYERS]
    names = [f"{modality} {group}" for modality in ("text", "image") for group in groups]
    table = {"all layers": page.scores("headline", MLLM)} | {name: page.scores("roles", name) for name in names}
    page.table("layers", table, ("view error", "follows", "coarse", "fine"))
    early, late = f"without {min(LAYERS)}", f"without {max(LAYERS)}"  # lower without what matters
    claim = "of the image tokens the early layers carry identity"
    page.verdict(claim, "coarse", f"image {late}", f"image {early}", table)
    claim = "of the text tokens the late layers carry the prompt"
    page.verdict(claim, "follows", f"text {early}", f"text {late}", table)


def _reasoning(page: Page) -> None:
    page.write("""\
## 5. Reasoning prompts

*Seen from the other side*, *turned a quarter*, *in the colour of its wheels*. Text only: the MLLM reads the prompt
without the references, in training too.""")
    table = {f"MLLM, {name}": page.scores("reasoning", name) for name in (MLLM, HEADLINE, BOTH)}
    table |= {f"text only, {name}": page.scores("reasoning", name, "demo-text") for name in (HEADLINE, BOTH)}
    page.table("conditioning", table)
    turns = torch.tensor([entry["named"] == "turn" for entry in page.cases("reasoning")])
    page.write(f"{int(turns.sum())} of the {len(turns)} prompts name a turn, the others their view. The turns alone,")
    page.write("of which one in eight is followed by chance:")
    rows = {name: row and row.select(turns) for name, row in table.items()}
    page.table("turns", rows, ("recall", "view error", "follows"))
    claim = "reading prompt and references together follows reasoning prompts better"
    for how in (HEADLINE, BOTH):
        for column in ("follows", "coarse"):
            page.verdict(f"{claim} ({column}, {how})", column, f"MLLM, {how}", f"text only, {how}", table)
