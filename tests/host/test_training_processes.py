"""Several processes: their step is that of one with the whole batch, and they hold and send what is computed."""

import json
import os
import subprocess
import sys

import pytest
from subject_dla.common import bootstrap
from subject_dla.loaders.backbones import BACKBONES
from subject_dla.tests.small.training import paint_subjects
from subject_dla.training.dit.memory import estimate
from subject_dla.training.dit.scale import FAMILIES, WAYS, plan, table, traffic

PADDING = 0.06  # a sharded tensor is padded to rows for each process; the small models' have few


def run(folder, count, *kinds):
    paint_subjects(folder / "subjects", 5)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command += [bootstrap.__file__, "tests.small.several_processes", str(folder), *kinds]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), 2, "ddp", "sharded", "accumulated", "bf16")


@pytest.mark.parametrize("kind, rounding", [("ddp", 1e-5), ("sharded", 1e-5), ("accumulated", 1e-5), ("bf16", 0.02)])
def test_processes_of_batch_two_are_one_with_the_whole_batch(found, kind, rounding):
    mean, one = found[kind]["losses"]
    assert mean == pytest.approx(one, rel=rounding / 10)
    assert found[kind]["gradients"] < rounding  # the worst tensor's relative difference
    assert found["ddp"]["digest"] == found["sharded"]["digest"]  # the averages are the same, bit for bit


def test_sharded_processes_hold_their_share(found):
    (weights, moments), other = found["ddp"]["held"]
    assert [weights, moments] == other and moments == pytest.approx(2 * weights, rel=1e-4)
    for kind in ("sharded", "accumulated", "bf16"):
        for whole, parts in zip((weights, moments), zip(*found[kind]["held"])):
            assert sum(parts) == pytest.approx(whole, rel=1e-4)  # nothing twice
            assert max(parts) < whole * (0.5 + PADDING)
    computed = estimate(BACKBONES["flux"], lora_rank=512, shards=2, compute_bytes=4).parts
    alone = estimate(BACKBONES["flux"], lora_rank=512, compute_bytes=4).parts
    for part in ("DLA", "LoRA", "gradients", "optimiser"):
        assert computed[part] == alone[part] // 2


def test_what_is_sent_is_what_is_computed(found):
    for kind, sent in found.items():
        # by rings each process sends (n - 1) / n of these, and to average is to do both: twice that
        parts = sent["gather"] + sent["reduce_scatter"]
        counted = sent["all_reduce"] if kind == "ddp" else parts / 2
        facts = dict(passes=1 + (kind == "accumulated"), compute_bytes=2 if kind == "bf16" else 4)
        computed = traffic(sent["dla"], sent["lora"], 2, sharded=kind != "ddp", **facts)
        assert computed <= counted < computed * (1 + PADDING), kind
    assert found["bf16"]["gather"] < found["sharded"]["gather"]


@pytest.mark.long
def test_shards_within_a_machine_and_replicas_between_machines(found, tmp_path):
    several = run(tmp_path, 4, "replicas")["replicas"]
    assert several["gradients"] < 1e-5 and several["shards"] == 2
    weights = found["ddp"]["held"][0][0]
    assert sum(held[0] for held in several["held"]) == pytest.approx(2 * weights, rel=1e-4)
    assert several["gather"] == found["sharded"]["gather"]


def test_sharding_takes_less_the_more_there_are():
    for backbone in FAMILIES:
        for rank in (64, 512):
            alone, sent = plan(backbone, rank, 1, "sharded")
            assert (alone, sent) == plan(backbone, rank, 1, "data parallel") and sent == 0
            for way in WAYS:
                memory = [plan(backbone, rank, count, way)[0] for count in (2, 8, 64)]
                assert memory == sorted(memory, reverse=True) and (memory[0] > memory[2]) is (way != "data parallel")
            assert plan(backbone, rank, 8, "all sharded")[0] < plan(backbone, rank, 8, "sharded")[0] < alone


def test_the_documents_table_is_the_computed_one():
    text = (bootstrap.ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert table() in text, f"\n{table()}"
