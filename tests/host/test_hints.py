"""Hints on nodes: images that a prompt names but nobody connected, and cut-outs whose background comes along."""

import sys
from types import SimpleNamespace

import folder_paths
import numpy
import pytest
import torch
from PIL import Image
from subject_dla.nodes import hints
from subject_dla.nodes.encode import SubjectAddIdentity, SubjectEncode
from subject_dla.nodes.translation import translate

ONE, TWO = torch.zeros(1, 32, 32, 3), torch.zeros(2, 32, 32, 3)


@pytest.mark.parametrize("prompt, sockets, named", [
    ("the cat of image 2 on a sofa", {"image_1": ONE}, ["2"]),
    ("the cat of image 2 beside image 1", {"image_1": TWO}, []),
    ("Image1 and image 3, <image4>", {"image_1": ONE, "image_2": ONE}, ["3", "4"]),
    ("图2中的猫和图像 3 里的狗", {"image_1": TWO}, ["3"]),
    ("photo 35mm, image 4k, picture 50mm, imagery 5, image 2024", {}, []),
    ("the subject on a beach", {}, []),
])  # fmt: skip
def test_images_that_the_prompt_names_without_being_there(prompt, sockets, named):
    found = hints.image_hints(SubjectEncode, prompt, sockets)
    assert all("提示词" in translate(text, "zh") for text in found)
    assert [text.split("image ")[1].split(",")[0] for text in found] == named, found


@pytest.mark.parametrize("alpha, cut_out", [(0, True), (255, False), (None, False)])
def test_a_cut_out_gets_a_hint_unless_its_mask_is_connected(tmp_path, monkeypatch, alpha, cut_out):
    pixels = numpy.full((8, 8, 4 if alpha is not None else 3), 200, numpy.uint8)
    if alpha is not None:
        pixels[:4, :, 3], pixels[4:, :, 3] = alpha, 255
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda *_: str(tmp_path))
    graph = {"1": {"class_type": "LoadImage", "inputs": {"image": "cat.png"}}, "2": {"inputs": {"image": ["1", 0]}}}
    monkeypatch.setattr(SubjectAddIdentity, "hidden", SimpleNamespace(prompt=graph, unique_id="2"))
    found = hints.image_hints(SubjectAddIdentity, "", {"image": ONE, "mask": None})
    assert all("抠图" in translate(text, "zh") for text in found)
    assert len(found) == cut_out and all("cat.png" in text and "InvertMask" in text for text in found)
    assert hints.image_hints(SubjectAddIdentity, "", {"image": ONE, "mask": ONE[..., 0]}) == []
    graph["1"]["inputs"]["image"] = "../none.png"
    assert hints.image_hints(SubjectAddIdentity, "", {"image": ONE}) == []


def test_hints_are_shown_and_logged_by_the_display_name(monkeypatch, caplog):
    sent, events = [], []
    monkeypatch.setattr(hints, "show_on_node", lambda *text: sent.append(text))
    monkeypatch.setattr(hints, "editor_of_run", lambda: lambda event, data: events.append((event, data["text"])))
    monkeypatch.setattr(SubjectEncode, "hidden", SimpleNamespace(prompt={}, unique_id="7"))
    hints.show_hints(SubjectEncode, ["one", "two"], "Images: 1")
    hints.show_hints(SubjectEncode, [], "Images: 2")
    assert sent == [("Images: 1\nWarning: one\nWarning: two", "7"), ("Images: 2", "7")]
    assert events == [("subject_dla.hint", "one"), ("subject_dla.hint", "two")]
    assert "Encode Subject: one" in caplog.text


def test_a_file_name_is_no_markup_on_a_node(monkeypatch):
    """The editor puts such a text into its page as HTML."""
    sent = []
    server = SimpleNamespace(client_id=None, send_progress_text=lambda text, *_, **__: sent.append(text))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    monkeypatch.setattr(SubjectEncode, "hidden", SimpleNamespace(prompt={}, unique_id="7"))
    hints.show_hints(SubjectEncode, ["<img src=x onerror=alert(1)>.png is cut out"], "Images: 1")
    assert sent == ["Images: 1\nWarning: ‹img src=x onerror=alert(1)›.png is cut out"]
