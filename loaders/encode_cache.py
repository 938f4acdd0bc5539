"""What encoders made of images, kept in memory for the next prompt: bounded, and gone with the model that made it."""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from itertools import islice
from threading import RLock
from typing import Any
from weakref import ref

import torch
from comfy.model_management import intermediate_device
from torch import Tensor, nn


class EncodeCache:
    """Tensors of models in the host's intermediate memory (the CPU's, as a rule), the least recently used leave first.

    A model is held weakly: when the host lets go of it ("Free model and node cache", or a workflow without it), what it
    made goes, too. Moving its weights to the CPU ("Unload Models", or another model's need) frees nothing here, so
    that a card that holds one model at a time gains as well.
    """

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self._entries: OrderedDict[tuple, tuple[tuple, int, Any]] = OrderedDict()  # with its bytes and checksum
        self._lock = RLock()  # the garbage collector calls `_forget` in any thread, also amid a change in this one

    def get(
        self, owner: Any, facts: Hashable, make: Callable[[], tuple], fits: Callable[[tuple], bool] = lambda kept: True
    ) -> tuple:
        """Returns what `make` gives, from memory where it was made before; never write into it.

        Args:
            owner: The model; its object is part of the key.
            facts: All else that the result depends on: pixels, tokens, weights, settings. None = make it anew.
            make: Computes a tuple with tensors in it, also nested.
            fits: Whether what is kept will do; False = make it anew and keep that.
        """
        if facts is None:
            return make()
        key = (ref(owner, self._forget), facts)
        with self._lock:
            found = self._entries.get(key)
        if found is not None and fits(found[0]):
            if checksum(found[0]) == found[2]:
                with self._lock:
                    if key in self._entries:
                        self._entries.move_to_end(key)
                return found[0]
            logging.warning("Subject DLA: kept tensors of an encoder have changed in memory; they are made again.")
        with self._lock:
            self._drop(key)
        made = make()
        size, check = _bytes(made), checksum(made)
        with self._lock:
            self._drop(key)  # another thread's
            if size <= self.limit:
                self._entries[key] = made, size, check
                self.bytes += size
            while self.bytes > self.limit:
                self._drop(next(iter(self._entries), None))
        return made

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            for key in list(self._entries):
                self._drop(key)

    def _forget(self, gone: ref) -> None:
        with self._lock:
            for key in [key for key in list(self._entries) if key[0] is gone]:
                self._drop(key)

    def _drop(self, key: Any) -> None:
        _, size, _ = self._entries.pop(key, ((), 0, None))
        self.bytes -= size


def _bytes(value: Any) -> int:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return sum(map(_bytes, value))
    return value.nbytes if isinstance(value, Tensor) else 0


def checksum(value: Any) -> Any:
    """Of the tensors in a value, also nested: another one after any one bit has changed, at the speed of memory."""
    if isinstance(value, dict):
        return checksum(tuple(value.values()))
    if isinstance(value, (tuple, list)):
        return tuple(map(checksum, value))
    if not isinstance(value, Tensor):
        return None
    data = value.detach().contiguous().flatten().view(torch.uint8)
    whole = len(data) // 8 * 8
    data = data if data.data_ptr() % 8 == 0 else data.clone()
    sums = data[:whole].view(torch.int64).sum() + data[whole:].sum()  # modulo 2^64
    return value.dtype, tuple(value.shape), int(sums)


VAE_LATENTS = EncodeCache(256 * 2**20)  # a megapixel in FLUX's latents: 1 MiB
# an image of 1024 px by Qwen2.5-VL 7B in bf16: 10 MB of vision tokens, 80 MB of keys and values, 300 MB of all layers
MLLM_STATES = EncodeCache(2 * 2**30)


def content(tensor: Tensor) -> str:
    """Hashes a tensor's values, shape and dtype."""
    flat = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{flat.dtype} {tuple(flat.shape)}".encode())
    digest.update(flat.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """Hashes a model's weights: names, shapes, dtypes, and some values of each."""
    digest = hashlib.sha256()
    held = dict(model.named_parameters()) | dict(model.named_buffers())  # GGUF's state_dict is on meta, for sizes
    state = {key: held.get(key, value) if value.is_meta else value for key, value in model.state_dict().items()}
    state = {key: value for key, value in state.items() if not value.is_meta}
    some = [value.flatten()[:: max(1, value.numel() // 16)].float() for value in state.values()]
    devices = {value.device for value in some}  # one transfer for each
    read = {device: iter(torch.cat([v for v in some if v.device == device]).tolist()) for device in devices}
    for (key, value), values in zip(state.items(), some, strict=True):
        listed = list(islice(read[values.device], len(values)))
        digest.update(f"{key} {value.dtype} {tuple(value.shape)} {listed}".encode())
    return digest.hexdigest()


def weights(model: nn.Module, patcher: Any) -> str:
    """Fingerprint of a model's weights and device; with patches, such as a LoRA's, it holds for this session alone."""
    if patcher is None:
        return fingerprint(model)
    patches = patcher.patches_uuid if patcher.patches else ""
    return f"{fingerprint(model)} {patcher.load_device.type} {patches}"


def behaviour(owner: Any, model: nn.Module) -> str:
    """What beside weights decides what a model computes: settings, methods that nodes replaced, padding, hooks.

    Nodes for seamless tiling, for instance, set the padding of a VAE's convolutions, or replace their methods.
    """
    found: list = [type(model).__qualname__, _settings(owner)]
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        found.append((name, getattr(module, "padding_mode", None), hooks, _settings(module, plain=())))
    return hashlib.sha256(repr(found).encode()).hexdigest()


PLAIN = (int, float, str, bool, tuple, torch.dtype, torch.device, type(None))


def _settings(owner: Any, plain: tuple[type, ...] = PLAIN) -> list[tuple]:
    """An object's own plain values, and its own functions by address and code, since addresses are used again."""
    return [
        (name, id(value), getattr(getattr(value, "__func__", value), "__code__", None))
        if callable(value)
        else (name, value)
        for name, value in sorted(vars(owner).items())
        if isinstance(value, plain) or (callable(value) and not isinstance(value, nn.Module))
    ]


def stored(tensor: Tensor) -> Tensor:
    """A copy where the host keeps what lies between nodes: the CPU's memory, as a rule."""
    return tensor.to(intermediate_device(), copy=True).contiguous()


def encode_reference(vae: Any, pixels: Tensor) -> Tensor:
    """Latent of a picture (1, H, W, 3) in 0..1, encoded once for all prompts and nodes as long as the VAE is loaded.

    Where the host ran out of memory and encoded tiles, whose seams a latent shows, the next prompt tries anew.
    """
    model = getattr(vae, "first_stage_model", None)
    facts = None
    if isinstance(model, nn.Module):
        facts = (content(pixels), weights(model, getattr(vae, "patcher", None)), behaviour(vae, model))

    def encode() -> tuple[Tensor, bool]:
        with _tiling(vae) as tiled:
            return vae.encode(pixels), bool(tiled)

    latent, _ = VAE_LATENTS.get(vae, facts, encode, lambda kept: not kept[1])
    return latent.clone()  # the caller's own


@contextmanager
def _tiling(vae: Any) -> Iterator[list[str]]:
    """Yields a list that gets the names of the host's methods for tiles that the VAE uses inside."""
    used: list[str] = []

    def noted(name: str, method: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            used.append(name)
            return method(*args, **options)

        return call

    before = dict(vars(vae))
    names = [name for name in ("encode_tiled_", "encode_tiled_1d", "encode_tiled_3d") if hasattr(vae, name)]
    try:
        for name in names:
            setattr(vae, name, noted(name, getattr(vae, name)))
        yield used
    finally:
        for name in names:
            delattr(vae, name)
            if name in before:  # a node's own
                setattr(vae, name, before[name])
