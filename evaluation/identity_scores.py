"""From pictures, prompts and models to the identity metrics and their report: what Identity Scores gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.images import ImageError
from ..loaders.embedders import Embedder, FolderEmbedder, HostCLIP, HostDINO, HostText
from ..loaders.images import collect_images
from .identity import IdentityMetric, captions, image_metric, json_report, reference_metric, text_metric, text_report

LIMIT = 100_000  # pictures; each is embedded by itself
UNRELATED = 0.05  # cosine; prompts of other pictures reach 0.1 and more with OpenAI's CLIP (our choice)


@dataclass(frozen=True)
class IdentityScores:
    """The report as text and as JSON, and a caption for each output."""

    text: str
    json: str
    captions: list[str]


def identity_scores(
    images: Sequence[Tensor],
    references: Sequence[Tensor],
    models: Mapping[str, Any],
    texts: Mapping[str, list[str] | None],
    files: Mapping[str, Sequence[str]],
    progress: Callable[[int], Any],
) -> IdentityScores:
    """DINO-I, CLIP-I and CLIP-T by the models that there are.

    Args:
        images: IMAGE batches (B, H, W, 3) of the outputs.
        references: IMAGE batches of the references.
        models: By input: `dino` and `clip_vision` (the host's CLIP_VISION), `clip` (its CLIP); `dino_folder` and
            `clip_folder` (names of Hugging Face folders in models/clip_vision).
        texts: By input, each as `spread` takes it: `prompts`, and labels of the `subjects` and `reference_subjects`.
        files: Names of the model files by input, as far as they are known.
        progress: Makes, from the number of items to embed, an object whose update(1) is called after each.

    Raises:
        ValueError: No model, or pictures, prompts, labels or models that do not belong together.
    """
    outputs, real = _pictures("images", images), _pictures("references", references)
    batches = {"prompts": images, "subjects": images, "reference_subjects": references}
    prompts, shown, known = (spread(name, texts.get(name), batch) for name, batch in batches.items())
    if (shown is None) != (known is None):
        given, lacking = ("subjects", "reference_subjects") if known is None else ("reference_subjects", "subjects")
        raise ValueError(
            f"Identity Scores: {given} are given and {lacking} are not; expected both, so that each output meets"
            f" its own references, or neither where all pictures show one subject. Fill in {lacking}."
        )
    embedders = _embedders(models, files, texts=bool(prompts))
    if not embedders:
        raise ValueError(
            "Identity Scores: no model is connected, expected at least one. Connect Load CLIP Vision to dino (a"
            " DINOv2) or clip_vision (a CLIP), or choose a folder."
        )
    notes = []
    if "clip" in models and "clip_vision" not in models:
        notes.append("clip is connected and clip_vision is not: it gives no CLIP-T without the same CLIP's pictures.")
    if not prompts and models.keys() & {"clip", "clip_folder"}:
        notes.append("CLIP-T is not reported: prompts are empty.")

    different = list(dict.fromkeys(prompts or ()))
    towers = sum(tower is not None for *_, tower in embedders)
    bar = progress(len(embedders) * (len(outputs) + len(real)) + towers * len(different))
    similar: list[IdentityMetric] = []
    following: list[IdentityMetric] = []
    for name, embedder, tower in embedders:
        about = {"backbone": embedder.backbone, "preprocessing": str(embedder.preprocessing)}
        seen, expected = (_embed(embedder.image, items, bar) for items in (outputs, real))
        similar.append(image_metric(name, seen, expected, shown, known, **about))
        if (among := reference_metric(name, expected, known, **about)) is not None:
            similar.append(among)
        if tower is not None:
            numbers = [different.index(prompt) for prompt in prompts or ()]
            if tower is not embedder:
                about["backbone"] = {**embedder.backbone, "text": tower.backbone}
            following.append(text_metric("CLIP-T", seen, _embed(tower.text, different, bar), numbers, shown, **about))
            notes += _text_notes(following[-1], tower.cut, len(different))

    metrics = similar + following
    return IdentityScores(
        f"{len(outputs)} outputs, {len(real)} references\n\n" + text_report(metrics, notes),
        json_report(metrics, notes, prompts=different, subjects=shown, reference_subjects=known),
        captions([metric for metric in metrics if not metric.name.endswith(", references")]),
    )


def spread(name: str, texts: list[str] | None, batches: Sequence[Tensor]) -> list[str] | None:
    """One text for each picture of IMAGE batches; None where there is no text.

    texts: a list that came on a link, or one text with a line for each; as many as there are pictures, or batches (all
    pictures of a batch share it), or one. Raises ValueError for another number of them.
    """
    texts = [" ".join(text.split()) for text in texts] if texts and len(texts) > 1 else (texts or [""])[0].splitlines()
    texts = [text.strip() for text in texts if text.strip()]
    sizes = [len(batch) for batch in batches]
    if not texts:
        return None
    if len(texts) == sum(sizes):
        return texts
    if len(texts) == 1:
        return texts * sum(sizes)
    if len(texts) == len(sizes):
        return [text for text, size in zip(texts, sizes, strict=True) for _ in range(size)]
    raise ValueError(
        f"Identity Scores: {name} has {len(texts)} texts, expected {sum(sizes)} (one for each picture)"
        + (f", {len(sizes)} (one for each item of the list)" if len(sizes) not in (1, sum(sizes)) else "")
        + " or one for all. Write one per line, each on a line of its own."
    )


def _embedders(
    models: Mapping[str, Any], files: Mapping[str, Sequence[str]], texts: bool
) -> list[tuple[str, Embedder, HostText | FolderEmbedder | None]]:
    """(metric, embedder of pictures, embedder of prompts if `texts`) in the report's order."""
    found: list[tuple[str, Embedder, HostText | FolderEmbedder | None]] = []
    if "dino" in models:
        found.append(("DINO-I", HostDINO(models["dino"], files["dino"]), None))
    if "dino_folder" in models:
        found.append(("DINO-I", FolderEmbedder(models["dino_folder"], "dino"), None))
    if "clip_vision" in models:
        embedder = HostCLIP(models["clip_vision"], files["clip_vision"])
        width, both = embedder.backbone["embedding"], texts and "clip" in models
        found.append(("CLIP-I", embedder, HostText(models["clip"], width, files["clip"]) if both else None))
    if "clip_folder" in models:
        folder = FolderEmbedder(models["clip_folder"], "clip")
        found.append(("CLIP-I", folder, folder if texts else None))
    return found


def _pictures(name: str, batches: Sequence[Tensor]) -> list[Tensor]:
    """Every picture of IMAGE batches, (H, W, 3) float32 each."""
    try:
        return collect_images(*batches, limit=LIMIT)
    except ImageError as error:
        raise ImageError(
            f"Identity Scores, {name} (a list: image_2 is its second item, each may be a batch): {error}"
        ) from error


def _embed(function: Callable[[Any], Tensor], items: Sequence, bar) -> Tensor:
    """(N, D) embeddings, one item at a time; every one moves the progress bar, where the host looks for a cancel."""
    found = []
    for item in items:
        found.append(function(item))
        bar.update(1)
    return torch.stack(found)


def _text_notes(metric: IdentityMetric, cut: int, prompts: int) -> list[str]:
    """What a reader must know of a CLIP-T."""
    notes = []
    if cut:
        notes.append(
            f"{cut} of {prompts} prompts exceed what the text encoder reads (CLIP: 77 tokens): their ends do not count."
        )
    if metric.mean < UNRELATED:
        notes.append(
            f"CLIP-T of {metric.mean:.3f} is what unrelated towers give: check that text and picture model are halves"
            " of one CLIP, and that the text encoder's file has its text projection."
        )
    if "@" in metric.backbone["name"] and "text" in metric.backbone:
        notes.append("A CLIP of another input size than 224 px was trained with a text tower of its own: use that one.")
    return notes
