"""The commands.

    nox -s demo                     the main job on a real ComfyUI server: pictures in output/
    nox -s demo -- --serve          the same, then leaves the editor open (all options: nox -s demo -- --help)
    nox -s tests                    the tests (arguments after -- go to pytest: -m method for those without ComfyUI)
    nox -s tests -- --long          all of them: also the long ones of what shorter ones test too
    nox -s browser                  the editor as a person uses it, in a real browser: screenshots in output/browser/
    nox -s lint                     ruff's rules and format, types, and whether the host has what the pack uses of it
    nox -s bench                    ratios against the host's own way in the same run (-- --full: on an accelerator)
    nox -s faults                   damaged files, odd inputs, faults while it runs, a long run (-- NAME: one of them)
    nox -s hosts -- PATH...         the tests on ComfyUI checkouts, with several transformers and flags: a matrix
    nox -s evidence                 what the demo's family shows of the paper's claims: docs/evidence.md

All use one environment per host and transformers, made by `tools/environment.py`:
    COMFYUI_PATH=FOLDER             a ComfyUI checkout of your own instead of the one from the package registry
    FRONT_END=1.57.0                the newer of the two editors that `nox -s browser` opens
    TRANSFORMERS=4.57.*             a version or range of transformers instead of the one that pip picks
"""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # the tests start a hundred processes that import the same modules
sys.path.insert(0, str(ROOT))

from tools import environment  # noqa: E402
from tools import hosts as matrix  # noqa: E402

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["tests"]
# Ctrl-C and a plain kill end a session in the same way: nox ends the running command and gives it time to end its
# server.
signal.signal(signal.SIGTERM, signal.default_int_handler)
PACK = ("common", "dla", "loaders", "sampling", "evaluation", "training", "nodes", "tools", "demo")
BOOTSTRAP = str(ROOT / "common" / "bootstrap.py")
RUN = {"terminate_timeout": 30, "external": True, "stderr": sys.stderr}  # standard output is the results' alone


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """A subject and a prompt in, pictures of that subject out, on a real ComfyUI server."""
    found = prepare(session)
    session.run(str(found.python), BOOTSTRAP, "demo.run", "--comfyui", str(found.comfyui), *session.posargs, **RUN)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """The method, the pack inside the host, and a real server with a real browser: all tests but those of `browser`."""
    found = prepare(session)
    environment.obtain_browser(found.python)
    environ = {**os.environ, "COMFYUI_PATH": str(found.comfyui)}
    arguments = session.posargs
    if not set(arguments) - {"--long"}:  # no choice: in two processes of a thread each
        arguments, environ["OMP_NUM_THREADS"] = [*matrix.TOGETHER, *matrix.SUITE, *arguments], "1"
    session.run(str(found.python), "-m", "pytest", "--durations=25", *arguments, env=environ, **RUN)


@nox.session(venv_backend="none")
def browser(session: nox.Session) -> None:
    """What a person sees and touches: two versions of the editor, each with both renderers, in a real browser.

    Most tests are run in two of these four, each front end and each renderer once, or in one of the two, in turns;
    `-- --every-editor` runs all in all.
    """
    found = prepare(session)
    environment.obtain_browser(found.python)
    environ = {**os.environ, "COMFYUI_PATH": str(found.comfyui), "OMP_NUM_THREADS": "1"}
    arguments = session.posargs or ["--numprocesses=2"]  # an editor in each process
    session.run(
        str(found.python), "-m", "pytest", "--durations=10", str(ROOT / "tests" / "browser"), *arguments,
        env=environ, **RUN,
    )  # fmt: skip


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Ruff's rules and format, the type checker, as pyproject.toml has them, and the pack's references to the host."""
    found = prepare(session)
    python = str(found.python)
    session.run(python, "-m", "ruff", "check", **RUN)
    session.run(python, "-m", "ruff", "format", "--check", **RUN)
    link = ROOT / ".cache" / "typing" / "subject_dla"  # the pack's modules under one name, whatever its folder's is
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(Path("..", ".."), target_is_directory=True)
    packages = [f"--package=subject_dla.{name}" for name in ("common", "dla", "loaders", "sampling")]
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".cache" / "mypy")]
    with session.chdir(link.parent):
        session.run(python, "-m", "mypy", *options, *packages, **RUN)
    with tempfile.TemporaryDirectory() as work:
        check_references(session, found, Path(work))


def check_references(session: nox.Session, found: environment.Environment, work: Path) -> None:
    """Every name and call of `comfy.*` in the pack against the host's files, by comfy-import-guard.

    It reads the host from a commit of a git repository, which the registry's host is not: here it gets one with a
    single commit. What only some hosts have, `loaders/host.py` asks for by `vars(module).get`.
    """
    pack, repository = work / "install" / "custom_nodes" / "subject-dla", work / "cache" / "ComfyUI"
    for file in (*ROOT.glob("*.py"), *(file for name in PACK for file in (ROOT / name).rglob("*.py"))):
        (pack / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, pack / file.relative_to(ROOT))
    repository.mkdir(parents=True)
    git = ["git", "-C", str(found.comfyui), f"--git-dir={repository / '.git'}", "--work-tree=."]
    session.run(*git, "init", "--quiet", **RUN)
    session.run(*git, "add", "--force", "comfy", **RUN)
    author = ["-c", "user.name=host", "-c", "user.email=", "-c", "commit.gpgsign=false"]
    session.run(*git, *author, "commit", "--quiet", "--message=host", **RUN)
    guard = [str(found.python), "-m", "comfy_import_guard.cli", "--offline", "--quiet", f"--cache-dir={work / 'cache'}"]
    session.run(*guard, "check", f"--comfy-dir={work / 'install'}", "--target=HEAD", "--strict", **RUN)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """All benchmarks with a limit, or one: `nox -s bench -- strength`; the last line is one JSON object of ratios."""
    run_table(session, "tools.perf")


@nox.session(venv_backend="none")
def faults(session: nox.Session) -> None:
    """All kinds of faults, or one: `nox -s faults -- injected`; the last line is one JSON object of counts."""
    run_table(session, "tools.faults")


def run_table(session: nox.Session, module: str) -> None:
    """Runs a folder of tools with a table; those that need the host find it by COMFYUI_PATH."""
    if session.posargs in (["-h"], ["--help"]):  # needs no environment, which takes minutes to make
        session.run(sys.executable, BOOTSTRAP, module, *session.posargs, **RUN)
        return
    found = prepare(session)
    environ = {**os.environ, "COMFYUI_PATH": str(found.comfyui)}
    session.run(str(found.python), BOOTSTRAP, module, *session.posargs, env=environ, **RUN)


@nox.session(venv_backend="none")
def hosts(session: nox.Session) -> None:
    """The tests on each ComfyUI checkout with several transformers and the host's flags; the last line is JSON."""
    try:
        if matrix.main(session.posargs):
            session.error("A host failed: the matrix is above, the logs are in output/hosts/.")
    except environment.SetupError as problem:
        session.error(str(problem))


@nox.session(venv_backend="none")
def evidence(session: nox.Session) -> None:
    """The paper's claims checked on the demo's family: docs/evidence.md; the last line is one JSON object."""
    found = prepare(session)
    session.run(
        str(found.python), BOOTSTRAP, "demo.evidence.run", "--comfyui", str(found.comfyui), *session.posargs, **RUN
    )


def prepare(session: nox.Session) -> environment.Environment:
    """The host and its environment; a problem with them ends the session."""
    try:
        return environment.prepare()
    except environment.SetupError as problem:
        session.error(str(problem))
