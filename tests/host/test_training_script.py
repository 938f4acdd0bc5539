"""The script with a recipe, in processes of its own, alone and launched by accelerate."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from subject_dla.demo.family.layout import MODELS, ROOT
from subject_dla.tests.small.training import paint_subjects, small_family
from subject_dla.training.checkpoints import read_state
from subject_dla.training.reporting.losses import read_table

RECIPE = """
models = {{diffusion_model = "{diffusion_model}", vae = "{vae}", mllm = "{mllm}"}}
dla = {{heads = 4}}
lora = {{rank = 4}}
data = {{source = "subjects", resolution = 64, reference_size = 64, validation = 0.2, pairs_per_target = 1}}
training = {{stage = 2, steps = 4, batch_size = 2, warmup = 0, learning_rate = 1e-3}}
run = {{name = "one", dtype = "fp32", save_every = 2, validate_every = 4, validation_examples = 2, sample_every = 0}}
"""
# accelerate's launcher starts several processes for devices alone, and then calls this one; on CPUs, this one
TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("script")
    models = small_family(folder / "models")
    paint_subjects(folder / "subjects", 4)
    (folder / "recipe.toml").write_text(RECIPE.format(**models), encoding="utf-8")
    return folder


def start(workspace: Path, *arguments: str, launch: tuple[str, ...] = (), **variables) -> subprocess.Popen:
    folders = ["--comfyui", os.environ["COMFYUI_PATH"], "--models", MODELS, "--models", workspace / "models"]
    folders += ["--output", workspace]
    command = [*(launch or (sys.executable,)), ROOT / "training", workspace / "recipe.toml", *folders]
    keywords = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen([*map(str, command), *arguments], cwd=ROOT, env=environment, **keywords)


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out, err


def weights(out: str) -> dict:
    result = json.loads(out.splitlines()[-1])
    return load_file(result["dla"]) | load_file(result["lora"])


def difference(one: dict, other: dict) -> float:
    assert set(one) == set(other)
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def test_processes_are_accumulated_passes_and_a_kill_is_resumed(workspace):
    """Two processes under accelerate give what one gives that accumulates two passes; a terminated run resumes."""
    changes = ["--set", "training.accumulate=2"]
    whole, err = finish(start(workspace, *changes))
    assert "step 4/4" in err and "held-out" in err
    again = ["--set", "run.name='two'", *changes, "--set", "training.steps=90"]
    process = start(workspace, *again)
    for line in process.stderr:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    _, err = finish(process, 130)
    assert "resumes" in err
    facts = sorted((workspace / "subject_dla" / "runs" / "two").glob("checkpoint-*"))
    assert int(facts[-1].name.split("-")[1]) >= 3
    parallel, err = finish(start(workspace, "--set", "run.name='three'", launch=TWO))
    assert difference(weights(whole), weights(parallel)) < 1e-4
    runs = workspace / "subject_dla" / "runs"
    one, two = (read_table(runs / run / "validation.csv") for run in ("one", "three"))
    assert one.keys() == two.keys() == {0, 4}
    for step, tolerance in ((0, 0.0), (4, 1e-3)):  # the same weights at first; each process has half of the examples
        for row, other in zip(one[step], two[step], strict=True):
            assert (row.condition, row.bin, row.samples) == (other.condition, other.bin, other.samples)
            assert other.mean == pytest.approx(row.mean, rel=tolerance, abs=0)
    resumed, err = finish(start(workspace, "--set", "run.name='three'", "--set", "training.steps=5", *changes))
    assert "Resuming from step 4" in err


def two_machines(workspace: Path, *arguments: str) -> list[subprocess.Popen]:
    """A process on each of two machines that share no output folder, with accelerate's switch for FSDP."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    launch += ["--master_addr", "127.0.0.1", "--master_port", str(port), "--node_rank"]
    others = [[], ["--output", str(workspace / "other")]]
    return [
        start(workspace, *arguments, *more, launch=(*launch, str(rank)), ACCELERATE_USE_FSDP="true")
        for rank, more in enumerate(others)
    ]


@pytest.mark.long
def test_sharded_on_two_machines_it_is_the_same_run_and_resumes_as_another(workspace):
    """FSDP by accelerate's own switch; checkpoints are those of one process, before and behind it."""
    single = ["--set", "training.accumulate=2", "--set", "run.name='single'"]
    whole, _ = finish(start(workspace, *single))
    name = ["--set", "run.name='sharded'"]
    first, second = two_machines(workspace, *name)
    parts, err = finish(first)
    assert "2 processes, each with its share" in err and "held-out" in err
    assert finish(second)[0] == ""  # the main process alone reports and writes
    assert [path.name for path in (workspace / "other" / "subject_dla").iterdir()] == ["cache"]
    assert difference(weights(whole), weights(parts)) < 1e-4
    runs, files = workspace / "subject_dla" / "runs", ("dla", "lora", "optimizer")

    def newest(run):
        return {file: load_file(runs / run / f"checkpoint-00000004/{file}.safetensors") for file in files}

    assert all(difference(newest("single")[file], newest("sharded")[file]) < 1e-3 for file in files)
    # from sharded processes to one: without the newest checkpoint, which it makes again
    shutil.rmtree(runs / "sharded" / "checkpoint-00000004")
    resumed, err = finish(start(workspace, *name, *single[:2]))
    assert "Resuming from step 2" in err and difference(weights(whole), weights(resumed)) < 1e-4
    # and from one to sharded processes, which end behind the same step when one of them is interrupted
    first, second = two_machines(workspace, *name, "--set", "training.steps=90")
    seen = []
    for line in first.stderr:
        seen.append(line)
        if line.startswith("step 6/"):
            second.send_signal(signal.SIGTERM)
            break
    for process in (first, second):
        process.communicate(timeout=300)
    assert any("Resuming from step 4" in line for line in seen)
    last = sorted((runs / "sharded").glob("checkpoint-*"))[-1]
    state = read_state(last)
    assert 6 <= state["step"] == len(state["losses"]) < 90 and not (runs / "sharded" / "run.lock").exists()
    assert all(value.isfinite().all() for file in files for value in load_file(last / f"{file}.safetensors").values())


@pytest.mark.long
def test_sharded_by_the_documented_command_a_run_saves_at_its_end_alone(workspace):
    """On processors, too, each process knows of the others; `save_every = 0` saves once."""
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2")
    changes = {"run.name": "'end'", "run.save_every": "0", "run.validate_every": "0", "training.steps": "1"}
    options = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
    out, err = finish(start(workspace, *options, launch=(*launch, "--num_processes", "2")))
    assert "2 processes, each with its share" in err and out.count("\n") == 1
    assert all(value.isfinite().all() for value in weights(out).values())
    assert (workspace / "subject_dla" / "runs" / "end" / "checkpoint-00000001").is_dir()


def test_bad_recipes_are_named(workspace):
    changes = {"training.steps='many'": "training.steps", "models.vae='none.safetensors'": "none.safetensors"}
    for change, name in changes.items():
        _, err = finish(start(workspace, "--set", change), 1)
        assert name in err and "Traceback" not in err
    out, _ = finish(start(workspace, "--template"))
    assert "[training]" in out


def test_the_host_reads_its_own_options():
    code = "import bootstrap, os; bootstrap.start_host(os.environ['COMFYUI_PATH'], ['--reserve-vram', '2']);"
    code += "from comfy.cli_args import args; print(args.reserve_vram)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "common", capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "2.0"
