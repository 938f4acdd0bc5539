"""VAE files: loaded by the host, with checks before and after whose errors name the file."""

from pathlib import Path

from ..common.dtypes import FILE_DTYPES
from ..common.safetensors_header import SafetensorsError, read_header
from . import host
from .protocols import VAE
from .weight_folders import DataError, check_finite


def load_vae(name: str) -> VAE:
    """VAE of a file under `models/vae`, or one of the host's tiny ones, e.g. "taef1".

    Raises ValueError for a file that is no whole VAE, with its name.
    """
    import folder_paths

    path = folder_paths.get_full_path("vae", name)
    if path is None:  # one of the host's own, of several files
        return host.load_vae(name)
    if Path(path).suffix in (".safetensors", ".sft"):
        try:
            tensors = read_header(path).tensors
        except SafetensorsError as error:
            raise DataError(f"{path}: it {error.problem}") from None
        for key, tensor in tensors.items():
            dtype = FILE_DTYPES.get(tensor.dtype)
            floats = dtype is not None and dtype.is_floating_point
            if not floats and (key.endswith((".weight", ".bias")) or tensor.dtype.startswith("C")):  # C64: complex
                raise DataError(f"{path}: {key!r} is {tensor.dtype}, expected floating point. Download the VAE again.")
    with host.file_errors(f"{path}: the host cannot load it as a VAE", " Choose another file."):
        vae = host.load_vae(name)
    model = getattr(vae, "first_stage_model", None)
    if model is None:
        raise DataError(f"{path}: the host finds no VAE in this file. Choose another one.")
    state = model.state_dict()
    check_finite(path, {key: value for key, value in state.items() if not value.is_meta})
    return vae
