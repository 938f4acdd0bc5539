"""DINO-I, CLIP-I and CLIP-T of a whole queue's pictures, with the backbone beside every figure."""

from comfy_api.latest import io, ui

from .files import save_reports
from .schema import NONE, advanced, schema

ONE_EACH = " One per line, or a list: for each picture, or for each item of a list of batches, or one for all."
LIMIT = 100_000  # pictures; each is embedded by itself
UNRELATED = 0.05  # cosine; prompts of other pictures reach 0.1 and more with OpenAI's CLIP (our choice)
MODEL_FILES = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt", ".gguf")


class SubjectIdentityScores(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        from ..loaders.embedders import folder_names

        return schema(
            node_id="SubjectIdentityScores",
            display_name="Identity Scores",
            description=(
                "How alike outputs and references are (DINO-I, CLIP-I) and how well outputs follow their prompts"
                " (CLIP-T): mean cosines with 95 % intervals over all pictures of the queue, the backbone beside each."
                " What is left open is not reported; a JSON file goes to the output folder. High scores also come from"
                " copying: see Copy-Paste Report."
            ),
            search_aliases=["dino score", "clip score", "CLIP-I", "CLIP-T", "DINO-I", "similarity", "dreambench"],
            is_input_list=True,
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            inputs=[
                io.Image.Input("images", tooltip="The outputs: a picture, a batch, or a list of either."),
                io.Image.Input(
                    "references",
                    tooltip="A picture, a batch, or a list. Each output meets every reference of its subject.",
                ),
                io.ClipVision.Input(
                    "dino",
                    optional=True,
                    tooltip="For DINO-I: a DINOv2 from Load CLIP Vision (facebook/dinov2-large or -giant).",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="For CLIP-I and the picture half of CLIP-T: a CLIP from Load CLIP Vision, as ViT-L/14.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip=(
                        "For CLIP-T: the text encoder of the same CLIP, with its text projection. FLUX's"
                        " clip_l.safetensors lacks it; openai/clip-vit-large-patch14's model.safetensors has both"
                        " halves."
                    ),
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    optional=True,
                    default="",
                    placeholder="one prompt per line",
                    tooltip="For CLIP-T: what the outputs should show." + ONE_EACH,
                ),
                io.String.Input(
                    "subjects",
                    multiline=True,
                    optional=True,
                    default="",
                    placeholder="the subject of each output",
                    tooltip="Whom the outputs show; empty: all pictures show one subject." + ONE_EACH,
                ),
                io.String.Input(
                    "reference_subjects",
                    multiline=True,
                    optional=True,
                    default="",
                    placeholder="the subject of each reference",
                    tooltip="Whom the references show, in the same words as in subjects." + ONE_EACH,
                ),
                io.String.Input(
                    "filename_prefix",
                    optional=True,
                    default="identity/scores",
                    tooltip=(
                        "Of the JSON file in the output folder, as in Save Image: it may hold folders and parts such"
                        " as %year%."
                    ),
                ),
                advanced(
                    io.Combo.Input,
                    "dino_folder",
                    options=[NONE, *folder_names("dino")],
                    default=NONE,
                    optional=True,
                    tooltip=(
                        "DINO-I by a Hugging Face folder in models/clip_vision (DINO, DINOv2), also beside dino."
                        " facebook/dino-vits16 is DreamBench's."
                    ),
                ),
                advanced(
                    io.Combo.Input,
                    "clip_folder",
                    options=[NONE, *folder_names("clip")],
                    default=NONE,
                    optional=True,
                    tooltip=(
                        "CLIP-I and CLIP-T by a Hugging Face folder in models/clip_vision, also beside clip_vision."
                        " openai/clip-vit-base-patch32 is what published tables mostly use."
                    ),
                ),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="The table with backbones and notes."),
                io.String.Output(
                    "json",
                    display_name="json",
                    tooltip="Every figure with its pairs, backbone and preprocessing, as JSON.",
                ),
                io.String.Output(
                    "figures",
                    display_name="figures",
                    is_output_list=True,
                    tooltip="A short text for each picture, to figures of Contact Sheet.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        images,
        references,
        dino=None,
        clip_vision=None,
        clip=None,
        prompts=None,
        subjects=None,
        reference_subjects=None,
        filename_prefix=("identity/scores",),
        dino_folder=None,
        clip_folder=None,
    ) -> io.NodeOutput:
        from comfy.utils import ProgressBar

        from ..evaluation.identity import (
            captions,
            image_figure,
            json_report,
            reference_figure,
            text_figure,
            text_report,
        )
        from ..loaders.embedders import Folder, HostCLIP, HostDINO, HostText

        dino, clip_vision, clip, dino_folder, clip_folder = (
            values[0] if values else None for values in (dino, clip_vision, clip, dino_folder, clip_folder)
        )
        outputs, real = pictures("images", images), pictures("references", references)
        prompts = spread("prompts", prompts, images)
        shown = spread("subjects", subjects, images)
        known = spread("reference_subjects", reference_subjects, references)
        if (shown is None) != (known is None):
            given, lacking = ("subjects", "reference_subjects") if known is None else ("reference_subjects", "subjects")
            raise ValueError(
                f"Identity Scores: {given} are given and {lacking} are not; expected both, so that each output meets"
                f" its own references, or neither where all pictures show one subject. Fill in {lacking}."
            )

        files = {socket: cls._files(socket) for socket in ("dino", "clip_vision", "clip")}
        texts, notes = {}, []
        folders = {
            kind: Folder(name, kind)
            for kind, name in (("dino", dino_folder), ("clip", clip_folder))
            if name and name != NONE
        }
        embedders = []  # (figure, embedder), in the order of the report
        if dino is not None:
            embedders.append(("DINO-I", HostDINO(dino, files["dino"])))
        if "dino" in folders:
            embedders.append(("DINO-I", folders["dino"]))
        if clip_vision is not None:
            embedders.append(("CLIP-I", HostCLIP(clip_vision, files["clip_vision"])))
            if clip is not None and prompts:
                texts[embedders[-1][1]] = HostText(clip, embedders[-1][1].backbone["embedding"], files["clip"])
        if "clip" in folders:
            embedders.append(("CLIP-I", folders["clip"]))
            if prompts:
                texts[folders["clip"]] = folders["clip"]
        if not embedders:
            raise ValueError(
                "Identity Scores: no model is connected, expected at least one. Connect Load CLIP Vision to dino (a"
                " DINOv2) or clip_vision (a CLIP), or choose a folder."
            )
        if clip is not None and clip_vision is None:
            notes.append(
                "clip is connected and clip_vision is not: it gives no CLIP-T without the same CLIP's pictures."
            )
        if not prompts and (clip is not None or "clip" in folders):
            notes.append("CLIP-T is not reported: prompts are empty.")

        wanted = list(dict.fromkeys(prompts or ()))
        steps = len(embedders) * (len(outputs) + len(real)) + len(texts) * len(wanted)
        progress, similar, follow = ProgressBar(steps), [], []
        for name, embedder in embedders:
            about = {"backbone": embedder.backbone, "preprocessing": str(embedder.pixels)}
            seen = embed(embedder.image, outputs, progress)
            expected = embed(embedder.image, real, progress)
            similar.append(image_figure(name, seen, expected, shown, known, **about))
            if (among := reference_figure(name, expected, known, **about)) is not None:
                similar.append(among)
            if embedder in texts:
                tower = texts[embedder]
                said = embed(tower.text, wanted, progress)
                numbers = [wanted.index(prompt) for prompt in prompts]
                if tower is not embedder:
                    about["backbone"] = {**embedder.backbone, "text": tower.backbone}
                follow.append(text_figure("CLIP-T", seen, said, numbers, shown, **about))
                notes += text_notes(follow[-1], tower.cut, len(wanted))

        own = captions([figure for figure in similar + follow if not figure.name.endswith(", references")])
        figures, more = similar + follow, {"prompts": wanted, "subjects": shown, "reference_subjects": known}
        report = f"{len(outputs)} outputs, {len(real)} references\n\n" + text_report(figures, notes)
        json = json_report(figures, notes, **more)
        save_reports(filename_prefix[0], json=json)
        return io.NodeOutput(report, json, own, ui=ui.PreviewText(report))

    @classmethod
    def _files(cls, socket: str) -> list[str]:
        """The model files that the node at that socket names, from the queued graph; empty where it names none."""
        hidden = cls.hidden
        graph = (hidden.prompt if hidden else None) or {}
        link = graph.get(str(hidden.unique_id), {}).get("inputs", {}).get(socket) if graph else None
        source = graph.get(str(link[0]), {}) if isinstance(link, list) else {}
        values = source.get("inputs", {}).values()
        return [value for value in values if isinstance(value, str) and value.lower().endswith(MODEL_FILES)]


def pictures(name: str, batches: list) -> list:
    """Every picture of a list of IMAGE batches, (H, W, 3) float32 each."""
    from ..common.images import ImageError
    from ..loaders.images import collect_images

    try:
        return collect_images(*batches, limit=LIMIT)
    except ImageError as error:
        raise ValueError(
            f"Identity Scores, {name} (a list: image_2 is its second item, each may be a batch): {error}"
        ) from error


def spread(name: str, texts: list | None, batches: list) -> list[str] | None:
    """One text for each picture. `texts`: a list that came on a link, or one text with a line for each; as many as
    there are pictures, or list items (all pictures of a batch share it), or one. None where there is no text."""
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


def embed(function, items: list, progress):
    """(N, D) embeddings, one item at a time; every one moves the progress bar, where the host looks for a cancel."""
    import torch

    found = []
    for item in items:
        found.append(function(item))
        progress.update(1)
    return torch.stack(found)


def text_notes(figure, cut: int, prompts: int) -> list[str]:
    notes = []
    if cut:
        notes.append(
            f"{cut} of {prompts} prompts exceed what the text encoder reads (CLIP: 77 tokens): their ends do not count."
        )
    if figure.mean < UNRELATED:
        notes.append(
            f"CLIP-T of {figure.mean:.3f} is what unrelated towers give: check that text and picture model are halves"
            " of one CLIP, and that the text encoder's file has its text projection."
        )
    if "@" in figure.backbone["name"] and "text" in figure.backbone:
        notes.append("A CLIP of another input size than 224 px was trained with a text tower of its own: use that one.")
    return notes


NODES = [SubjectIdentityScores]
