"""The pack's nodes: one file per topic, each node a schema and one call (see docs/architecture.md)."""

from comfy_api.latest import ComfyExtension

from ..loaders import folders
from ..loaders.host import answer_requests, on_prompt, remember_requests
from . import (
    copy_paste,
    encode,
    identity,
    layers,
    load,
    orientation,
    queued_graph,
    qwen_image21,
    sample,
    stages,
    subject_conditioning,
    sweep,
    train,
)

TOPICS = (
    load,
    encode,
    subject_conditioning,
    qwen_image21,
    stages,
    sample,
    train,
    orientation,
    copy_paste,
    identity,
    layers,
    sweep,
)


class SubjectExtension(ComfyExtension):
    """What the host asks for the pack's nodes; also where model folders and a route become known to it."""

    async def get_node_list(self):
        folders.register()
        on_prompt(queued_graph.remember)
        remember_requests()
        answer_requests("/subject_dla/stages", stages.draw_stages)
        return [node for topic in TOPICS for node in topic.NODES]
