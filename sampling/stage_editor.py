"""What the stage editor draws: the server's answer to a graph, so that the browser never computes a schedule itself."""

from collections.abc import Mapping
from typing import Any

from ..common.prompt_graph import Graph
from .clock import REFERENCE_TOKENS
from .queued_run import MOST_STEPS, queued_run, queued_stages
from .sample import flow_sampling, run_sigmas
from .stage_plot import describe
from .stages import Stages, plan

POINTS, BEFORE = 160, 4e-5  # of the curve; and just before a start, beyond the clock's tolerance
MOST_NODES, MOST_TOKENS = 10_000, 2**24
SHIFT = 1.15  # of the noise levels of FLUX.1 and Qwen-Image in the host, until a run says the model's own


def answer(request: Any) -> dict[str, Any]:
    """The schedule of a node and the steps of its run, as the editor draws them.

    Args:
        request: `graph` (the queued graph, of the API's form), `node` (id of an Apply Stages or Stage Schedule) and
            `last`: what the last run of this node said (`sampling/run_progress.py:RunProgress.begin`), or None.

    Returns:
        Positions on the schedule's clock, strengths, and for each number the node and input that hold it; or only
        `error`: why the schedule cannot be drawn.

    Raises:
        ValueError: Where the request is malformed; with the reason.
    """
    checked = _checked(request)
    try:
        return _drawing(*checked)
    except ValueError as error:
        return {"error": str(error)}


def _drawing(graph: Graph, node: str, last: Mapping[str, Any]) -> dict[str, Any]:
    queued = queued_stages(graph, node)
    stages, run, notes = queued.stages, queued_run(graph, node), []
    tokens, sigmas, whole = last["tokens"], [], None
    if run is not None:
        levels = last.get("model_sampling")
        model_sampling = flow_sampling(**(levels or {"shift": SHIFT}))
        sigmas = run_sigmas(model_sampling, run)
        if "sigmas" in graph[node].get("inputs", {}):  # of Apply Stages: the whole that a run is a part of
            whole = run_sigmas(model_sampling, run._replace(first=0, last=MOST_STEPS))
        if not levels and stages.clock.name != "steps":
            notes.append(f"Noise levels are those of shift {SHIFT:g} (FLUX.1, Qwen-Image) until the first run.")
    elif "sigmas" in last:
        sigmas = last["sigmas"]
        notes.append("Steps as of the last run.")
    else:
        notes.append("Connect a sampler to see its steps.")
    steps = plan(stages, sigmas, tokens, whole)
    clock, starts = stages.clock, [key.start for key in stages.keyframes]
    keyframes = [
        {"mllm": key.context, "vae": key.reference, "blend": key.blend, "start": key.start}
        | {"node": typed.start.node, "start_input": typed.start.input}
        | {"mllm_input": typed.context.input, "vae_input": typed.reference.input}
        for key, typed in zip(stages.keyframes, queued.keyframes)
    ]
    starts[0] = clock.start  # the first keyframe holds from the beginning, wherever it starts
    return {
        "clock": {"name": clock.name, "start": clock.start, "end": clock.end},
        "reads": queued.reads,
        "keyframes": keyframes,
        "curve": _curve(stages, starts),
        # thresholds are drawn as they are typed, so the steps of another size are moved instead
        "steps": [[clock.adjust(s.position, REFERENCE_TOKENS**2 // tokens), s.context, s.reference] for s in steps],
        "run": None if run is None else {"node": run.node, "text": run.text},
        "text": describe(stages, steps, tokens) if steps else "",
        "notes": notes,
    }


def _curve(stages: Stages, starts: list[float]) -> list[list[float]]:
    """Points (position, MLLM, VAE) that show every step and every slope of the schedule."""
    clock = stages.clock
    sign = 1 if clock.end > clock.start else -1
    points = {clock.start + (clock.end - clock.start) * index / POINTS for index in range(POINTS + 1)}
    points |= {start + shift * sign * BEFORE for start in starts for shift in (-1, 1)}
    inside = [p for p in points if min(clock.start, clock.end) <= p <= max(clock.start, clock.end)]
    return [[p, *stages.strengths(p)] for p in sorted(inside, key=clock.order)]


def _checked(request: Any) -> tuple[Mapping[str, Mapping], str, dict[str, Any]]:
    """Graph, node and last run of a request. Raises ValueError where one is malformed."""
    if not isinstance(request, Mapping):
        raise ValueError("The request is no JSON object.")
    graph, node, last = request.get("graph"), request.get("node"), request.get("last") or {}
    if not (
        isinstance(graph, Mapping) and len(graph) <= MOST_NODES and all(isinstance(n, Mapping) for n in graph.values())
    ):
        raise ValueError("The request's graph is no object of nodes.")
    if not (isinstance(node, str) and node in graph):
        raise ValueError("The request's node is not in its graph.")
    if not isinstance(last, Mapping):
        raise ValueError("The request's last run is no object.")
    found: dict[str, Any] = {}
    tokens = last.get("tokens", REFERENCE_TOKENS)
    if not (_is_number(tokens) and 1 <= tokens <= MOST_TOKENS):
        raise ValueError("The last run's number of tokens is out of range.")
    found["tokens"] = int(tokens)
    if (levels := last.get("model_sampling")) is not None:
        if not (isinstance(levels, Mapping) and levels.keys() <= {"shift", "multiplier"}):
            raise ValueError("The last run's model sampling is malformed.")
        if not ("shift" in levels and all(_is_number(value) and 0 < value <= 1e4 for value in levels.values())):
            raise ValueError("The last run's model sampling is out of range.")
        found["model_sampling"] = dict(levels)
    if (sigmas := last.get("sigmas")) is not None:
        if not (isinstance(sigmas, list) and 2 <= len(sigmas) <= MOST_STEPS and all(map(_is_number, sigmas))):
            raise ValueError("The last run's sigmas are no list of noise levels.")
        found["sigmas"] = [float(sigma) for sigma in sigmas]
    return graph, node, found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
