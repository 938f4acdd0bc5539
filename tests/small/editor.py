"""A real server on small models, and its editor in a real Chromium."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from ...common.bootstrap import ROOT
from ...demo import run as demo
from ...tools import environment
from ...tools.comfy_client.server import PACK, Server
from .measure import build_measures
from .training import paint_subjects

SERVER_TESTS = ROOT / "tests" / "server"
DREAMO_LORAS = ["flux-turbo", "dreamo_comfyui", "dreamo_cfg_distill_comfyui", "dreamo_sft_lora", "dreamo_dpo_lora"]
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
# The pack's nodes are known, and the editor has opened its own first workflow (or ours would be replaced by it).
READY = """() => {
    const app = window.app ?? window.comfyAPI?.app?.app
    const types = (window.LiteGraph ?? window.comfyAPI?.litegraph?.LiteGraph)?.registered_node_types
    return app?.graph && types?.SubjectEncode && app.extensionManager?.workflow?.activeWorkflow
}"""
# What of the open workflow the editor does not know, and what it would queue.
STATE = """async () => {
    const app = window.app ?? window.comfyAPI.app.app
    const known = (window.LiteGraph ?? window.comfyAPI.litegraph.LiteGraph).registered_node_types
    const nodes = app.graph._nodes ?? app.graph.nodes
    const prompt = await app.graphToPrompt()
    return {
        missing: nodes.filter((node) => !known[node.type]).map((node) => node.type),
        broken: nodes.filter((node) => node.has_errors).map((node) => node.type),
        unlinked: prompt.workflow.links.filter((link) => link === null).length,
        count: nodes.length,
        output: prompt.output,
    }
}"""
LOAD = f"""async (workflow) => {{
    await (window.app ?? window.comfyAPI.app.app).loadGraphData(workflow)
    return await ({STATE})()
}}"""


def build_models(comfyui: Path, folder: Path) -> Path:
    """A models folder with every file that a shared workflow asks for, small and random."""
    subprocess.run([sys.executable, ROOT / "common/bootstrap.py", "tests.small.models", comfyui, folder], check=True)
    build_measures(folder, comfyui)
    for name in DREAMO_LORAS:
        shutil.copyfile(folder / "loras" / "dit_lora.safetensors", folder / "loras" / f"{name}.safetensors")
    return folder


@contextmanager
def small_server(comfyui: Path, base: Path, models: Path, arguments: Sequence[str] = ()) -> Iterator[Server]:
    """A server on `build_models`, with pictures, a folder to train on and stand-ins for the nodes of other packs."""
    packs = {name: SERVER_TESTS / name for name in ("small_host", "load_counts", "dreamo")} | {PACK: ROOT}
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(
        json.dumps(
            {
                "Comfy.TutorialCompleted": True,  # else a dialog of templates, which takes its time
                "Comfy.Minimap.Visible": False,  # it covers nodes
            }
        )
    )
    flags = os.environ.get("HOST_FLAGS", "").split()  # set by `nox -s hosts`
    device = [] if {"--lowvram", "--novram"} & set(flags) else ["--cpu"]
    with Server(comfyui, base, packs=packs, models=[models], arguments=[*device, *flags, *arguments]) as server:
        for image in demo.IMAGES.glob("*.*g"):
            server.client.upload(image)
        paint_subjects(server.base / "input" / "my-subjects", subjects=3)
        server.client.upload(demo.IMAGES / "chelsea.jpg", "example.png")  # every ComfyUI has one of that name
        yield server


@contextmanager
def chromium(**variables: str) -> Iterator[Browser]:
    """The machine's Chromium with these environment variables; a machine without one fails the test."""
    path = environment.find_browser()
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=FLAGS, env={**os.environ, **variables})
        except Exception as error:
            pytest.fail(
                f"No Chromium starts here ({path or 'none found'}): install the system's package chromium, run "
                f"`python -m playwright install chromium`, or name one with CHROMIUM_PATH.\n{error}"
            )
        yield browser
        browser.close()


def open_editor(page: Page, address: str) -> None:
    """Opens the editor of a server and waits until it is ready for a workflow."""
    page.goto(address, wait_until="domcontentloaded")
    page.wait_for_function(READY, timeout=120_000)
    page.wait_for_load_state("networkidle")
