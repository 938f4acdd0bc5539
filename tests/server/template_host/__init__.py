"""A custom node pack for the tests of templates: pictures stay small, and a node records what model calls are given."""

import json
from pathlib import Path

import comfy.utils
import folder_paths
from comfy.patcher_extension import WrappersMP

SIDE, UNIT = 128, 16  # px: pictures are scaled to about SIDE * SIDE, to multiples of UNIT


class RecordCalls:
    """A MODEL that writes a line for each of its calls: sigma, context tokens that are not zero, reference latents."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "name": ("STRING", {})}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "record", "testing"

    def record(self, model, name):
        path = Path(folder_paths.get_output_directory(), f"{name}.jsonl")
        path.unlink(missing_ok=True)

        def apply_model(executor, x, t, c_concat=None, c_crossattn=None, *args, **kwargs):
            tokens = int(c_crossattn.any(-1).any(0).sum())  # FLUX.2 pads its context with zeros
            references = len(kwargs.get("ref_latents") or ())
            with open(path, "a") as lines:
                lines.write(json.dumps({"sigma": float(t.max()), "tokens": tokens, "references": references}) + "\n")
            return executor(x, t, c_concat, c_crossattn, *args, **kwargs)

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, f"record {name}", apply_model)
        return (model,)


def keep_pictures_small() -> None:
    upscale = comfy.utils.common_upscale

    def common_upscale(samples, width, height, *args, **kwargs):
        scale = min(1.0, SIDE / (width * height) ** 0.5)
        if scale < 1:
            width, height = (max(1, round(side * scale / UNIT)) * UNIT for side in (width, height))
        return upscale(samples, width, height, *args, **kwargs)

    comfy.utils.common_upscale = common_upscale


keep_pictures_small()
NODE_CLASS_MAPPINGS = {"RecordCalls": RecordCalls}
