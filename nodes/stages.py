"""When the MLLM's tokens and the VAE's reference tokens are read: presets, keyframes, and a look at the plan."""

import logging
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from comfy_api.latest import io, ui

from ..common.prompt_graph import Graph, is_link
from ..loaders.host import show_on_node
from ..sampling.clock import CLOCKS
from ..sampling.stages import BLENDS, PRESETS, Keyframe, Stages, flow_time_on_steps, with_keyframe
from ..sampling.stages import preset as preset_stages
from . import queued_graph
from .marks import Marks
from .schema import Node, schema, with_title
from .schema import Stages as StagesType
from .translation import translate

log = logging.getLogger(__name__)

NUMBERS = ("start", "mllm_strength", "vae_strength", "tau1", "tau2")  # of a Stage Keyframe, and of a preset
STOCK_TIP = "Stock models (Qwen-Image-Edit, UNO, USO, Kontext, OmniGen2): semantics_first. See the help page for why."


def preset_input():
    """Input `preset`, with what each preset does as its tooltip."""
    tips = [*(f"{name}: {found.description}" for name, found in PRESETS.items()), STOCK_TIP]
    return io.Combo.Input("preset", options=list(PRESETS), default="semantics_first", tooltip=" ".join(tips))


def clock_input(more: str = ""):
    """Input `clock`, with what each clock counts, and `more`, as its tooltip."""
    tips = ["What the thresholds count.", *(f"{name}: {clock.tooltip}" for name, clock in CLOCKS.items()), more]
    return io.Combo.Input("clock", options=list(CLOCKS), default="flow_time", tooltip=" ".join(tips).strip())


def _number(name: str, default: float, tooltip: str, most: float = 1.0):
    return io.Float.Input(name, default=default, min=0.0, max=most, step=0.01, tooltip=tooltip)


def schedule_inputs() -> list:
    """Inputs of a ready-made schedule."""
    return [
        preset_input(),
        clock_input(),
        _number(
            "tau1",
            0.95,
            "Where the first stage (MLLM alone) ends, on the clock. The paper's: 0.95 in flow time."
            " On the clock steps it is the share of steps without references, so begin with 0.2."
            " Read by paper, semantics_first and two_stage.",
        ),
        _number(
            "tau2",
            0.85,
            "Where the MLLM's tokens end, on the clock. The paper's: 0.85 in flow time."
            " Read by paper alone; below tau1 on the flow-time clocks, above it on steps.",
        ),
    ]


def _schedule_problems(node_id: str) -> dict[str, str | None]:
    """What is wrong with the schedule of a node, by input, as far as is known."""
    given = queued_graph.queued(node_id)
    if is_link(given.get("stages")):  # takes the place of the widgets
        return {"stages": own_steps_problem(node_id)}
    found = _queued_stages(node_id)
    if isinstance(found, Exception):
        return {"start" if "start" in given else "tau1": str(found)}
    return {"clock": own_steps_problem(node_id)}


def _queued_stages(node_id: str) -> Stages | Exception | None:
    """The schedule that Stage Keyframe or the widgets of a preset make, or why there is none; each node's once.

    None where it is known only when it runs.
    """
    found = queued_graph.once(_no_schedules)
    chain = takewhile(lambda node: node not in found, queued_graph.before(node_id, "previous"))
    for node in reversed(list(chain)):
        previous = queued_graph.queued(node).get("previous")
        before = found.get(str(previous[0])) if is_link(previous) else None
        try:
            # an error before it is on the node that makes it
            found[node] = _schedule_of(queued_graph.queued(node), before if isinstance(before, Stages) else None)
        except (TypeError, ValueError) as error:
            found[node] = error
    return found[str(node_id)]


def _no_schedules(_: Graph) -> dict[str, Stages | Exception | None]:
    """Schedules by node of a graph, before any is known."""
    return {}


def _schedule_of(given: Mapping[str, Any], before: Stages | None) -> Stages | None:
    """The schedule of a node with these inputs, behind another; None where it is known only when it runs."""
    keyframe = "start" in given
    names = (*NUMBERS[:3], "blend", "clock") if keyframe else ("preset", "clock", *NUMBERS[3:])
    values = [queued_graph.number(given.get(name)) if name in NUMBERS else given.get(name) for name in names]
    if any(value is None or isinstance(value, list | dict) for value in values):
        return None
    if not keyframe:
        return preset_stages(*values)
    return with_keyframe(before, Keyframe(*values[:-1]), values[-1])


def own_steps_problem(node_id: str) -> str | None:
    """Why the sampler of a node, or one behind it, does not go with its schedule's clock; None where it does."""
    given, sampler = queued_graph.queued(node_id), queued_graph.own_steps_behind(node_id)
    linked = given.get("stages")
    clock = (queued_graph.queued(linked[0]) if is_link(linked) else given).get("clock")
    if sampler is None or clock != "steps":
        return None
    return f"the clock is steps, but {sampler} chooses its own: choose the clock flow_time, or another sampler."


def _schedule(node: type[Node], preset: str, clock: str, tau1: float, tau2: float) -> Stages:
    """The preset's schedule, with a warning on the node where its thresholds look like those of another clock."""
    if warning := flow_time_on_steps(preset, clock, tau1):
        log.warning("%s", with_title(node, warning))
        show_on_node(f"Warning: {warning}", node.hidden.unique_id if node.hidden else None)
    return preset_stages(preset, clock, tau1, tau2)


class SubjectApplyStages(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "stages",
            words="consistent character",
            node_id="SubjectApplyStages",
            display_name="Apply Stages",
            description=(
                "Staged denoising in your own workflow: put this node between the model and any sampler or guider."
                " The picture begins from the prompt and the MLLM's tokens; the VAE's tokens of the references come in"
                " where the stage says."
            ),
            search_aliases=[
                "stages",
                "staged denoising",
                "multi-stage denoising",
                "reference schedule",
                "reference strength",
                "delay reference",
                "consistent character",
                "kontext",
                "uno",
                "model patch",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The DiT, with LoRAs and patches of your choice. It is not changed itself."
                ),
                *schedule_inputs(),
                StagesType.Input(
                    "stages",
                    optional=True,
                    tooltip="A schedule from Stage Schedule or Stage Keyframe; it takes the place of the four widgets.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip=(
                        "For the clock steps in a run that is split (KSampler Advanced, SplitSigmas): the whole"
                        " schedule of sigmas, as of Basic Scheduler. Else leave it open."
                    ),
                ),
            ],
            outputs=[io.Model.Output("staged_model", display_name="model", tooltip="To any sampler or guider.")],
            hidden=[io.Hidden.unique_id],
        )

    validate_inputs = Marks(_schedule_problems)

    @classmethod
    def execute(cls, model, preset, clock, tau1, tau2, stages=None, sigmas=None) -> io.NodeOutput:
        from ..sampling.patch import apply_stages

        return io.NodeOutput(apply_stages(model, stages or _schedule(cls, preset, clock, tau1, tau2), sigmas))


class SubjectStageSchedule(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "stages",
            node_id="SubjectStageSchedule",
            display_name="Stage Schedule",
            description=(
                "A ready-made schedule: when the MLLM's tokens are on, and when the VAE's. Stock models want"
                " semantics_first; weights trained in two stages as in the paper want paper. Look at the outcome with"
                " Stage Preview."
            ),
            search_aliases=["multi-stage denoising", "stages", "condition schedule", "timestep schedule"],
            inputs=schedule_inputs(),
            outputs=[
                StagesType.Output(
                    "stages",
                    display_name="stages",
                    tooltip="To Apply Stages, Staged Sampler, Staged Guider, Stage Preview or Add Identity.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    validate_inputs = Marks(_schedule_problems)

    @classmethod
    def execute(cls, preset, clock, tau1, tau2) -> io.NodeOutput:
        return io.NodeOutput(_schedule(cls, preset, clock, tau1, tau2))


class SubjectStageKeyframe(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "stages",
            node_id="SubjectStageKeyframe",
            display_name="Stage Keyframe",
            description=(
                "One point of a schedule of your own: from here on, this much MLLM and this much VAE. Chain several, or"
                " add one to a preset."
            ),
            search_aliases=["stage custom", "condition keyframe", "strength schedule"],
            inputs=[
                _number(
                    "start",
                    1.0,
                    "Where this keyframe begins, on the clock. On the flow-time clocks 1 is the beginning, on steps 0.",
                ),
                _number(
                    "mllm_strength",
                    1.0,
                    "Strength of the MLLM's context tokens from here on. 0 removes them, 1 is the model's own; between"
                    " costs speed.",
                    most=2.0,
                ),
                _number(
                    "vae_strength",
                    1.0,
                    "Strength of the reference latents from here on, multiplied by each reference's own. 0 removes"
                    " them.",
                    most=2.0,
                ),
                io.Combo.Input(
                    "blend",
                    options=list(BLENDS),
                    default="hold",
                    tooltip=(
                        "hold: these strengths until the next keyframe. linear: a straight line to the next keyframe's."
                    ),
                ),
                clock_input("All keyframes of a chain use one clock."),
                StagesType.Input("previous", optional=True, tooltip="The schedule to add this keyframe to."),
            ],
            outputs=[
                StagesType.Output(
                    "stages",
                    display_name="stages",
                    tooltip=(
                        "To another Stage Keyframe, Apply Stages, Staged Sampler, Staged Guider, Stage Preview or Add"
                        " Identity."
                    ),
                )
            ],
        )

    validate_inputs = Marks(_schedule_problems)

    @classmethod
    def execute(cls, start, mllm_strength, vae_strength, blend, clock, previous=None) -> io.NodeOutput:
        return io.NodeOutput(with_keyframe(previous, Keyframe(start, mllm_strength, vae_strength, blend), clock))


class SubjectStagePreview(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "stages",
            node_id="SubjectStagePreview",
            display_name="Stage Preview",
            description=(
                "Which steps of this sampler's schedule read what, as a plot and as text. Costs nothing: no model is"
                " run."
            ),
            search_aliases=["plot stages", "schedule plot"],
            is_output_node=True,
            inputs=[
                StagesType.Input("stages", tooltip="The schedule to look at."),
                io.Model.Input(
                    "model", tooltip="The model that will sample: it turns the sampler's sigmas into flow time."
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip=(
                        "The sampler's sigmas, from Basic Scheduler or any other scheduler node. Left open: those of"
                        " the sampler that the model or the schedule is connected to in this workflow."
                    ),
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip=(
                        "The latent to be sampled: its size gives the token count for the clock flow_time_resolution."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output("plot", display_name="plot", tooltip="Strength of MLLM and VAE over the steps."),
                io.String.Output("text", display_name="text", tooltip="The same, one line per stage."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        return float("nan")  # settings of a sampler that is no input of this node may have changed

    @classmethod
    def execute(cls, stages, model, sigmas=None, latent=None) -> io.NodeOutput:
        from ..sampling.sample import sigmas_of_graph
        from ..sampling.stage_plot import preview

        if sigmas is None:
            sigmas = sigmas_of_graph(model, cls.hidden.prompt or {}, str(cls.hidden.unique_id))
        plot, text = preview(stages, model, sigmas, latent)
        return io.NodeOutput(plot, text, ui=ui.PreviewImage(plot, cls=cls))


def draw_stages(request) -> dict:
    """The server's answer to the stage editor, its texts in the editor's language."""
    from ..sampling.stage_editor import answer

    found = answer(request)
    notes = {"notes": [translate(note) for note in found["notes"]]} if "notes" in found else {}
    return found | notes | {key: translate(found[key]) for key in ("text", "error") if key in found}


NODES = [SubjectApplyStages, SubjectStageSchedule, SubjectStageKeyframe, SubjectStagePreview]
