"""The workflows that the pack brings: short names, for commands, and titles.

A title is the name of the file in `workflows/`, since that is all that the editor's list of templates shows and
searches, the newest shows about 28 letters of it. The numbers give its order; titles must differ from those of every
other pack.
"""

from pathlib import Path

from ...common.bootstrap import ROOT

FOLDER = ROOT / "workflows"
TITLES = {
    "qwen_image_edit_one_node": "01 One node in your workflow - subject reference for Qwen-Image-Edit",
    "demo": "02 Demo - first picture of a subject without a download",
    "batch_prompts": "03 Consistent character, many prompts - Qwen-Image-Edit",
    "several_subjects": "04 Two subjects, each with a reference - Qwen-Image-Edit",
    "qwen_image_edit_staged": "05 Qwen-Image-Edit - the reference joins later, every part a node",
    "qwen_image_2_1_staged": "06 Qwen-Image 2.1 - the reference joins later",
    "flux_uno_staged": "07 FLUX.1 with UNO or USO - the reference joins later",
    "omnigen2_staged": "08 OmniGen2 - the reference joins later",
    "threshold_sweep": "09 When should the reference join - thresholds on one sheet",
    "train_dla": "10 Train for FLUX.1 - a DLA on your subject",
    "train_dla_klein": "11 Train for FLUX.2 Klein, 24 GB - a DLA on your subject",
    "use_trained_dla": "12 Your trained DLA - a picture of your subject",
    "paper": "13 Paper - the whole pipeline with a DLA",
    "mllm_only": "14 Paper - MLLM tokens only, for prompts to reason about",
    "layer_roles": "15 Paper - what the layers of the MLLM do",
    "system_omnigen2": "21 System - OmniGen2, compared in the paper",
    "system_qwen_image_edit": "22 System - Qwen-Image-Edit, compared in the paper",
    "system_uso": "23 System - USO, compared in the paper",
    "system_uno": "24 System - UNO, compared in the paper",
    "system_dreamo": "25 System - DreamO, compared in the paper",
}


def shipped(name: str) -> Path:
    """The workflow file of a short name."""
    return FOLDER / f"{TITLES[name]}.json"


def find(path: str | Path) -> Path:
    """The workflow file that is meant: the one at `path`, or the shipped one of this short name.

    So a short name will do, and `workflows/paper.json`, as in 0.1.0.
    """
    path = Path(path)
    known = path.stem in TITLES and path.suffix in ("", ".json")
    return shipped(path.stem) if known and not path.is_file() else path
