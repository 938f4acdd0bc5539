"""Many settings in one queued job: schedules over a grid of thresholds, and all pictures on one labelled sheet."""

import inspect

from comfy_api.latest import io, ui

from ..sampling.sweep import COMBINE, parse_numbers, threshold_sweep
from . import queued_graph
from .schema import Node, Stages, schema
from .stages import clock_input, preset_input

NUMBERS = "Numbers with commas between, such as 0.95, 0.85."


class SubjectThresholdSweep(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "stages",
            node_id="SubjectThresholdSweep",
            display_name="Threshold Sweep",
            description=(
                "Stage schedules over a grid of thresholds and strengths: what follows in the graph runs once for each,"
                " in one queued job. To one sheet with Contact Sheet."
            ),
            search_aliases=["tau grid", "xy plot", "stage sweep", "parameter sweep"],
            inputs=[
                preset_input(),
                clock_input(),
                io.String.Input(
                    "tau1",
                    default="0.97, 0.95, 0.85",
                    tooltip=f"Where the first stage (MLLM alone) ends, on the clock. {NUMBERS}",
                ),
                io.String.Input(
                    "tau2",
                    default="0.9, 0.85, 0.7",
                    tooltip=f"Where the MLLM's tokens go out, on the clock; read by paper alone. {NUMBERS}",
                ),
                io.Combo.Input(
                    "combine",
                    options=list(COMBINE),
                    default="grid",
                    tooltip=". ".join(f"{name}: {text}" for name, text in COMBINE.items())
                    + ". A grid leaves out what is out of order.",
                ),
                io.String.Input(
                    "mllm_strengths",
                    default="1",
                    tooltip=f"Strengths, 0 to 2, of the MLLM's tokens in the stages where they are on. {NUMBERS}",
                ),
                io.String.Input(
                    "vae_strengths",
                    default="1",
                    tooltip=f"Strengths, 0 to 2, of the references in the stages where they are on. {NUMBERS}",
                ),
                io.Boolean.Input(
                    "controls",
                    default=True,
                    tooltip="Both groups throughout, and MLLM only, come first, to compare with.",
                ),
            ],
            outputs=[
                Stages.Output(
                    "stages",
                    display_name="stages",
                    is_output_list=True,
                    tooltip="A list of schedules. To Staged Sampler or Staged Guider, with a fixed seed.",
                ),
                io.String.Output(
                    "labels",
                    display_name="labels",
                    is_output_list=True,
                    tooltip="What each schedule is. To Contact Sheet.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, tau1):
        widgets = queued_graph.queued(cls.hidden.unique_id)
        given = [widgets.get(name) for name in inspect.signature(_sweep).parameters]
        if any(value is None or isinstance(value, list | dict) for value in given):
            return True  # linked, or refused when it runs
        try:
            _sweep(*given)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, preset, clock, tau1, tau2, combine, mllm_strengths, vae_strengths, controls) -> io.NodeOutput:
        found = _sweep(preset, clock, tau1, tau2, combine, mllm_strengths, vae_strengths, controls)
        return io.NodeOutput([stages for _, stages in found], [label for label, _ in found])


def _sweep(preset, clock, tau1, tau2, combine, mllm_strengths, vae_strengths, controls) -> list:
    """(label, schedule) of each setting."""
    return threshold_sweep(
        preset, clock, parse_numbers(tau1, "tau1"), parse_numbers(tau2, "tau2"),
        parse_numbers(mllm_strengths, "mllm_strengths", 2), parse_numbers(vae_strengths, "vae_strengths", 2),
        combine=combine, controls=controls,
    )  # fmt: skip


class SubjectContactSheet(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "measure",
            node_id="SubjectContactSheet",
            display_name="Contact Sheet",
            description=(
                "All pictures of a queued job on one sheet, each over its label and, if you like, its figures. Takes"
                " lists, as a sweep or Prompt List makes them, and batches."
            ),
            search_aliases=["grid", "image grid", "labelled sheet", "xy plot", "compare pictures"],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="The pictures, in order; a batch is several. Shown whole."),
                io.String.Input(
                    "labels",
                    optional=True,
                    force_input=True,
                    tooltip="As many labels as pictures, or as batches. Left open: the pictures are numbered.",
                ),
                io.String.Input(
                    "figures",
                    optional=True,
                    force_input=True,
                    tooltip=(
                        "Text below each label, such as scores: a list of as many as labels, or one for the whole"
                        " sheet."
                    ),
                ),
                io.Image.Input("references", optional=True, tooltip="Pictures for a row of their own at the top."),
                io.String.Input("title", default="", optional=True, tooltip="A line at the top of the sheet."),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=32,
                    optional=True,
                    tooltip="Pictures in a row. 0: as many as make the sheet about square, six at most.",
                ),
                io.Int.Input(
                    "side",
                    default=256,
                    min=64,
                    max=2048,
                    step=16,
                    optional=True,
                    tooltip="Pixels that each picture is fitted into, a side.",
                ),
            ],
            outputs=[io.Image.Output("sheet", display_name="sheet", tooltip="The sheet, one picture. To Save Image.")],
        )

    @classmethod
    def execute(
        cls, images, labels=None, figures=None, references=None, title=("",), columns=(0,), side=(256,)
    ) -> io.NodeOutput:
        from ..common.drawing.sheet import sheet_of_batches

        sheet = sheet_of_batches(
            images, labels, figures, references or (), title=title[0], columns=columns[0], side=side[0]
        )
        return io.NodeOutput(sheet, ui=ui.PreviewImage(sheet, cls=cls))


NODES = [SubjectThresholdSweep, SubjectContactSheet]
