"""Report files that the score nodes of 0.1.0 wrote: today's reader reads them, and today's writers write the same."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from subject_dla.evaluation.copy_paste.metrics import compare
from subject_dla.evaluation.copy_paste.report import report_csv, report_json
from subject_dla.evaluation.identity import IdentityMetric, json_report
from subject_dla.tools.benchmark.score_table import as_json, read_systems, score_table

REPORTS = Path(__file__).resolve().parents[1] / "fixtures" / "0.1.0" / "reports"
POSE = {  # mean, low, high, as 0.1.0 read these files
    "azimuth": (57, 0, 180), "polar": (6, 0, 31.815916378496762),
    "average_recall": (1 / 3, 0.10443353952677975, 0.6819203827386573),
}  # fmt: skip
IDENTITY = {
    "DINO-I": (0.9969733682594732, 0.9961253965230962, 0.9978213399958503),
    "CLIP-I": (0.9983916391099082, 0.9972070233891722, 0.9995762548306443),
    "CLIP-T": (-0.17918363767974524, -0.18973098994048873, -0.16863628541900175),
}


def test_the_score_table_of_then():
    for names, expected in ((("copy_paste.json", "identity.json"), POSE | IDENTITY), (("copy_paste.csv",), POSE)):
        systems = read_systems([f"ours={REPORTS / name}" for name in names])
        found = as_json(systems)["ours"]
        assert found.keys() == expected.keys()
        for name, values in found.items():
            assert tuple(values.values()) == pytest.approx(expected[name], abs=1e-9), name
        assert "3 of 4 pairs count" in score_table(systems)


def test_the_same_pairs_give_the_same_copy_paste_files():
    then = json.loads((REPORTS / "copy_paste.json").read_text(encoding="utf-8"))
    pairs = {}
    for name in ("outputs", "floor"):
        rows = [row for row in then["pairs"] if row["set"] == name]
        sides = (("reference_azimuth", "reference_polar", "reference_confidence"), ("azimuth", "polar", "confidence"))
        pairs[name] = compare(*(torch.tensor([[row[k] for k in side] for row in rows], dtype=float) for side in sides))
    now = json.loads(report_json(**pairs, model="oracle.safetensors"))
    assert now["pairs"] == then["pairs"] and now.keys() == then.keys()
    for name, metrics in then["figures"].items():
        for key, value in metrics.items():
            assert now["figures"][name][key] == pytest.approx(value, abs=1e-9), (name, key)
    assert now["coverage"] == pytest.approx(then["coverage"], abs=1e-9)
    assert report_csv(**pairs) == (REPORTS / "copy_paste.csv").read_text(encoding="utf-8")


def test_the_same_metrics_give_the_same_identity_file():
    then = json.loads((REPORTS / "identity.json").read_text(encoding="utf-8"))
    metrics = [IdentityMetric(row.pop("figure"), **row) for row in deepcopy(then["figures"])]
    more = {key: then[key] for key in ("prompts", "subjects", "reference_subjects")}
    now = json.loads(json_report(metrics, then["notes"][2:], **more))
    assert list(now) == list(then) and {**now, "notes": None} == {**then, "notes": None}
    assert now["notes"][2:] == then["notes"][2:] and len(now["notes"]) == len(then["notes"])
