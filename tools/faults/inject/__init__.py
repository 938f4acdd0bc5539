"""A custom node pack for `nox -s faults` only: brings about a fault at a chosen call inside the server.

POST /faults with {"at": "comfy.sd:VAE.encode", "call": 2, "do": "interrupt"}: at the second call from now on.
GET /faults: how often each place was called since it was named, and what was done.
"""

import asyncio
import functools
import importlib
import os
import signal
import sys
import time

import comfy.model_management
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS = {}
PLACES: dict[str, "Place"] = {}


class Place:
    """A function of a module, counted; one of its calls does something else first."""

    def __init__(self, at: str):
        self.calls, self.call, self.do, self.done = 0, 0, "", 0
        module, _, names = at.partition(":")
        *owners, name = names.split(".")
        owner = functools.reduce(getattr, owners, _module(module))
        function = vars(owner)[name]
        bound = function.__func__ if isinstance(function, staticmethod | classmethod) else function

        @functools.wraps(bound)
        def counted(*args, **kwargs):
            self.calls += 1
            if self.call and self.calls == self.call:
                self.done += 1
                act(self)
            return bound(*args, **kwargs)

        wrapped = type(function)(counted) if bound is not function else counted
        setattr(owner, name, wrapped)
        for module in list(sys.modules.values()):  # where it was imported by its name
            if owner is not module and not owners and vars(module).get(name) is function:
                setattr(module, name, wrapped)


def _module(name: str):
    """A module by its name; with a leading dot, of this checkout's pack, whatever the host calls it."""
    if not name.startswith("."):
        return importlib.import_module(name)
    pack = next(key for key in sys.modules if key.endswith("subject-dla") or key.endswith("subject_dla"))
    return importlib.import_module(name, pack)


def act(place: Place) -> None:
    """Brings the fault about."""
    do = place.do
    if do == "interrupt":
        comfy.model_management.interrupt_current_processing()
    elif do == "memory":
        import torch

        raise torch.cuda.OutOfMemoryError("Allocation on device")
    elif do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif do == "disk":
        raise OSError(28, "No space left on device")
    elif do == "wait":  # until another wish comes for this place
        while place.do == "wait":
            time.sleep(0.02)


@PromptServer.instance.routes.post("/faults")
async def choose(request):
    """Says where a fault is to come about."""
    wish = await request.json()
    place = PLACES.get(wish["at"]) or PLACES.setdefault(wish["at"], Place(wish["at"]))
    place.calls, place.call, place.do, place.done = 0, int(wish.get("call", 0)), wish.get("do", ""), 0
    return web.json_response({})


@PromptServer.instance.routes.post("/faults/forget")
async def forget(request):
    """Lets the host forget models and results, as its /free does, but answers once it is done."""
    queue = PromptServer.instance.prompt_queue
    queue.set_flag("free_memory", True)
    while queue.get_flags(reset=False):
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.2)  # between taking the flags and doing so
    return web.json_response({})


@PromptServer.instance.routes.get("/faults")
async def told(request):
    """What was called and done."""
    return web.json_response({at: {"calls": place.calls, "done": place.done} for at, place in PLACES.items()})
