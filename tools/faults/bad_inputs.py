"""Draws the inputs of every node with hypothesis, and has the host validate and execute them.

    nox -s faults -- bad_inputs [NODE ...] [--times 1] [--seed 0]

Every case has a node's good inputs with one or two of them replaced by hostile ones, which a widget or another node
may give. Models are the demo's; what a node gives is sampled with. A case is clear where it runs, or is refused by the
host's own checks, or by an error of ours: raised by our own code, its text begun by a node's display name.
`inputs_tried` and `unclear_errors` are counts; the same seed draws the same cases. Last line: one JSON object.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...common.bootstrap import ROOT, start_host
from ...common.console import say
from ..tables import parser

SECONDS, WAIT = 10.0, 60.0  # of a case, that it computes in and that pass; more is a fault
MEMORY = 8 * 2**30  # bytes of address space beyond those at the start
OPTIONS = "dla.heads = 4\ndata.reference_size = 64\nrun.dtype = 'fp32'\nrun.sample_every = 0\nrun.validate_every = 0"
WIDGETS: dict[str, dict[str, Any]] = {  # good values where a node's default is none, or takes long
    "SubjectPromptList": {"prompts": "a fox\na crow"},
    "SubjectTrainDLA": {"data": "subjects", "steps": 1, "resolution": 64, "accumulate": 1, "options": OPTIONS},
    "SubjectStagedSampler": {"steps": 3},
    "SubjectStageKeyframe": {"start": 0.5},
    "SubjectConditioning": {"width": 64, "height": 64, "prompt": "a fox", "size": 64},
    "SubjectAddIdentity": {"size": 64},
    "SubjectIdentityScores": {"dino_folder": "dino-vits16", "clip_folder": "clip", "prompts": "a fox"},
    "SubjectContactSheet": {"side": 64},
}  # fmt: skip
LONG = {  # what rightly takes long
    "SubjectTrainDLA": ("steps", "batch_size", "accumulate", "resolution", "lora_rank"),
    "SubjectStagedSampler": ("steps",),
}
NO_GOOD = {"SubjectMLLMFromCLIP", "SubjectEncodeQwenImage21"}  # the demo has no CLIP, and the second needs a new host
FEW = {"SubjectTrainDLA": 0.5, "SubjectLoadPipeline": 0.5}  # share of the cases: these take seconds


def main(argv: list[str]) -> None:
    """Tries all and prints one JSON object. `argv`: the command line without the file's name."""
    parsed = parser("faults", __name__, __doc__)
    parsed.add_argument("nodes", nargs="*", metavar="NODE", help="classes, such as SubjectEncode; none: all")
    parsed.add_argument("--times", type=float, default=1.0, metavar="X", help="so many times the usual cases (1)")
    parsed.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (0)")
    parsed.add_argument("-v", action="store_true", help="shows how each case ended")
    options = parsed.parse_args(argv)
    start_host(os.environ["COMFYUI_PATH"])
    from ...nodes import TOPICS

    known = [node.__name__ for topic in TOPICS for node in topic.NODES]
    if unknown := sorted(set(options.nodes) - set(known)):
        parsed.error(f"there is no node {', '.join(unknown)}; there are {', '.join(known)}")
    with tempfile.TemporaryDirectory() as folder:
        tried, problems = 0, []
        _limit_memory()
        for case, problem in try_all(Path(folder), options.nodes, options.times, options.seed, options.v):
            tried += 1
            if problem:
                problems.append(f"{case}: {problem}")
    print(json.dumps({"inputs_tried": tried, "unclear_errors": len(problems), "unclear": problems[:100]}))


def _limit_memory() -> None:
    """So that what would take all memory fails, instead of the machine."""
    if sys.platform.startswith("linux"):
        import resource

        has = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY, resource.RLIM_INFINITY))


def try_all(
    folder: Path,
    only: Sequence[str] = (),
    times: float = 1.0,
    seed: int = 0,
    every: bool = False,
) -> Iterator[tuple[str, str]]:
    """(case, what is unclear about its end or "") of every case.

    Args:
        folder: An empty one.
        only: Classes of nodes; empty: all.
        times: Number of cases over the usual.
        seed: Of what is drawn.
        every: Shows how each case ended.
    """
    from ._queue import queue

    with queue(folder) as host:
        for name, node in host.nodes.items():
            if only and name not in only:
                continue
            schema = node.define_schema()
            inputs = schema.inputs
            most = max(1, round(times * FEW.get(name, 1.0) * (20 + 6 * min(len(inputs), 10))))
            for changed, values in [({}, {}), *_draw(schema, most, f"{seed} {name}")]:
                case = f"{name} " + ", ".join(f"{key} = {value}" for key, value in changed.items())
                good = good_inputs(host, name, inputs)
                for key in {"options"} & values.keys():  # beside ours, without which a run takes long
                    values[key] = _behind(good[key], values[key])
                faulthandler.dump_traceback_later(2 * WAIT, exit=True)
                try:
                    tried = host.run(name, good | values)
                finally:
                    faulthandler.cancel_dump_traceback_later()
                problem = unclear(tried, host)
                if not changed and name not in NO_GOOD and tried.end != "ran":
                    problem = f"good inputs do not run: {' '.join(tried.texts)}"
                if problem:
                    say(f"\n{case}: {problem}\n{tried.trace[-1500:]}")
                elif every:
                    say(f"{case}: {tried.end} {' / '.join(tried.texts)[:200]} ({tried.seconds:.2f} s)")
                yield case, problem


def good_inputs(host: Any, name: str, inputs: Any) -> dict[str, Any]:
    """A good value for each input that needs one, and for sockets that have one."""
    from ._queue import Given

    found = {}
    for input_ in inputs:
        good = host.good(input_.io_type)
        value = good if good is not None else WIDGETS.get(name, {}).get(input_.id, getattr(input_, "default", None))
        if good is not None:
            found[input_.id] = Given(value)
        elif value is not None:
            found[input_.id] = value
        elif getattr(input_, "options", None):
            found[input_.id] = input_.options[0]
        elif not input_.optional:
            found[input_.id] = Given(None)
    if name == "SubjectTrainDLA":
        found["name"] = f"run-{len(os.listdir(host.folder / 'output'))}-{host.number}"
    for key in [key for key in found if name == "SubjectConditioning" and key[-1] in "2345"]:
        del found[key]
    return found


def _draw(schema: Any, most: int, seed: str) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """The cases of a node: for one or two inputs, a description of the hostile value and the value."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    from ._values import values_for

    by_name = {input_.id: input_ for input_ in schema.inputs}
    chosen = st.lists(st.sampled_from(sorted(by_name)), min_size=1, max_size=2, unique=True)
    hostile = {key: values_for(input_, bool(schema.is_input_list)) for key, input_ in by_name.items()}
    for key in LONG.get(schema.node_id, ()):
        hostile[key] = hostile[key].filter(lambda pair, most=by_name[key].max: not _between(pair[1], 2, most))
    cases = chosen.flatmap(lambda names: st.fixed_dictionaries({key: hostile[key] for key in names}))
    checks = list(HealthCheck)
    drawn: list[tuple[dict[str, str], dict[str, Any]]] = []

    @seeded(seed)
    @settings(max_examples=most, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=checks)
    @given(cases)
    def draw(case: Mapping[str, tuple[str, Any]]) -> None:
        drawn.append(({key: text for key, (text, _) in case.items()}, {key: value for key, (_, value) in case.items()}))

    run: Callable[[], None] = draw
    run()
    return drawn


def _behind(text: str, value: Any) -> Any:
    """A text of a widget or a link behind another one; other values as they are."""
    from ._queue import Given

    plain = value.value if isinstance(value, Given) else value
    if plain is None:  # as if it were not connected
        return text
    both = f"{text}\n{plain}" if isinstance(plain, str) else plain
    return value._replace(value=both) if isinstance(value, Given) else both


def _between(value: Any, least: float, most: float) -> bool:
    """Whether a widget's or a link's value is a number above `least` and up to `most`."""
    value = getattr(value, "value", value)
    try:
        return least < float(value) <= most
    except (TypeError, ValueError, OverflowError):
        return False


def unclear(tried: Any, host: Any) -> str:
    """Why a case's end is not clear to a person; "" where it is."""
    if tried.computed > SECONDS or tried.seconds > WAIT:
        return f"took {tried.seconds:.0f} s"
    if any(host.outside.iterdir()):
        for path in host.outside.iterdir():
            path.unlink()
        return "wrote outside of the host's folders"
    if tried.end == "ran":
        lost = [number for number, value in enumerate(tried.outputs) if not _finite(value)]
        return f"NaN or infinity at output {lost} without a word" if lost and not tried.warnings else ""
    titles = tuple(node.define_schema().display_name.split(" (")[0] for node in host.nodes.values())
    for text in tried.texts:
        said = text.split(" - ", 1)[-1] if tried.end == "refused" else text
        if not said.startswith(titles) and said != "see above":
            return f"{tried.kind} of {tried.node} has no name of a node: {said[:200]}"
        if len(text) > 5000:
            return f"a text of {len(text)} characters: {text[:100]}"
    file, line = tried.raised
    if tried.kind and not (Path(file).is_relative_to(ROOT) and line.startswith("raise")):
        return f"bare {tried.kind} of {tried.node}: {tried.texts[0][:200]}"
    return ""


def _finite(value: Any) -> bool:
    """Whether all the numbers in an output's value are finite."""
    import torch

    if isinstance(value, torch.Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, list | tuple):
        return all(_finite(item) for item in value)
    if isinstance(value, dict):
        return _finite(value.get("samples", 0)) if "samples" in value else True
    return not isinstance(value, float) or value - value == 0
