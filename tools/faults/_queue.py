"""Small models of each kind, and graphs that the host's own code validates and executes in this process."""

from __future__ import annotations

import asyncio
import inspect
import linecache
import logging
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

GIVE, GIVE_LIST, TAKE = "FaultsGive", "FaultsGiveList", "FaultsTake"  # nodes before and behind the one that is tried
SIDE = 64  # px of good pictures


class _Any(str):
    """A socket's type that goes with every other, as packs define it."""

    def __ne__(self, other: object) -> bool:
        return False

    __eq__, __hash__ = str.__eq__, str.__hash__


ANY = _Any("*")
_given: dict[str, Any] = {}  # by key, what GIVE gives
_taken: list[Any] = []  # what came to TAKE


class _Give:
    RETURN_TYPES, FUNCTION, CATEGORY = (ANY,), "give", "faults"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"key": ("STRING", {})}}

    def give(self, key: str) -> tuple[Any]:
        return (_given[key],)


class _GiveList(_Give):
    OUTPUT_IS_LIST = (True,)


class _Take:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE, INPUT_IS_LIST = (), "take", "faults", True, True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"optional": {f"value_{number}": (ANY, {}) for number in range(9)}}

    def take(self, **values: Any) -> dict[str, Any]:
        _taken.extend(values.values())
        return {}


class Given(NamedTuple):
    """A value that a node before gives; plain values are those of widgets.

    Attributes:
        value: What it gives, or with `listed` the items of its list.
        listed: Whether its output is a list.
    """

    value: Any
    listed: bool = False


class Tried(NamedTuple):
    """What the host made of a graph.

    Attributes:
        end: "refused" before it ran, "error", or "ran".
        texts: The host's texts of what is wrong.
        node: Class of the node that failed.
        kind: Class of the error that ended it; "" for one of the host's own checks.
        raised: (file, line of source) of the place where it was raised.
        trace: Its traceback.
        outputs: What came out, of what was sampled with it, too.
        warnings: What was logged as a warning or worse.
        seconds: Time that it took.
        computed: Seconds that this process computed in.
    """

    end: str
    texts: tuple[str, ...] = ()
    node: str = ""
    kind: str = ""
    raised: tuple[str, str] = ("", "")
    trace: str = ""
    outputs: tuple[Any, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    computed: float = 0.0


class Queue:
    """The host's queue with the pack's nodes, small models, and folders of its own in `folder`."""

    def __init__(self, folder: Path):
        import torch
        from comfy_execution import caching  # noqa: F401  (the host's parts that execution needs)

        from ...demo.family import layout
        from ...loaders import folders
        from ...loaders.orient_anything import model as orientation
        from ...loaders.pipeline import load_pipeline
        from ...nodes import TOPICS
        from ...sampling.stages import preset
        from ...tests.small.measure import build_measures, published_state
        from ...tests.small.training import paint_subjects

        self.folder, self.number = folder, 0
        self.outside = folder / "outside"  # of every folder that is configured
        self.outside.mkdir()
        self.nodes = {node.__name__: node for topic in TOPICS for node in topic.NODES}
        folders.register()
        names = layout.NAMES
        models = load_pipeline(names["diffusion_models"], names["vae"], names["mllm"], names["dla"])
        self.model, self.vae, self.mllm, self.dla = models
        with patch.dict(orientation.SIZES, {384: ("small", 1)}), torch.random.fork_rng():
            torch.manual_seed(0)
            self.orientation = orientation.OrientationModel(published_state(384, 1, 180), "small.safetensors")
            self.image = torch.rand(1, SIDE, SIDE, 3)
            values = {
                "pooled_output": torch.rand(1, 16),
                "reference_latents": [torch.rand(1, 16, SIDE // 8, SIDE // 8)],
            }
            self.conditioning = [[torch.rand(1, 9, layout.CONTEXT_WIDTH), values]]
        with torch.inference_mode():
            self.features = self.mllm.encode("a fox", [self.image[0]])
        self.latent = {"samples": torch.zeros(1, 16, SIDE // 8, SIDE // 8)}
        self.sigmas, self.stages = torch.tensor([1.0, 0.9, 0.5, 0.0]), preset("paper")
        paint_subjects(folder / "input" / "subjects", subjects=3)
        self.models = build_measures(folder / "models", _comfyui())

    def good(self, kind: str) -> Any:
        """A good value of a socket's type; None where there is none."""
        import torch

        return {
            "MODEL": self.model, "VAE": self.vae, "MLLM": self.mllm, "MLLM_FEATURES": self.features, "DLA": self.dla,
            "IMAGE": self.image, "MASK": torch.ones(1, SIDE, SIDE), "LATENT": self.latent, "STAGES": self.stages,
            "CONDITIONING": self.conditioning, "SIGMAS": self.sigmas, "ORIENTATION_MODEL": self.orientation,
        }.get(kind)  # fmt: skip

    def run(self, name: str, values: Mapping[str, Any]) -> Tried:
        """Queues a node with these inputs, and what samples with its outputs behind it.

        Args:
            name: The node's class.
            values: By input: widgets' values, and `Given` for what is linked.
        """
        _given.clear()
        _taken.clear()
        prompt: dict[str, Any] = {}
        self.number = number = self.number + 1

        def give(key: str, given: Given) -> list[Any]:
            node = f"give {key}"
            _given[f"{number} {key}"] = given.value
            prompt[node] = _entry(GIVE_LIST if given.listed else GIVE, key=f"{number} {key}")
            return [node, 0]

        inputs = {key: give(key, value) if isinstance(value, Given) else value for key, value in values.items()}
        prompt["tried"] = _entry(name, **inputs)
        kinds = [output.io_type for output in self.nodes[name].define_schema().outputs]
        taken = {f"value_{position}": ["tried", position] for position in range(len(kinds))}
        for position, kind in enumerate(kinds):
            if kind in ("MODEL", "GUIDER", "CONDITIONING", "STAGES") and name != "SubjectThresholdSweep":
                prompt |= _sampling(kind, ["tried", position], position, lambda k: give(k, Given(self.good(k))))
                taken[f"value_{len(taken)}"] = [f"sampled {position}", 0]
        prompt["take"] = _entry(TAKE, **taken)
        warnings: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)
        started, before = time.perf_counter(), time.process_time()
        try:
            tried = _execute(prompt)
        finally:
            logging.getLogger().removeHandler(handler)
        times = {"seconds": time.perf_counter() - started, "computed": time.process_time() - before}
        return tried._replace(outputs=tuple(_taken), warnings=tuple(warnings), **times)


def _entry(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _sampling(kind: str, link: list[Any], position: int, good: Any) -> dict[str, Any]:
    """Nodes that sample three steps with an output of a type."""
    stages = {"preset": "semantics_first", "clock": "flow_time", "tau1": 0.95, "tau2": 0.85}
    sampler = {"seed": 1, "steps": 3, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    linked = {name: good(name) for name in ("MODEL", "CONDITIONING", "LATENT", "SIGMAS")} | {kind: link}
    out, new = f"sampled {position}", {}
    if kind == "GUIDER":
        new["noise"] = _entry("RandomNoise", noise_seed=1)
        new["sampler"] = _entry("KSamplerSelect", sampler_name="euler")
        parts = {"noise": ["noise", 0], "sampler": ["sampler", 0], "sigmas": linked["SIGMAS"]}
        new[out] = _entry("SamplerCustomAdvanced", guider=link, latent_image=linked["LATENT"], **parts)
        return new
    model = linked["MODEL"]
    if kind != "MODEL":
        more = {"stages": link} if kind == "STAGES" else {}
        new[f"staged {position}"] = _entry("SubjectApplyStages", model=model, **stages, **more)
        model = [f"staged {position}", 0]
    conditions = {"positive": linked["CONDITIONING"], "negative": linked["CONDITIONING"]}
    new[out] = _entry("KSampler", model=model, **conditions, latent_image=linked["LATENT"], **sampler)
    return new


def _execute(prompt: dict[str, Any]) -> Tried:
    """Validates and executes a graph as the server does with a request."""
    import execution

    from ...nodes import queued_graph

    job = "faults"

    async def validate() -> Any:
        queued_graph.remember({"prompt": prompt})
        takes = len(inspect.signature(execution.validate_prompt).parameters)
        return await execution.validate_prompt(*(job, prompt, None)[:takes])

    valid, _, outputs, errors = asyncio.run(validate())
    if not valid:
        found = [(node["class_type"], error) for node in errors.values() for error in node["errors"]]
        ours = [(kind, error) for kind, error in found if "exception" in error["type"] or "custom" in error["type"]]
        texts = tuple(error["details"] for _, error in ours)
        trace = "".join(line for _, error in ours for line in error["extra_info"].get("traceback", ()))
        kinds = [error["extra_info"].get("exception_type", "") for _, error in ours]
        frames = [error["extra_info"].get("traceback", []) for _, error in ours]
        raised = _place(frames[0][-1]) if frames and frames[0] else ("", "")
        return Tried("refused", texts, ours[0][0] if ours else "", kinds[0] if kinds else "", raised, trace)
    server = SimpleNamespace(client_id=None, last_node_id=None, last_prompt_id=None, send_sync=lambda *_: None)
    queue = execution.PromptExecutor(server, cache_args={"lru": 0, "ram": 0, "ram_inactive": 0})
    errors_seen: list[BaseException] = []
    handle = queue.handle_execution_error

    def note(*arguments: Any, **named: Any) -> Any:
        errors_seen.extend(one for one in (*arguments, *named.values()) if isinstance(one, BaseException))
        return handle(*arguments, **named)

    queue.handle_execution_error = note
    with _quiet():
        queue.execute(prompt, job, {}, outputs)
    failed = [data for event, data in queue.status_messages if event == "execution_error"]
    if not failed:
        return Tried("ran")
    data, error = failed[0], errors_seen[0] if errors_seen else None
    frames = traceback.extract_tb(error.__traceback__) if error else []
    place = (frames[-1].filename, frames[-1].line or "") if frames else ("", "")
    trace = "".join(traceback.format_exception(error)) if error else "".join(data["traceback"])
    texts = (str(data["exception_message"]).strip(),)
    return Tried("error", texts, data["node_type"], data["exception_type"], place, trace)


def _place(frame: str) -> tuple[str, str]:
    """File and line of source of a frame that is written as in a traceback."""
    with suppress(IndexError, ValueError):
        head, *lines = frame.strip().split("\n")
        file, number = head.split('"')[1], int(head.split("line ")[1].split(",")[0])
        return file, linecache.getline(file, number).strip()
    return "", ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracebacks that the host logs."""

    def ours(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or "Exception during processing" not in record.getMessage()

    handlers = logging.getLogger().handlers
    for handler in handlers:
        handler.addFilter(ours)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(ours)


def _comfyui() -> Path:
    import folder_paths

    return Path(folder_paths.__file__).parent


@contextmanager
def queue(folder: Path) -> Iterator[Queue]:
    """A queue in an empty folder; the host's folders are its own again afterwards."""
    import comfy_extras.nodes_custom_sampler as custom
    import execution
    import folder_paths

    kinds = ("input", "output", "temp", "user")
    before = {kind: getattr(folder_paths, f"get_{kind}_directory")() for kind in kinds}
    for kind in kinds:
        (folder / kind).mkdir()
        getattr(folder_paths, f"set_{kind}_directory")(str(folder / kind))
    listed = {kind: (list(paths), set(ends)) for kind, (paths, ends) in folder_paths.folder_names_and_paths.items()}
    try:
        for kind in ("dla", "loras", "orientation", "clip_vision", "mllm"):
            (folder / "models" / kind).mkdir(parents=True)
            folder_paths.add_model_folder_path(kind, str(folder / "models" / kind), is_default=True)
        made = Queue(folder)
        samplers = (custom.KSamplerSelect, custom.SamplerCustomAdvanced, custom.RandomNoise)
        classes: dict[str, Any] = {node.__name__: node for node in samplers}
        classes |= made.nodes | {GIVE: _Give, GIVE_LIST: _GiveList, TAKE: _Take}
        with patch.dict(execution.nodes.NODE_CLASS_MAPPINGS, classes):
            yield made
    finally:
        _given.clear()  # models that end with the interpreter end in a traceback of the host's
        _taken.clear()
        folder_paths.folder_names_and_paths.clear()
        folder_paths.folder_names_and_paths.update(listed)
        folder_paths.filename_list_cache.clear()
        for kind, path in before.items():
            getattr(folder_paths, f"set_{kind}_directory")(path)
