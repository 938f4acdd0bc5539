"""A small family and a few painted subjects, for training runs that take seconds."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ["crimson", "seagreen", "royalblue", "goldenrod", "orchid", "sienna", "teal", "gray"]
PLACES = ["meadow", "beach", "night sky", "brick wall"]
GROUNDS = [(110, 160, 70), (225, 205, 150), (25, 25, 60), (150, 80, 60)]
SHAPES = ["ball", "box", "kite"]


def paint_subjects(folder: Path, subjects: int = 6, size: int = 64) -> Path:
    """SUBJECT/{0,1,2}.png with captions: a shape in one colour, each time elsewhere and before another ground."""
    for number in range(subjects):
        shape, colour = SHAPES[number % len(SHAPES)], COLOURS[number % len(COLOURS)]
        subject = folder / f"{colour}-{shape}"
        subject.mkdir(parents=True, exist_ok=True)
        for view in range(3):
            ground = (number + view) % len(PLACES)
            picture = Image.new("RGB", (size, size), GROUNDS[ground])
            pen, left, top = ImageDraw.Draw(picture), 6 + 10 * view, 24 - 8 * view
            box = (left, top, left + 26, top + 26)
            kite = [(left + 13, top), (left + 26, top + 13), (left + 13, top + 26), (left, top + 13)]
            draws = {"ball": (pen.ellipse, box), "box": (pen.rectangle, box), "kite": (pen.polygon, kite)}
            draws[shape][0](draws[shape][1], colour, "white" if shape != "kite" else None)
            picture.save(subject / f"{view}.png")
            (subject / f"{view}.txt").write_text(f"a {shape} before a {PLACES[ground]}", encoding="utf-8")
    return folder


def small_family(folder: Path) -> dict[str, str]:
    """Makes the host know the demo's family, and `folder` before it for what is trained; the recipe's [models]."""
    import folder_paths
    from subject_dla.demo.family import layout as family
    from subject_dla.loaders import folders

    folders.register()
    for kind in family.NAMES:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for models in (family.MODELS / kind, folder / kind):
            folder_paths.add_model_folder_path(kind, str(models), is_default=True)
    names = family.NAMES
    return {"diffusion_model": names["diffusion_models"], "vae": names["vae"], "mllm": names["mllm"]}


def small_recipe(models: dict[str, str], data: Path, /, **changes) -> dict:
    """A recipe's sections for some steps in seconds; `changes` by section."""
    recipe = {
        "models": models,
        "dla": {"heads": 4},
        "data": {"source": str(data), "resolution": 64, "reference_size": 64, "validation": 0.2, "pairs_per_target": 1},
        "training": {"steps": 6, "batch_size": 2, "warmup": 0, "learning_rate": 1e-3},
        "run": {"name": "small", "save_every": 0, "validate_every": 0, "sample_every": 0, "dtype": "fp32"},
    }
    for section, entries in changes.items():
        recipe.setdefault(section, {}).update(entries)
    return recipe
