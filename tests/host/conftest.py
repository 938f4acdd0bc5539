"""In-process host: the ComfyUI checkout named by COMFYUI_PATH, on the CPU from the first import on."""

import os
from pathlib import Path

import pytest
from subject_dla.common.bootstrap import start_host

COMFYUI = Path(os.environ.get("COMFYUI_PATH", ""))
if not (COMFYUI / "comfy").is_dir():
    raise RuntimeError(f"COMFYUI_PATH is {str(COMFYUI)!r}, expected a ComfyUI checkout. `nox -s tests` sets it.")
start_host(COMFYUI)


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    """A folder with `models`, the host's, empty, with some of the pack's kinds registered, each in `extra` too, as
    extra_model_paths.yaml would add it before any pack is loaded."""
    import folder_paths
    from subject_dla.loaders import folders

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    for kind in ("mllm", "dla", "orientation"):
        folder_paths.folder_names_and_paths.pop(kind, None)
        (tmp_path / "models" / kind).mkdir(parents=True)
        (tmp_path / "extra" / kind).mkdir(parents=True)
        folder_paths.add_model_folder_path(kind, str(tmp_path / "extra" / kind))
    monkeypatch.setattr(folders, "ROOT", tmp_path)  # without the demo's models
    folders.register()
    folders.register()  # again: no effect
    return tmp_path
