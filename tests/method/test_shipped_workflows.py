"""The workflows that come with the pack: their titles, and what the editor's list of templates finds them by."""

import json

import pytest
from subject_dla.tools.comfy_client import workflow
from subject_dla.tools.comfy_client.editor_graph import WorkflowFileError
from subject_dla.tools.comfy_client.shipped import FOLDER, TITLES, find, shipped


def test_every_file_has_a_short_name_and_a_thumbnail():
    for kind in ("json", "jpg"):
        assert sorted(path.stem for path in FOLDER.glob(f"*.{kind}")) == sorted(TITLES.values()), kind
    assert list(TITLES.values()) == sorted(TITLES.values()), "numbers give the order"
    assert not set('%#?:\\/*"<>|') & set("".join(TITLES.values())), "part of an address, and of a file name on Windows"


@pytest.mark.parametrize("words", ["subject", "reference", "consistent character"])
def test_a_newcomers_words_find_one(words):
    """The newest editor wants every word in the title, an older one words near its start."""
    assert any(words in title.lower()[:45] for title in TITLES.values())


def test_short_names_and_the_file_names_of_0_1_0_are_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("paper", "paper.json", "workflows/paper.json", FOLDER / "paper.json", shipped("paper")):
        assert find(name).samefile(shipped("paper"))
        assert workflow.read(name) == json.loads(shipped("paper").read_text(encoding="utf-8"))
    (tmp_path / "paper.json").write_text('{"mine": 1}')
    assert workflow.read("paper.json") == {"mine": 1}
    with pytest.raises(WorkflowFileError, match="papers.json: there is no such workflow file"):
        workflow.read("papers.json")
