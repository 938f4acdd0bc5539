"""A custom node pack for tests only: stand-ins for the nodes of DreamO's own pack, with the published sockets and
widgets and nothing behind them, so that the editor loads the workflow `system_dreamo` and the queue takes it.

object_info.json holds the definitions as the host's /object_info gives them, and says where they were published.
"""

import json
from pathlib import Path

PUBLISHED = json.loads(Path(__file__).with_name("object_info.json").read_text(encoding="utf-8"))["nodes"]


def hand_on(outputs: list[str], given: dict) -> tuple:
    """Inputs of the outputs' types as they came in; the reference is encoded, so that what comes out is of its size."""
    found = {"MODEL": given.get("model"), "IMAGE": given.get("pixels"), "DREAMO_PROCESSOR": "none"}
    if "LATENT" in outputs:
        found["LATENT"] = {"samples": given["vae"].encode(given["pixels"][..., :3])}
    return tuple(found[kind] for kind in outputs)


def stand_in(name: str, published: dict) -> type:
    content = {
        "INPUT_TYPES": classmethod(lambda cls: published["input"]), "RETURN_TYPES": tuple(published["output"]),
        "FUNCTION": "run", "run": lambda self, **given: hand_on(published["output"], given), "CATEGORY": "dreamo",
    }  # fmt: skip
    return type(name, (), content)


NODE_CLASS_MAPPINGS = {name: stand_in(name, published) for name, published in PUBLISHED.items()}
NODE_DISPLAY_NAME_MAPPINGS = {name: published["display_name"] for name, published in PUBLISHED.items()}
