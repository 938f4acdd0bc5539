"""How much of the references' pose went into the outputs: the copy-paste metrics over a batch or a whole queue."""

from comfy_api.latest import io, ui

from .files import report_path, save_reports
from .schema import CAPTION_TIP, Node, Orientation, output, schema


class SubjectCopyPasteReport(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "measure",
            node_id="SubjectCopyPasteReport",
            display_name="Copy-Paste Report",
            description=(
                "How far the subjects in the images turned away from their references: mean azimuth and polar"
                " difference and average recall, with coverage, 95 % intervals and the orientation model's own error"
                " as the floor. A table, a plot, and CSV and JSON files in the output folder."
            ),
            search_aliases=[
                "pose diversity",
                "azimuth",
                "recall",
                "orientation difference",
                "copy and paste",
                "metric",
            ],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                Orientation.Input("orientation_model", tooltip="From Load Orientation Model."),
                io.Image.Input(
                    "references",
                    tooltip="The subject before: one picture for all images, or one for each in the same order.",
                ),
                io.Image.Input(
                    "images",
                    tooltip="The outputs. Batches and lists of a queue, from Prompt List for instance, are one set.",
                ),
                io.Float.Input(
                    "min_confidence",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "A pair counts where the orientation model is this sure, in both pictures, that the subject has"
                        " a front. Metrics of all pairs are given too. Orient Anything's own limit is 0.5."
                    ),
                ),
                io.String.Input(
                    "filename_prefix",
                    default="copy_paste/report",
                    tooltip=(
                        "Of the CSV and JSON files in the output folder, as in Save Image: it may hold folders and"
                        " parts such as %year%."
                    ),
                ),
                io.Mask.Input(
                    "reference_masks",
                    optional=True,
                    tooltip="1 where the subject is, one for all or for each. Left open: alpha, or whole pictures.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="1 where the subject is, one for all or for each. Left open: alpha, or whole pictures.",
                ),
            ],
            outputs=[
                output(io.String, "report", "Coverage and the table, in markdown."),
                output(io.Image, "plot", "Where the subjects face, how far they turned, and the table."),
                output(io.String, "json", "Every metric with its interval, and every pair."),
                output(io.String, "figures", CAPTION_TIP, is_list=True),
            ],
        )

    @classmethod
    def execute(
        cls, orientation_model, references, images, min_confidence, filename_prefix, reference_masks=None, masks=None
    ) -> io.NodeOutput:
        from ..evaluation.copy_paste.measure import copy_paste

        path = report_path(filename_prefix[0])
        model, threshold = orientation_model[0], min_confidence[0]  # the host passes every input as a list
        found = copy_paste(model, references, images, reference_masks, masks, threshold)
        save_reports(path, csv=found.csv, json=found.json)
        shown = ui.PreviewImage(found.plot, cls=cls).as_dict()
        return io.NodeOutput(found.text, found.plot, found.json, found.captions, ui={**shown, "text": (found.text,)})


NODES = [SubjectCopyPasteReport]
