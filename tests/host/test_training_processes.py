"""Two processes: their step is that of one process with the whole batch, and they hold and send what is computed."""

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


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    paint_subjects(folder / "subjects", 5)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [bootstrap.__file__, "tests.small.two_processes", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("way", ["ddp", "sharded"])
def test_two_processes_of_batch_two_are_one_of_batch_four(found, way):
    mean, one = found[way]["losses"]
    assert mean == pytest.approx(one, rel=1e-6)
    assert found[way]["gradients"] < 1e-5  # the worst tensor's relative difference: fp32's rounding
    assert found["ddp"]["digest"] == found["sharded"]["digest"]  # the averages are the same, bit for bit


def test_sharded_processes_hold_their_share(found):
    (weights, moments), other = found["ddp"]["held"]
    assert [weights, moments] == other and moments == pytest.approx(2 * weights, rel=1e-4)
    shares = found["sharded"]["held"]
    for whole, parts in zip((weights, moments), zip(*shares)):
        assert sum(parts) == pytest.approx(whole, rel=1e-4)  # nothing twice
        assert max(parts) < whole * (0.5 + PADDING)
    computed = estimate(BACKBONES["flux"], lora_rank=512, shards=2, compute_bytes=4).parts
    alone = estimate(BACKBONES["flux"], lora_rank=512, compute_bytes=4).parts
    for part in ("DLA", "LoRA", "gradients", "optimiser"):
        assert computed[part] == alone[part] // 2


def test_what_is_sent_is_what_is_computed(found):
    for way, sent in found.items():
        dla, lora = sent["dla"], sent["lora"]
        # by rings each process sends (n - 1) / n of these, and to average is to do both: twice that
        counted = sent["all_reduce"] if way == "ddp" else (sent["gather"] + sent["reduce_scatter"]) / 2
        computed = traffic(dla, lora, 2, sharded=way == "sharded", compute_bytes=4)
        assert counted == pytest.approx(computed, rel=PADDING) and counted >= computed
    assert found["ddp"]["gather"] == found["ddp"]["reduce_scatter"] == 0 < found["sharded"]["gather"]


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
