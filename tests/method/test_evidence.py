"""The evidence: a result counts for the weights that drew it only, and a claim holds where intervals do not overlap."""

import json
import random
from dataclasses import asdict

import pytest
import torch
from subject_dla.demo.evidence import rows as evidence_rows
from subject_dla.demo.evidence.results import BASE, ResultStore
from subject_dla.demo.evidence.score import Scores, paired_difference, verdict
from subject_dla.demo.family import world
from subject_dla.demo.family.layout import NAMES
from subject_dla.demo.family.oracle import COARSE, FINE, TRAITS
from subject_dla.evaluation.copy_paste.metrics import copy_paste_report

ROW = next(row for row in evidence_rows.ROWS if row.arm == "demo-last")
RESULT = {"angles": [[1.2346, 2.0]], "traits": {"kind": [0]}, "seconds": 1.0}


@pytest.fixture
def models(tmp_path):
    folder = tmp_path / "family" / "models"
    files = [folder / kind / NAMES[kind] for kind in BASE[1:]] + [folder / "mllm" / NAMES["mllm"] / "model.safetensors"]
    for file in (*files, folder.parent / "oracle.safetensors", *pair(folder)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(file.name.encode())
    return folder


def pair(folder):
    return [folder / kind / f"{ROW.arm}.safetensors" for kind in ("dla", "loras")]


def test_a_row_is_of_the_weights_that_drew_it(models, tmp_path):
    store = ResultStore(tmp_path, models, tmp_path / "none.json")
    store.path(ROW).write_text(json.dumps(RESULT))
    assert ResultStore(tmp_path, models, tmp_path / "none.json").read(ROW) == RESULT
    for changed in (pair(models)[1], models / "vae" / NAMES["vae"]):
        before = changed.read_bytes()
        changed.write_bytes(b"another")
        assert ResultStore(tmp_path, models, tmp_path / "none.json").read(ROW) is None
        changed.write_bytes(before)


def test_recorded_rows_stand_in_for_weights_that_do_not_ship_with_this_family(models, tmp_path):
    recorded = tmp_path / "recorded.json"
    store = ResultStore(tmp_path, models, recorded)
    store.path(ROW).write_text(json.dumps(RESULT))
    store.record(evidence_rows.ROWS)
    assert len({row.key for row in evidence_rows.ROWS}) == len(evidence_rows.ROWS)
    assert set(json.loads(recorded.read_text())["rows"]) == {ROW.key}
    for file in pair(models):
        file.unlink()
    store = ResultStore(tmp_path, models, recorded)
    assert not store.has_weights(ROW) and store.read(ROW) == RESULT | {"angles": [[1.235, 2.0]]}
    (models / "diffusion_models" / NAMES["diffusion_models"]).write_bytes(b"another DiT")
    assert ResultStore(tmp_path, models, recorded).read(ROW) is None


def test_metrics_of_known_readings():
    draw = random.Random("figures")
    examples = [world.test_example(draw, "view") for _ in range(80)]
    entries = [{"pictures": [e.target, *e.references]} for e in examples]

    def row(shown: int, right: tuple[str, ...]) -> Scores:
        """Every picture in the view of its target (0) or its reference (1), with these traits right and no others."""
        toys = [asdict(e.target.toys[0]) for e in examples]
        true = {name: [values.index(toy[name]) for toy in toys] for name, values in TRAITS.items()}
        wrong = {name: [(n + 1) % len(TRAITS[name]) for n in numbers] for name, numbers in true.items()}
        views = [entry["pictures"][shown].view for entry in entries]
        traits = {name: (true if name in right else wrong)[name] for name in TRAITS}
        return Scores.from_result({"angles": [[v.azimuth, v.polar] for v in views], "traits": traits}, entries)

    follows, copies = row(0, (*COARSE, "decal")), row(1, (*COARSE, *FINE))
    assert follows.metrics["follows"][0] == 1 and copies.metrics["follows"][0] == 0  # jitter is 8°, views 90° apart
    assert copies.metrics["azimuth"] == (0, 0, 0) and copies.metrics["recall"][0] == 1
    assert follows.metrics["coarse"][0] == 1 and follows.metrics["fine"][0] == pytest.approx(1 / 3)
    recall = copy_paste_report(follows.reference, follows.angles).average_recall
    assert float(follows.shares("recall").mean()) == pytest.approx(recall)

    assert verdict(follows, copies, "follows") == "holds here" and verdict(copies, follows, "fine") == "holds here"
    assert verdict(follows, copies, "recall") == "is contradicted here"
    assert "undecided" in verdict(follows, copies, "coarse") and "not measured" in verdict(None, copies, "coarse")
    assert paired_difference(copies, follows, "fine") == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert torch.equal(copies.shares("fine"), torch.ones(80).double())
    assert len(copies.select(torch.ones(200) > 0).angles) == 80  # a quick look draws fewer cases than there are
