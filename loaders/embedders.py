"""Pictures and prompts to the embeddings that identity metrics compare: CLIP and DINO.

They are models that the host loads, or Hugging Face folders in models/clip_vision. Each embedder says which backbone it
is and how it prepares pictures. Pictures go through one at a time, so that no metric depends on the others of a batch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from torch import Tensor, nn

from ..common.files import listed
from ..common.safetensors_header import read_header
from ..common.untrusted_json import read_json
from .orient_anything.network import resize_positions
from .preprocessing import DINO, Preprocessing, clip_preprocessing, preprocess
from .weight_folders import check_finite, check_plain, check_sizes, check_tokenizer, read_config, read_headers

SIZES = {
    (12, 384): "ViT-S",
    (12, 768): "ViT-B",
    (24, 1024): "ViT-L",
    (32, 1280): "ViT-H",
    (40, 1536): "ViT-g",
    (48, 1664): "ViT-bigG",
}
FOLDERS = {"dino": ("vit", "dinov2", "dinov2_with_registers"), "clip": ("clip",)}  # model_type in config.json
WHOLE_CLIP = "openai/clip-vit-large-patch14's model.safetensors holds both towers and both projections"


class EmbedderError(ValueError):
    """A model that gives no embeddings to compare, and what to do about it."""


class Embedder:
    """`backbone`: model class, name, file, layers, width, patch, embedding width; `preprocessing`: of the pictures."""

    backbone: dict
    preprocessing: Preprocessing

    def image(self, image: Tensor) -> Tensor:
        """(H, W, 3) in 0..1 to (D,) float32 on the CPU; each class below has its own."""
        raise NotImplementedError


class HostCLIP(Embedder):
    """A CLIP_VISION: projected image embeddings by the host's `encode_image`, whose preprocessing is CLIP's own."""

    def __init__(self, clip_vision, files: Sequence[str] = ()):
        model = clip_vision.model
        tower = getattr(model, "vision_model", None)
        if tower is None or _siglip(tower):
            raise EmbedderError(
                f"clip_vision holds {_describe(clip_vision)}, expected a CLIP with its projection (ViT-L/14, ViT-H/14,"
                " ViT-bigG/14). DINOv2 belongs to dino; SigLIP is loaded by the host without its pooling head. "
                f"{WHOLE_CLIP}: put it into models/clip_vision and load it with Load CLIP Vision."
            )
        conv, projection, size = tower.embeddings.patch_embedding, model.visual_projection, clip_vision.image_size
        kinds, endings = ("clip_vision", "checkpoints"), ("visual_projection.weight", "visual.proj")
        _check_projection("clip_vision", files, kinds, endings, projection)
        self.clip_vision, self.preprocessing = clip_vision, clip_preprocessing(size)
        self.backbone = _record("CLIP", model, len(tower.encoder.layers), conv, projection.out_features, size, files)

    def image(self, image: Tensor) -> Tensor:
        """By the host."""
        return _finite(self.clip_vision.encode_image(image[None])["image_embeds"][0], self.backbone)


class HostDINO(Embedder):
    """A CLIP_VISION that is a DINOv2: its class token, at 256/224 px as published.

    The host feeds it 518 px, so the position table is interpolated here to 16 x 16 patches, as transformers does it;
    the model stays as it is.
    """

    preprocessing = DINO

    def __init__(self, clip_vision, files: Sequence[str] = ()):
        model = clip_vision.model
        if not hasattr(getattr(model, "embeddings", None), "position_embeddings") or not hasattr(model, "layernorm"):
            raise EmbedderError(
                f"dino holds {_describe(clip_vision)}, expected a DINOv2 (facebook/dinov2-large's or -giant's"
                " model.safetensors in models/clip_vision, loaded with Load CLIP Vision). A CLIP belongs to"
                " clip_vision."
            )
        conv = model.embeddings.patch_embeddings.projection
        self.clip_vision = clip_vision
        self.backbone = _record("DINOv2", model, len(model.encoder.layer), conv, conv.out_channels, DINO.crop, files)

    @torch.no_grad()
    def image(self, image: Tensor) -> Tensor:
        """The class token, at 16 x 16 patches."""
        comfy.model_management.load_model_gpu(self.clip_vision.patcher)
        model, table = self.clip_vision.model, self.clip_vision.model.embeddings
        device = self.clip_vision.load_device
        patches = table.patch_embeddings(preprocess(image.to(device), self.preprocessing)[None])
        positions = table.position_embeddings.to(device, torch.float32)
        positions = resize_positions(positions, round(patches.shape[1] ** 0.5))
        states = torch.cat((table.cls_token.to(patches), patches), dim=1) + positions
        return _finite(model.layernorm(model.encoder(states)[0])[0, 0], self.backbone)


class _Wrapped(nn.Module):
    """Around a library model, because the host sets `.device`, which the library's makes read-only."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


class FolderEmbedder(Embedder):
    """A Hugging Face folder of models/clip_vision, run by transformers in fp32.

    `kind`: "dino" (DINO, DINOv2: class token) or "clip" (both towers with their projections).
    """

    def __init__(self, name: str, kind: str):
        import transformers  # takes seconds

        folder = _find_folder(name, kind)
        with torch.inference_mode(False):  # else the weights are tensors that a module cannot hold
            config, state = _read_folder(folder)
        type_ = config["model_type"]
        classes = {"vit": "ViTModel", "dinov2": "Dinov2Model", "clip": "CLIPModel"}
        class_ = getattr(transformers, classes.get(type_, "Dinov2WithRegistersModel"))
        options = {"add_pooling_layer": False} if type_ == "vit" else {}  # DINO has none: its class token is the output
        try:
            with torch.inference_mode(False):
                model, found = class_.from_pretrained(  # of no folder, in which it would follow adapters and kernels
                    None, config=class_.config_class.from_dict(config), state_dict=state, output_loading_info=True,
                    attn_implementation="sdpa", **options
                )  # fmt: skip
                model = model.float().eval().requires_grad_(False)
        except Exception as error:  # the library checks few of its settings
            raise EmbedderError(
                f"{folder}: transformers {transformers.__version__} makes no {class_.__name__} of its config.json and "
                f"weights ({type(error).__name__}: {error!s:.300}). Download the whole folder again."
            ) from error
        if found["missing_keys"]:  # the library would use random weights
            raise EmbedderError(
                f"{folder} lacks {len(found['missing_keys'])} weights of {class_.__name__}, such as"
                f" {sorted(found['missing_keys'])[0]}. Download the whole folder again."
            )
        self.kind, self.folder, self.model = kind, folder, model
        vision = model.vision_model if kind == "clip" else model
        sizes = vision.config
        self.preprocessing = clip_preprocessing(sizes.image_size) if kind == "clip" else DINO
        conv = next(module for module in vision.modules() if isinstance(module, nn.Conv2d))
        vit = "DINO" if "dino" in name.lower() else "ViT"
        family = {"clip": "CLIP", "vit": vit}.get(type_, "DINOv2")
        embedding = model.config.projection_dim if kind == "clip" else sizes.hidden_size
        other_size = type_ == "vit" and sizes.image_size != DINO.crop
        self.interpolate = {"interpolate_pos_encoding": True} if other_size else {}
        crop, files = self.preprocessing.crop, [f"{name} (folder)"]
        self.backbone = _record(family, model, sizes.num_hidden_layers, conv, embedding, crop, files)
        self.patcher = comfy.model_patcher.ModelPatcher(
            _Wrapped(model),
            load_device=comfy.model_management.text_encoder_device(),
            offload_device=comfy.model_management.text_encoder_offload_device(),
        )
        self.cut = 0

    def _load(self) -> torch.device:
        # whole, since the library's layers do not move their weights at use
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        return self.patcher.load_device

    @torch.no_grad()
    def image(self, image: Tensor) -> Tensor:
        """The class token, or the projected embedding."""
        pixels = preprocess(image.to(self._load()), self.preprocessing)[None]
        if self.kind == "clip":
            embedding = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)[0]
        else:
            embedding = self.model(pixel_values=pixels, **self.interpolate).last_hidden_state[0, 0]
        return _finite(embedding, self.backbone)

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        """(D,) float32 on the CPU; of a prompt that is too long the beginning counts."""
        import transformers

        longest = self.model.config.text_config.max_position_embeddings
        try:
            check_tokenizer(self.folder)
        except ValueError as error:
            raise EmbedderError(str(error)) from None
        try:
            class_ = getattr(transformers, "CLIPTokenizerFast", None) or transformers.CLIPTokenizer
            tokenizer = class_.from_pretrained(str(self.folder), local_files_only=True)  # no class that a file names
            self.cut += len(tokenizer(prompt)["input_ids"]) > longest
            tokens = tokenizer(prompt, truncation=True, max_length=longest, return_tensors="pt")
            if (last := int(tokens["input_ids"].max())) >= self.model.config.text_config.vocab_size:
                raise ValueError(f"it gives the token {last}, the model has {self.model.config.text_config.vocab_size}")
        except BaseException as error:  # also the tokenizer's own PanicException
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise EmbedderError(
                f"{self.folder}: its tokenizer cannot be read ({type(error).__name__}: {error!s:.200}). Download the "
                "whole folder again."
            ) from error
        tokens = tokens.to(self._load())
        pooled = self.model.text_model(**tokens).pooler_output
        return _finite(self.model.text_projection(pooled)[0], self.backbone)


class HostText:
    """The text tower of a CLIP whose projection is as wide as the picture's: CLIP-L, CLIP-H or CLIP-G.

    CLIP-L also where it is one of two text encoders and the host reads its unprojected state (FLUX).
    """

    def __init__(self, clip, width: int, files: Sequence[str] = ()):
        children = dict(clip.cond_stage_model.named_children())
        towers = {
            name: tower.transformer.text_projection
            for name, tower in children.items()
            if isinstance(getattr(getattr(tower, "transformer", None), "text_projection", None), nn.Module)
        }
        fits = [name for name, projection in towers.items() if projection.out_features == width]
        if not fits:
            there = ", ".join(f"{name} of width {projection.out_features}" for name, projection in towers.items())
            there = there or f"no CLIP text tower ({', '.join(children)})"
            raise EmbedderError(
                f"CLIP-T: clip holds {there}, expected one whose projection is {width} wide as that of clip_vision is:"
                " CLIP-L with ViT-L/14 (768), CLIP-H with ViT-H/14 (1024), CLIP-G with ViT-bigG/14 (1280). Connect the"
                " text encoder of the same CLIP, or leave clip open."
            )
        self.clip, self.name, projection = clip, fits[0], towers[fits[0]]
        kinds, endings = ("text_encoders", "checkpoints"), ("text_projection", "text_projection.weight")
        _check_projection("clip", files, kinds, endings, projection)
        tower = children[self.name]
        sizes = {"layers": tower.num_layers, "width": projection.in_features, "embedding": projection.out_features}
        self.backbone = {"model": type(tower.transformer).__name__, **sizes, "file": ", ".join(files) or None}
        self.cut = 0

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        """(D,) float32 on the CPU: the projected state at the end token.

        Parentheses are text here, not emphasis; of a prompt longer than 77 tokens the first 77 count, as published.
        """
        clip, model = self.clip, self.clip.cond_stage_model
        tower = getattr(model, self.name)
        tokens = getattr(clip.tokenizer, self.name).tokenize_with_weights(prompt, disable_weights=True)
        self.cut += len(tokens) > 1
        model.reset_clip_options()
        try:
            clip.load_model()
            # newer hosts need the execution device, older ones ignore it
            tower.set_clip_options({"projected_pooled": True, "execution_device": clip.patcher.load_device})
            pooled = tower.encode_token_weights(tokens[:1])[1]
        finally:
            model.reset_clip_options()
        return _finite(pooled[0], self.backbone)


def _finite(embedding: Tensor, backbone: dict) -> Tensor:
    """An embedding in float32 on the CPU; raises EmbedderError for NaN, which would pass for a score."""
    found = embedding.float().cpu()
    if not bool(found.isfinite().all()):
        raise EmbedderError(
            f"{backbone['file'] or backbone['model']}: the model gives NaN or infinity. Its weights are damaged, or "
            "too large for the host's dtype: download the file again, or start the host with --fp32-text-enc."
        )
    return found


def _record(family: str, model: nn.Module, layers: int, conv, embedding: int, size: int, files: Sequence[str]) -> dict:
    """What is written beside a metric. The name is by size alone: CLIP ViT-L/14 may be anybody's training of it."""
    width, patch = conv.out_channels, conv.kernel_size[0]
    name = f"{family} {SIZES.get((layers, width), f'ViT {layers} x {width}')}/{patch}"
    if family == "CLIP" and size != 224:
        name += f"@{size}px"
    sizes = {"layers": layers, "width": width, "patch": patch, "embedding": embedding, "input": size}
    return {"name": name, "model": type(model).__name__, **sizes, "file": ", ".join(files) or None}


def _describe(clip_vision) -> str:
    model = getattr(clip_vision, "model", clip_vision)
    tower = getattr(model, "vision_model", None)
    kind = "SigLIP, " if tower is not None and _siglip(tower) else ""
    return f"a {kind}{type(model).__name__}"


def _siglip(tower: nn.Module) -> bool:
    return getattr(tower.embeddings, "class_embedding", None) is None


def _check_projection(socket: str, files: Sequence[str], kinds: Sequence[str], endings: tuple[str, ...], layer: Any):
    """Raises EmbedderError for a projection that the file lacks: the host at most warns, and uses memory as it is."""
    paths = [path for name in files for kind in kinds if (path := folder_paths.get_full_path(kind, name))]
    headers = [path for path in paths if path.endswith(".safetensors")]
    found = hasattr(layer, "in_features")  # newer hosts put an identity in place of a missing one at pictures
    if found and headers and len(paths) == len(files) == len(headers):  # the headers say it, else the values
        tensors = [item for path in headers for item in read_header(path).tensors.items()]
        shapes = [set(tensor.shape) for key, tensor in tensors if key.endswith(endings)]
        found = {layer.in_features, layer.out_features} in shapes
    elif found:
        weight = layer.weight.float().cpu()
        identity = weight.shape[0] == weight.shape[1] and torch.equal(weight, torch.eye(len(weight)))
        found = bool(weight.isfinite().all()) and bool(weight.any()) and not identity
    if not found:
        raise EmbedderError(
            f"{socket}: {', '.join(files) or 'the file'} holds no {endings[0]}, without which pictures and texts cannot"
            f" be compared (FLUX's clip_l.safetensors lacks it). {WHOLE_CLIP}: use it in models/text_encoders and"
            " models/clip_vision."
        )


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and weights of a Hugging Face folder, checked against each other. Raises EmbedderError."""
    try:
        config, headers = read_config(folder), read_headers(folder)
        check_plain(headers)
        check_sizes(config, headers, folder / "config.json", positions=True)
        state: dict[str, Tensor] = {}
        needed = sum(path.stat().st_size for path in {path for path, _ in headers.values()})
        if needed > (most := comfy.model_management.get_total_memory(torch.device("cpu"))):
            raise EmbedderError(f"{folder} has weights of {needed:,} bytes, this machine has memory for {most:,}.")
        for path in dict.fromkeys(path for path, _ in headers.values()):
            tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
            tensors = {key: tensor for key, tensor in tensors.items() if headers[key][0] == path}
            check_finite(path, tensors)
            state |= tensors
    except ValueError as error:
        raise EmbedderError(f"{error}") from None
    return config, state


def folder_names(kind: str) -> list[str]:
    """Folders in models/clip_vision whose config.json names a model of that kind ("dino" or "clip"), sorted."""
    found = set()
    for root in map(Path, folder_paths.get_folder_paths("clip_vision")):
        for config in root.glob("*/config.json"):
            try:
                type_ = read_json(config).get("model_type")
            except ValueError:
                continue  # not a model's
            if type_ in FOLDERS[kind]:
                found.add(config.parent.name)
    return sorted(found, key=str.lower)


def _find_folder(name: str, kind: str) -> Path:
    """The folder of that name; raises EmbedderError where it is not one of `folder_names`, or no longer."""
    if name not in (there := folder_names(kind)):
        raise EmbedderError(
            f"models/clip_vision has no {kind.upper()} folder {name!r}; it holds: {listed(there)}. A"
            f" Hugging Face folder (config.json, model.safetensors) is expected, with model_type"
            f" {' or '.join(FOLDERS[kind])}."
        )
    roots = map(Path, folder_paths.get_folder_paths("clip_vision"))
    return next(root / name for root in roots if (root / name / "config.json").is_file())
