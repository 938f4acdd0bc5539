"""Sampling with stages: a guider for the host's custom sampler, one node with KSampler's habits, image guidance."""

from collections.abc import Mapping
from typing import Any

import comfy.samplers
from comfy_api.latest import io

from . import queued_graph
from .marks import Marks
from .schema import Node, Stages, schema
from .stages import own_steps_problem

MODEL_TIP = "The DiT, with LoRAs and patches of your choice."
POSITIVE_TIP = "From Add Identity or Aggregate Layers."
STAGES_TIP = (
    "From Stage Schedule or Stage Keyframe: when the context tokens and the reference latents are read, and how"
    " strongly."
)
NEGATIVE_TIP = (
    "What to avoid, staged like the positive. Needed when cfg is not 1 (an empty prompt will do), unused when it is."
)
CFG_TIP = (
    "Classifier-free guidance. 1: off, for guidance-distilled models such as FLUX.1-dev. The paper samples with 2.5."
)


def _problems(node_id: str, own_steps_at: str) -> dict[str, str | None]:
    """What of a node that samples with stages does not go together, by input."""
    return {"cfg": _cfg_problem(queued_graph.queued(node_id)), own_steps_at: own_steps_problem(node_id)}


def _cfg_problem(given: Mapping[str, Any]) -> str | None:
    """Why a cfg cannot be sampled with; None where nothing is wrong, or it is known only when the node runs."""
    cfg = queued_graph.number(given.get("cfg"))
    if cfg is not None and not 0 <= cfg <= 100:
        return f"cfg is {cfg:g}, expected 0 to 100."
    if cfg not in (None, 1.0) and "negative" not in given:
        return (
            f"cfg is {cfg:g}, which compares with a negative condition, but none is connected. Connect one (an empty"
            " prompt will do), or set cfg to 1."
        )
    return None


def _cfg():
    return io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=CFG_TIP)


class SubjectStagedGuider(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "stages",
            node_id="SubjectStagedGuider",
            display_name="Staged Guider",
            description=(
                "A guider for SamplerCustomAdvanced that reads MLLM and VAE tokens as the stages say, step by step. "
                "Works with any sampler and scheduler. At strength 1 throughout it is exactly the host's CFGGuider."
            ),
            search_aliases=["guider", "multi-stage denoising", "custom sampler stages"],
            inputs=[
                io.Model.Input("model", tooltip=MODEL_TIP),
                io.Conditioning.Input("positive", tooltip=POSITIVE_TIP),
                Stages.Input("stages", tooltip=STAGES_TIP),
                _cfg(),
                io.Conditioning.Input("negative", optional=True, tooltip=NEGATIVE_TIP),
            ],
            outputs=[io.Guider.Output("guider", display_name="guider", tooltip="To SamplerCustomAdvanced.")],
        )

    validate_inputs = Marks(lambda node_id: _problems(node_id, "stages"))  # the sampler is another node

    @classmethod
    def execute(cls, model, positive, stages, cfg, negative=None) -> io.NodeOutput:
        from ..sampling.guider import staged_guider

        return io.NodeOutput(staged_guider(model, stages, positive, negative, cfg))


class SubjectStagedSampler(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "stages",
            node_id="SubjectStagedSampler",
            display_name="Staged Sampler",
            description="KSampler with stages: reads MLLM and VAE tokens as the schedule says, step by step.",
            search_aliases=["ksampler", "sample subject", "multi-stage denoising"],
            inputs=[
                io.Model.Input("model", tooltip=MODEL_TIP),
                io.Conditioning.Input("positive", tooltip=POSITIVE_TIP),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The latent to denoise: an empty one, or a picture's for img2img and inpainting.",
                ),
                Stages.Input("stages", tooltip=STAGES_TIP),
                io.Conditioning.Input("negative", optional=True, tooltip=NEGATIVE_TIP),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The random seed of the noise.",
                ),
                io.Int.Input("steps", default=25, min=1, max=10000, tooltip="Number of denoising steps."),
                _cfg(),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="euler",
                    tooltip="The algorithm that steps from noise to picture.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    default="simple",
                    tooltip="How the noise levels are spread over the steps.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "How much of the latent is made anew. 1: all of it. Less: img2img; stages that end before it"
                        " begins are skipped."
                    ),
                ),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent", tooltip="To VAE Decode.")],
        )

    validate_inputs = Marks(lambda node_id: _problems(node_id, "sampler_name"))

    @classmethod
    def execute(
        cls, model, positive, latent_image, stages, seed, steps, cfg, sampler_name, scheduler, denoise, negative=None
    ) -> io.NodeOutput:
        from ..sampling.sample import staged_sample

        return io.NodeOutput(
            staged_sample(
                model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise, stages
            )
        )


class SubjectImageGuidance(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "stages",
            node_id="SubjectImageGuidance",
            display_name="Image Guidance",
            description=(
                "Guidance over the reference images with a scale of its own: put this node between the model and a"
                " sampler. The sampler's cfg then guides by the text alone, image_guidance by the references. With"
                " Apply Stages in either order."
            ),
            search_aliases=["image cfg", "image guidance scale", "reference guidance", "dual cfg", "instruct pix2pix"],
            inputs=[
                io.Model.Input("model", tooltip=MODEL_TIP + " It is not changed itself."),
                io.Float.Input(
                    "image_guidance",
                    default=1.5,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    round=0.01,
                    tooltip=(
                        "How strongly the references guide: none + cfg (text - none) + image_guidance (text and"
                        " references - text). 1 adds what they change once, more exaggerates it, 0 is the picture"
                        " without them; the value of cfg is ordinary guidance by both. Costs one more evaluation of the"
                        " model in every step that reads references."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "guided_model",
                    display_name="model",
                    tooltip="To Apply Stages, KSampler, CFGGuider, BasicGuider or Staged Guider.",
                )
            ],
        )

    @classmethod
    def execute(cls, model, image_guidance) -> io.NodeOutput:
        from ..sampling.image_guidance import apply_image_guidance

        return io.NodeOutput(apply_image_guidance(model, image_guidance))


NODES = [SubjectStagedGuider, SubjectStagedSampler, SubjectImageGuidance]
