"""A custom node pack for tests only: which models the host is asked to load, in order.

At /loads: names of the models' classes since the server's start, a list for each time.
"""

import functools

import comfy.model_management
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS = {}
LOADS: list[list[str]] = []
load = comfy.model_management.load_models_gpu


@functools.wraps(load)
def noted(models, *args, **kwargs):
    LOADS.append([type(getattr(model, "model", model)).__name__ for model in models])
    return load(models, *args, **kwargs)


comfy.model_management.load_models_gpu = noted


@PromptServer.instance.routes.get("/loads")
async def loads(request):
    return web.json_response(LOADS)
