"""Subject DLA: subject-driven image generation for ComfyUI.

Only this file is read when the host starts; everything heavy is imported by the entrypoint and later.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The host calls this once to learn the pack's nodes (V3 API)."""
    from .loaders.folders import copy_demo_picture
    from .nodes import SubjectExtension

    copy_demo_picture()
    return SubjectExtension()
