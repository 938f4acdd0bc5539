"""What a graph in the API's form says of a run before it starts: its stage schedule, and its sampler's steps."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..common.prompt_graph import Graph, downstream, inputs_of, is_link, upstream
from .stages import PRESETS, Keyframe, Stages, preset, with_keyframe

PRESET_NODES, KEYFRAME_NODE = ("SubjectApplyStages", "SubjectStageSchedule"), "SubjectStageKeyframe"
MOST_STEPS = 10_000  # the host's samplers take no more
MOST_WHOLE = 2**53  # what a float holds


class Number(NamedTuple):
    """Where a number of the schedule is typed: a node's id and its input; "" for a number that no input holds."""

    node: str
    input: str


class QueuedKeyframe(NamedTuple):
    """Where the numbers of one keyframe are typed."""

    start: Number
    context: Number
    reference: Number


class QueuedStages(NamedTuple):
    """A schedule, where each keyframe is typed, and the inputs of each node that are read."""

    stages: Stages
    keyframes: list[QueuedKeyframe]
    reads: dict[str, list[str]]  # thresholds that the preset of a node reads, by the node's id


class QueuedRun(NamedTuple):
    """Settings of the sampler or scheduler node that a run takes its steps from."""

    node: str
    scheduler: str
    steps: int
    sampler: str = "euler"
    denoise: float = 1.0
    first: int = 0  # of a run that is a part of the steps
    last: int = MOST_STEPS

    @property
    def text(self) -> str:
        """The settings in a few words."""
        part = f", {self.first} to {min(self.last, self.steps)}" if self.first or self.last < self.steps else ""
        return f"{self.steps} steps{part}, {self.scheduler}" + (f", denoise {self.denoise:g}" * (self.denoise < 1))


def queued_stages(graph: Graph, node: str) -> QueuedStages:
    """The schedule that a node of ours holds or is given.

    Args:
        graph: The queued graph.
        node: Id of an Apply Stages, Stage Schedule or Stage Keyframe.

    Raises:
        ValueError: Where the schedule comes from another kind of node, or is none.
    """
    chain: dict[str, None] = {}  # in order
    while True:
        if node in chain or node not in graph:
            raise ValueError("The schedule is connected to a node that is not in this graph, or to itself.")
        chain[node] = None
        kind, inputs = graph[node].get("class_type"), inputs_of(graph, node)
        if kind not in (*PRESET_NODES, KEYFRAME_NODE):
            raise ValueError(f"The schedule comes from {kind}, which makes it when it runs.")
        link = inputs.get("previous" if kind == KEYFRAME_NODE else "stages")
        if not is_link(link):
            break
        node = str(link[0])
    stages, keyframes, reads = None, [], {}
    for node in reversed(chain):
        kind, inputs = graph[node]["class_type"], inputs_of(graph, node)
        if kind == KEYFRAME_NODE:
            start, context, reference = (
                _number(graph, node, name) for name in ("start", "mllm_strength", "vae_strength")
            )
            blend, clock = _text(graph, node, "blend"), _text(graph, node, "clock")
            stages = with_keyframe(stages, Keyframe(start, context, reference, blend), clock)
            names = [name if _typed(inputs, name) else "" for name in ("start", "mllm_strength", "vae_strength")]
            keyframes.append(QueuedKeyframe(*(Number(node, name) for name in names)))
        elif stages is None:
            taus = [_number(graph, node, name) for name in ("tau1", "tau2")]
            name = _text(graph, node, "preset")
            stages = preset(name, _text(graph, node, "clock"), *taus)
            thresholds = ["tau1", "tau2"][: len(PRESETS[name].strengths) - 1]
            drawn = thresholds[: len(stages.keyframes) - 1]  # equal ones are one boundary, and both are read
            names = ["", *(threshold if _typed(inputs, threshold) else "" for threshold in drawn)]
            keyframes = [QueuedKeyframe(Number(node, name), Number(node, ""), Number(node, "")) for name in names]
            reads[node] = ["preset", "clock", *thresholds]
        else:
            reads[node] = []  # Apply Stages with a schedule: its own widgets are not read
    assert stages is not None
    return QueuedStages(stages, keyframes, reads)


def queued_run(graph: Graph, node: str) -> QueuedRun | None:
    """The steps of the first sampler behind a node, or of the scheduler that gives that sampler its sigmas.

    Args:
        graph: The queued graph.
        node: Id of the node, e.g. an Apply Stages.

    Returns:
        None where no such node is connected, or its settings come out of other nodes.
    """
    for found in downstream(graph, node):
        if (run := _settings(graph, found)) is not None:
            return run
        sigmas = inputs_of(graph, found).get("sigmas")
        if is_link(sigmas) and graph[found].get("class_type") not in PRESET_NODES:
            for source in upstream(graph, sigmas[0]):
                if (run := _settings(graph, source)) is not None:
                    return run
    return None


def queued_run_of_inputs(graph: Graph, node: str, *inputs: str) -> QueuedRun | None:
    """`queued_run` of the nodes that are connected to these inputs of a node."""
    links = [inputs_of(graph, node).get(name) for name in inputs]
    found = (queued_run(graph, str(link[0])) for link in links if is_link(link))
    return next((run for run in found if run is not None), None)


def _settings(graph: Graph, node: str) -> QueuedRun | None:
    """Of a sampler or scheduler node whose steps and scheduler are typed or come from a number node; else None."""
    inputs = inputs_of(graph, node)
    if not {"steps", "scheduler"} <= inputs.keys():
        return None
    try:
        steps, scheduler = _number(graph, node, "steps"), _text(graph, node, "scheduler")
        names = {"denoise": 1.0, "start_at_step": 0, "end_at_step": MOST_STEPS}
        denoise, first, last = (_number(graph, node, n) if n in inputs else default for n, default in names.items())
        sampler = _text(graph, node, "sampler_name") if "sampler_name" in inputs else "euler"
    except ValueError:
        return None
    if not (1 <= steps <= MOST_STEPS and steps / MOST_STEPS <= denoise <= 1 and 0 <= first < last):
        return None
    return QueuedRun(node, scheduler, int(steps), sampler, denoise, int(first), int(last))


def _typed(inputs: Mapping[str, Any], name: str) -> bool:
    return not is_link(inputs.get(name))


def _value(graph: Graph, node: str, name: str) -> Any:
    """What is typed at an input, or at `value` of the node that is connected to it, as of the host's Float and Int."""
    value = inputs_of(graph, node).get(name)
    return inputs_of(graph, value[0]).get("value") if is_link(value) else value


def _number(graph: Graph, node: str, name: str) -> float:
    value = _value(graph, node, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} comes from a node that computes it when it runs.")
    if isinstance(value, int) and abs(value) > MOST_WHOLE:
        raise ValueError(f"{name} is out of range.")
    return value


def _text(graph: Graph, node: str, name: str) -> str:
    value = _value(graph, node, name)
    if not isinstance(value, str):
        raise ValueError(f"{name} comes from a node that computes it when it runs.")
    return value
