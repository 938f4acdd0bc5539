"""The DiT families that this pack knows: one file of this folder each, with a `BACKBONE` record.

Adding a family is adding a file. A model of a family that is not here gets None: strengths 0 and 1 only, no training.
"""

from collections.abc import Iterable, Mapping
from importlib import import_module
from pkgutil import iter_modules

from ...common.markdown import markdown
from ..protocols import Model
from .base import Backbone, DiTSizes, MLLMSizes, Part, Release, Training

__all__ = [
    "BACKBONES", "TRAINED", "Backbone", "DiTSizes", "MLLMSizes", "Part", "Release", "Training", "backbone_of",
    "backbone_of_keys", "pixel_family", "titles", "unread_family",
]  # fmt: skip

_MODULES = (import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__))
_FOUND = (module.BACKBONE for module in _MODULES if hasattr(module, "BACKBONE"))
BACKBONES: dict[str, Backbone] = {backbone.name: backbone for backbone in _FOUND}
# how names of the host's classes, modules and configs begin, without "_": families that are refused, and those that
# read references as patches of pixels, without a VAE
UNREAD_FAMILIES = {"flux3": "FLUX 3"}
PIXEL_FAMILIES = {"hidreamo1": "HiDream-O1", "sensenova": "SenseNova"}
TRAINED = tuple(backbone for backbone in BACKBONES.values() if backbone.training)


def backbone_of(model: Model) -> Backbone | None:
    """Family of a MODEL; None where this pack does not know its token layout (Chroma, video models, …)."""
    if unread_family(model):
        return None
    config = getattr(getattr(model.model, "model_config", None), "unet_config", None) or {}
    if config.get("image_model") is None:  # loaders of other packs may leave it empty, but use the host's model class
        name = type(model.model).__name__
        return next((backbone for backbone in BACKBONES.values() if backbone.host_class == name), None)
    return _most_specific(backbone for backbone in BACKBONES.values() if backbone.has_config(config))


def unread_family(model: Model) -> str | None:
    """Title of a MODEL's family where it is one that is refused since its source could not be read; else None."""
    return _named(model, UNREAD_FAMILIES)


def pixel_family(model: Model) -> str | None:
    """Title of a MODEL's family where it reads references as patches of pixels, so that there are no VAE tokens."""
    return _named(model, PIXEL_FAMILIES)


def _named(model: Model, families: Mapping[str, str]) -> str | None:
    """Title of the one of `families` with whose start a name in a MODEL begins."""
    host = model.model
    module, config = getattr(host, "diffusion_model", None), getattr(host, "model_config", None)
    classes = [type(one) for one in (host, getattr(module, "_orig_mod", module), config)]
    names = [str((getattr(config, "unet_config", None) or {}).get("image_model"))]
    names += [name for one in classes for name in (one.__name__, *one.__module__.split("."))]
    plain = [name.lower().replace("_", "") for name in names]
    return next((title for start, title in families.items() if any(name.startswith(start) for name in plain)), None)


def backbone_of_keys(shapes: Mapping[str, tuple[int, ...]], prefix: str = "") -> Backbone | None:
    """Family of a state dict by its keys, and the shapes of their tensors, as the host detects it."""
    return _most_specific(backbone for backbone in BACKBONES.values() if backbone.has_keys(shapes, prefix))


def titles(backbones: Iterable[Backbone] | None = None) -> str:
    """Names for people, e.g. "FLUX.1, FLUX.2, OmniGen2"; None = of every family."""
    return ", ".join(backbone.title for backbone in (BACKBONES.values() if backbones is None else backbones))


def table() -> str:
    """The families as a markdown table, for docs/backbones.md."""
    heads = "family", "context", "order of tokens", "VAE latents", "placements", "most references", "trained here"
    rows = [
        [
            f"{b.title} (`{b.name}`)",
            f"{b.context_width} wide, `{b.context_layer}`"
            + f" (`{b.stacked_by}`)" * bool(b.stacked_by)
            + ", counted by its mask" * b.counts_context,
            ", ".join(b.token_order),
            f"{b.latent_channels} channels, {b.latent_downscale} px, patches of {b.patch_size}",
            f"{', '.join(b.placements) or 'its own'}; auto: {b.default_placement or 'its own'}"
            + "".join(f"; {release.title}: {release.placements[0]}" for release in b.releases),
            str(b.most_references or "-"),
            f"as {b.training.release}" if b.training else "no",
        ]
        for b in BACKBONES.values()
    ]
    return markdown([heads, *rows])


def _most_specific(backbones: Iterable[Backbone]) -> Backbone | None:
    """A family that is a kind of another one, run by the same class of the host, states more conditions than it."""
    return max(backbones, key=lambda b: (len(b.config), len(b.keys) + len(b.absent_keys) + len(b.rows)), default=None)
