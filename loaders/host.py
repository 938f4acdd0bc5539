"""Every reach into the host that depends on its version or on the names of its modules, once.

`import nodes` here is the host's nodes.py; this pack's folder of that name is `subject_dla.nodes`.
"""

import inspect
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..common.dtypes import DTYPES
from ..common.untrusted_json import JSONError, parse_json, read_json
from .protocols import CLIP, VAE, Model

# %s: a class of the host's
IGNORES_REFERENCES = (
    "the diffusion model %s, as this ComfyUI runs it, does not read reference latents: they have no effect. Update "
    "ComfyUI, or choose a model for reference images (docs/backbones.md)."
)
NO_TAGS = str.maketrans("<>", "‹›")
# What the host and transformers raise for files that they do not check.
UNCHECKED = (RuntimeError, LookupError, ValueError, TypeError, ArithmeticError, AttributeError, AssertionError,
             MemoryError, EOFError, pickle.UnpicklingError)  # fmt: skip
SETTINGS = "comfy.settings.json"  # of a user of the editor
_request: ContextVar[Any] = ContextVar("request", default=None)  # to the server, that this task answers
# What the host's loader calls the options of its Load Diffusion Model.
DIT_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": DTYPES["fp8_e4m3fn"]},
    "fp8_e4m3fn_fast": {"dtype": DTYPES["fp8_e4m3fn"], "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": DTYPES["fp8_e5m2"]},
}


@contextmanager
def file_errors(problem: str, way_out: str = "", error: type[ValueError] = ValueError) -> Iterator[None]:
    """What is raised inside for a file, but for no memory, becomes an `error` that says the problem and why.

    Errors of a class of ours stay as they are.
    """
    import comfy.model_management

    try:
        yield
    except UNCHECKED as found:
        ours = error is not ValueError and isinstance(found, error)
        if ours or isinstance(found, comfy.model_management.OOM_EXCEPTION):
            raise
        reason = f"{type(found).__name__}: {' '.join(str(found).split())[:300]}".rstrip(".: ")
        if isinstance(found, pickle.UnpicklingError):  # torch's own text advises to have the code run
            reason = "it is no file of tensors alone, and code in a file is not run"
        raise error(f"{problem} ({reason}).{way_out}") from found


def make_patcher(module: nn.Module, load_device, offload_device, state: Mapping[str, Tensor] | None = None):
    """The host's patcher around a module, with `state` loaded; where the host has it, the one for dynamic VRAM."""
    import comfy.model_patcher

    patcher_class = vars(comfy.model_patcher).get("CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    patcher = patcher_class(module, load_device=load_device, offload_device=offload_device)
    if state is not None:
        module.load_state_dict(state, assign=is_dynamic(patcher))  # such leaves have no weights to copy into
        module.eval().requires_grad_(False)
    return patcher


def is_dynamic(patcher: Any) -> bool:
    """Whether weights come and go as they are used (dynamic VRAM), which later hosts do."""
    return getattr(patcher, "is_dynamic", lambda: False)()


def load_model_weights(patcher: Any, state_dict: dict[str, Tensor]) -> None:
    """Weights of a DiT into the host's model, as its own loader puts them."""
    model, dynamic = patcher.model, is_dynamic(patcher)
    assign = {"assign": dynamic} if "assign" in inspect.signature(model.load_model_weights).parameters else {}
    model.load_model_weights(state_dict, "", **assign)
    if not dynamic:
        model.to(patcher.offload_device)


def load_text_encoder(clip: CLIP, tokens: dict) -> None:
    """Puts a CLIP on its device; later hosts estimate memory from the tokens."""
    clip.load_model(*([tokens] if inspect.signature(clip.load_model).parameters else []))


def mentions(module: nn.Module, method: str) -> bool:
    """Whether the file of the host's class compares with this `reference_latents_method`, rather than ignore it."""
    return f'"{method}"' in _source(module)


def reads_references(module: nn.Module) -> bool:
    """Whether the file of the host's class knows reference latents; one that does not ignores them."""
    return "ref_latents" in _source(module)


def _source(module: nn.Module) -> str:
    """Text of the file of a module's class; empty where it has none."""
    source = sys.modules.get(type(module).__module__)
    return "" if source is None else inspect.getsource(source)


def show_on_node(text: str, node_id: str | None) -> None:
    """Shows a text at the bottom of a node in the editor that queued it; without a server nothing happens.

    The editor takes it for HTML, and file names of a workflow from elsewhere may be in it: no tag is left.
    """
    server = _server()
    if server is not None and node_id is not None:
        server.send_progress_text(text.translate(NO_TAGS), node_id, sid=server.client_id)


def on_prompt(handler: Callable[[Any], Any]) -> None:
    """Has every request to queue a graph pass through the handler, before it is validated; once each handler."""
    server = _server()
    if server is not None and handler not in server.on_prompt_handlers:
        server.add_on_prompt_handler(handler)


def editor_of_run() -> Callable[[str, dict[str, Any]], None] | None:
    """A function that sends an event to the editor that queued the running graph; None where no editor did."""
    server = _server()
    if server is None or server.client_id is None:
        return None
    client = server.client_id
    return lambda event, data: server.send_sync(event, data, client)


def answer_requests(path: str, answer: Callable[[Any], dict[str, Any]]) -> None:
    """Answers POST requests of JSON at a path of the server, a ValueError by status 400; without a server none."""
    server = _server()
    if server is None:
        return
    from aiohttp import web

    async def handle(request: Any) -> Any:
        try:
            return web.json_response(answer(parse_json(await request.read(), expected=None)))
        except JSONError as error:
            return web.json_response({"error": f"The request {error}."}, status=400)
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)

    server.routes.post(path)(handle)


def executing_node() -> str | None:
    """Id of the node that runs; None outside the queue."""
    utils = sys.modules.get("comfy_execution.utils")
    context = None if utils is None else utils.get_executing_context()
    return None if context is None else context.node_id


def validated_node() -> str | None:
    """Id of the node whose `validate_inputs` the host looks up; None elsewhere, and where that cannot be known.

    The host calls `executing_node` of a node only after it has read which inputs that takes; its own function knows.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "validate_inputs" and "unique_id" in frame.f_locals:
            return str(frame.f_locals["unique_id"])
        frame = frame.f_back
    return None


def remember_requests() -> None:
    """Keeps each request to the server while it is answered, for `editor_language`; once."""
    middlewares = getattr(getattr(_server(), "app", None), "middlewares", None)
    if middlewares is None or _remember in middlewares:
        return
    _remember.__middleware_version__ = 1  # type: ignore[attr-defined]  # as aiohttp marks those of its newer form
    middlewares.append(_remember)


async def _remember(request: Any, handler: Callable[[Any], Any]) -> Any:
    _request.set(request)
    return await handler(request)


def editor_language() -> str:
    """The language of the editor of the user who asks, such as "zh"; English ("en") where that is not known.

    The host keeps settings by user, and says of requests alone whose they are (--multi-user). Where the user has chosen
    no language, the editor takes the browser's. In a run it is that of the only user.
    """
    import folder_paths

    request, path = _request.get(), Path(folder_paths.get_user_directory()) / "default" / SETTINGS
    try:
        if request is not None and (manager := getattr(_server(), "user_manager", None)) is not None:
            path = Path(manager.get_request_user_filepath(request, SETTINGS, create_dir=False))
        found = read_json(path).get("Comfy.Locale")
    except (ValueError, TypeError, KeyError):  # no settings yet, damaged ones, or an unknown user
        found = None
    if found is None and request is not None:
        found = request.headers.get("Accept-Language", "").split(",")[0].split(";")[0].split("-")[0].strip()
    return found if isinstance(found, str) and found else "en"


def _server() -> Any:
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def load_vae(name: str) -> VAE:
    """VAE of a file under `models/vae` (or one of the host's tiny ones, e.g. "taef1"), by the host's Load VAE."""
    import nodes

    return nodes.VAELoader().load_vae(name)[0]


def load_clip(name: str, kind: str) -> CLIP:
    """CLIP of one file under `models/text_encoders`, by the host's Load CLIP; `kind`: its type, e.g. "qwen_image"."""
    import nodes

    return nodes.CLIPLoader().load_clip(name, kind)[0]


def load_dual_clip(first: str, second: str, kind: str) -> CLIP:
    """CLIP of two files under `models/text_encoders`, by the host's DualCLIPLoader; `kind`: its type, e.g. "flux"."""
    import nodes

    return nodes.DualCLIPLoader().load_clip(first, second, kind)[0]


def fit_latent(model: Model, latent: dict) -> Tensor:
    """Samples of a LATENT with the model's channels and downscale if they are empty; later hosts take ratios."""
    from comfy.sample import fix_empty_latent_channels

    takes = len(inspect.signature(fix_empty_latent_channels).parameters) - 2
    ratios = [latent.get(key) for key in ("downscale_ratio_spacial", "downscale_ratio_temporal")]
    return fix_empty_latent_channels(model, latent["samples"], *ratios[: max(takes, 0)])


def to_intermediate(samples: Tensor) -> Tensor:
    """Samples on the device, and on later hosts in the dtype, that the host keeps LATENTs in."""
    import comfy.model_management

    samples = samples.to(comfy.model_management.intermediate_device())
    dtype = vars(comfy.model_management).get("intermediate_dtype")
    return samples if dtype is None else samples.to(dtype())


def exact_attention() -> Callable[..., Tensor]:
    """PyTorch's attention as the host calls it, without overrides: it neither rounds queries and keys nor skips any."""
    from comfy.ldm.modules.attention import attention_pytorch

    return getattr(attention_pytorch, "__wrapped__", attention_pytorch)


@contextmanager
def in_training() -> Iterator[None]:
    """Inside, later hosts use kernels that have gradients."""
    import comfy.model_management

    flags = vars(comfy.model_management)
    before = {name: flags[name] for name in ("in_training",) if name in flags}
    try:
        flags.update(dict.fromkeys(before, True))
        yield
    finally:
        flags.update(before)


def rotations() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The host's rotary embeddings of one tensor, by name: functions of (b, h, n, d) and the angles."""
    from comfy.ldm.flux import math

    found = {"apply_rope": lambda x, angles: math.apply_rope(x, x.detach().clone(), angles)[0]}
    return found | ({"apply_rope1": math.apply_rope1} if hasattr(math, "apply_rope1") else {})


def qwen_image21_encoder() -> Callable[..., tuple] | None:
    """What the host's TextEncodeQwenImage21 does, from its inputs to its outputs; None before 0.37."""
    try:
        from comfy_extras import nodes_qwen
    except ImportError:
        return None
    node = getattr(nodes_qwen, "TextEncodeQwenImage21", None)
    return None if node is None else lambda *arguments, **inputs: node.execute(*arguments, **inputs).result


def version() -> str:
    """The host's, as it names itself."""
    return getattr(sys.modules.get("comfyui_version"), "__version__", "of unknown version")
