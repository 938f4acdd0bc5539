"""Which way a subject faces: Orient Anything V1, for the copy-paste metrics."""

from comfy_api.latest import io, ui

from . import files
from .schema import Node, Orientation, advanced, output, schema

ANGLES = {
    "azimuth": "degrees, 0 to 360: 0 faces the camera, 90 faces the left of the picture.",
    "polar": "degrees, -90 to 90: how far the camera is above the subject.",
    "rotation": "degrees: how far the picture is turned, counter-clockwise.",
    "confidence": "0 to 1: how sure it is that the subject has a front.",
}


class SubjectLoadOrientation(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "load",
            node_id="SubjectLoadOrientation",
            display_name="Load Orientation Model",
            description=(
                "Loads Orient Anything V1 (small, base or large, by the file's shapes), which reads from a picture"
                " which way its subject faces."
            ),
            search_aliases=["orient anything", "pose estimation", "azimuth", "load orientation"],
            inputs=[
                io.Combo.Input(
                    "orientation",
                    options=files.options("orientation"),
                    tooltip=(
                        "An Orient Anything V1 file under models/orientation: the published .pt, or a .safetensors."
                        " Code inside a .pt is refused, never run."
                    ),
                ),
                advanced(
                    io.Boolean.Input,
                    "save_safetensors",
                    default=False,
                    tooltip="Of a .pt, write a .safetensors copy beside it, unless there is one. Press R to see it.",
                ),
            ],
            outputs=[output(Orientation, "ORIENTATION_MODEL", "To Subject Orientation.")],
        )

    validate_inputs = files.check(orientation="orientation")

    @classmethod
    def fingerprint_inputs(cls, orientation, **_):
        return files.fingerprint("orientation", orientation)

    @classmethod
    def execute(cls, orientation, save_safetensors=False) -> io.NodeOutput:
        from ..loaders.orient_anything.model import load_orientation

        return io.NodeOutput(load_orientation(orientation, save_safetensors))


class SubjectOrientation(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "measure",
            node_id="SubjectOrientation",
            display_name="Subject Orientation",
            description=(
                "Which way the subject of each picture faces: azimuth, polar, rotation and how sure that is, with the"
                " axes drawn over the pictures. Reads one subject per picture; a mask makes it far more reliable."
            ),
            search_aliases=["orient anything", "pose", "azimuth polar", "view angle", "axes overlay"],
            is_output_node=True,
            inputs=[
                Orientation.Input("orientation_model", tooltip="From Load Orientation Model."),
                io.Image.Input(
                    "image", tooltip="The pictures, any number in a batch. One with alpha is cut out by it."
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "White where the subject is: it is cut out onto black, as the model was trained. One mask for"
                        " all pictures or one for each. Scaled to the picture. The help page says where to get one."
                    ),
                ),
                io.Float.Input(
                    "min_confidence",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip=(
                        "Below this the subject has no clear front: axes are drawn grey and the table says so. The"
                        " angles are given all the same."
                    ),
                ),
            ],
            outputs=[
                output(io.Image, "overlay", "The pictures with the subject's axes."),
                output(io.String, "text", "A table, one line per picture."),
                *(output(io.Float, name, f"A list of {what}", is_list=True) for name, what in ANGLES.items()),
            ],
        )

    @classmethod
    def execute(cls, orientation_model, image, mask=None, min_confidence=0.5) -> io.NodeOutput:
        from ..evaluation.orientation_report import orientation_report

        found = orientation_report(orientation_model, image, mask, min_confidence)
        columns = (column.tolist() for column in vars(found.angles).values())
        return io.NodeOutput(found.overlay, found.text, *columns, ui=ui.PreviewImage(found.overlay, cls=cls))


NODES = [SubjectLoadOrientation, SubjectOrientation]
