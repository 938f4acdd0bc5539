"""The two commands.

    nox -s demo                     the main job on a real ComfyUI server: pictures in output/
    nox -s demo -- --serve          the same, then leaves the editor open (all options: nox -s demo -- --help)
    nox -s tests                    the tests (arguments after -- go to pytest)
    nox -s bench -- strength        a benchmark: ratios against the host's own way in the same run
    nox -s evidence                 what the demo's family shows of the paper's claims: docs/evidence.md

Both use one environment per host and transformers, made by `tools/environment.py`:
    COMFYUI_PATH=FOLDER             a ComfyUI checkout of your own instead of the one from the package registry
    TRANSFORMERS=4.57.*             a version or range of transformers instead of the one that pip picks
"""

import os
import signal
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from tools import environment  # noqa: E402

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["tests"]
# Ctrl-C and a plain kill end a session in the same way: nox ends the running command and gives it time to end its
# server.
signal.signal(signal.SIGTERM, signal.default_int_handler)
BOOTSTRAP = str(ROOT / "common" / "bootstrap.py")
RUN = {"terminate_timeout": 30, "external": True, "stderr": sys.stderr}  # standard output is the results' alone


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """A subject and a prompt in, pictures of that subject out, on a real ComfyUI server."""
    place = prepare(session)
    session.run(str(place.python), BOOTSTRAP, "demo.run", "--comfyui", str(place.comfyui), *session.posargs, **RUN)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Every test: the method, the pack inside the host, and a real server with a real browser."""
    place = prepare(session)
    environment.obtain_browser(place.python)
    arguments = session.posargs or [str(ROOT / "tests")]
    session.run(
        str(place.python), "-m", "pytest", *arguments, env={**os.environ, "COMFYUI_PATH": str(place.comfyui)}, **RUN
    )


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """One benchmark: `nox -s bench -- strength`; its last line is one JSON object of ratios."""
    place = prepare(session)
    session.run(
        str(place.python),
        BOOTSTRAP,
        "tools.perf",
        *session.posargs,
        env={**os.environ, "COMFYUI_PATH": str(place.comfyui)},
        **RUN,
    )


@nox.session(venv_backend="none")
def evidence(session: nox.Session) -> None:
    """The paper's claims checked on the demo's family: docs/evidence.md; the last line is one JSON object."""
    place = prepare(session)
    session.run(
        str(place.python), BOOTSTRAP, "demo.evidence.run", "--comfyui", str(place.comfyui), *session.posargs, **RUN
    )


def prepare(session: nox.Session) -> environment.Environment:
    try:
        return environment.prepare()
    except environment.EnvironmentProblem as problem:
        session.error(str(problem))
