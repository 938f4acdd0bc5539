"""Nodes for layer roles: layers set to zero per modality, sweeps over groups, and the weights of a DLA's pooling."""

from comfy_api.latest import io, ui

from .schema import DLA, Features, Node, schema

UNTOUCHED = "untouched"
LIMIT = 256  # trials of a sweep, each with a copy of the features: as many as of thresholds
CHOICES = [UNTOUCHED, "zero", "keep"]
EACH = {"text and image": ("text", "image"), "text": ("text",), "image": ("image",)}
BOTH = {"zero and keep": ("zero", "keep"), "zero": ("zero",), "keep": ("keep",)}
LAYERS_TIP = (
    'Layer numbers and ranges such as "0-9, 20-28" (0: the embeddings; the highest: after the last layer), or early,'
    " middle, late, all: the paper's groups 0-9, 10-19 and 20-28, scaled where the MLLM has another depth."
)


def _action(name: str):
    return io.Combo.Input(
        name,
        options=CHOICES,
        default=UNTOUCHED,
        tooltip=f"Layers of the {name} tokens: zero the ones listed below, or keep these and zero the rest.",
    )


class SubjectAblateLayers(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "measure",
            node_id="SubjectAblateLayers",
            display_name="Ablate Layers",
            description="Sets layers of the MLLM's hidden states to zero, for text and image tokens separately.",
            search_aliases=["layer ablation", "zero layers", "keep layers", "layer roles"],
            inputs=[
                Features.Input("features", tooltip="From Encode Subject."),
                _action("text"),
                io.String.Input("text_layers", default="early", tooltip=LAYERS_TIP),
                _action("image"),
                io.String.Input("image_layers", default="early", tooltip=LAYERS_TIP),
            ],
            outputs=[
                Features.Output(
                    "ablated", display_name="features", tooltip="The same with those layers zero. To Aggregate Layers."
                )
            ],
        )

    @classmethod
    def execute(cls, features, text, text_layers, image, image_layers) -> io.NodeOutput:
        from ..dla.ablation import ablate_lists

        choices = {"text": (text, text_layers), "image": (image, image_layers)}
        return io.NodeOutput(ablate_lists(features, **{key: c for key, c in choices.items() if c[0] != UNTOUCHED}))


class SubjectAblationSweep(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "measure",
            node_id="SubjectAblationSweep",
            display_name="Ablation Sweep",
            description=(
                "The features as they are, then with each group of layers zeroed and each kept alone, per modality:"
                " the nodes behind it run once for each, in one queued job. Contact Sheet puts the results together."
            ),
            search_aliases=["layer sweep", "layer roles", "ablation study", "layer groups"],
            inputs=[
                Features.Input("features", tooltip="From Encode Subject."),
                io.Combo.Input(
                    "modalities",
                    options=list(EACH),
                    default="text and image",
                    tooltip="Whose layers are ablated, one modality at a time. Text alone if there is no reference.",
                ),
                io.Combo.Input(
                    "actions",
                    options=list(BOTH),
                    default="zero and keep",
                    tooltip="zero: each group in turn is set to zero. keep: all but that group are.",
                ),
                io.String.Input(
                    "groups",
                    default="early; middle; late",
                    tooltip="Groups of layers with semicolons between, each " + LAYERS_TIP[0].lower() + LAYERS_TIP[1:],
                ),
            ],
            outputs=[
                Features.Output(
                    "ablated",
                    display_name="features",
                    is_output_list=True,
                    tooltip="A list of features, the untouched ones first. To Aggregate Layers.",
                ),
                io.String.Output(
                    "labels",
                    display_name="labels",
                    is_output_list=True,
                    tooltip="What each entry of the list is. To Contact Sheet.",
                ),
            ],
        )

    @classmethod
    def execute(cls, features, modalities, actions, groups) -> io.NodeOutput:
        from ..dla.ablation import parse_layers, sweep

        parts = [parse_layers(part, features.info.layers) for part in groups.split(";") if part.strip()]
        trials = list(sweep(features.info.layers, parts, EACH[modalities], BOTH[actions]))
        if len(trials) > LIMIT:
            raise ValueError(f"This sweep has {len(trials)} settings, expected {LIMIT} at most. Take out some groups.")
        return io.NodeOutput([trial.apply(features) for trial in trials], [trial.label for trial in trials])


class SubjectLayerWeights(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "measure",
            node_id="SubjectLayerWeights",
            display_name="Layer Weights",
            description="The weight that a DLA gives to every layer: heat map, overlay on a reference, description.",
            search_aliases=["attention map", "layer attention", "dla weights", "heat map", "layer roles"],
            is_output_node=True,
            inputs=[
                Features.Input("features", tooltip="From Encode Subject, or from Ablate Layers."),
                DLA.Input("dla", tooltip="The DLA whose weights are shown, trained on this MLLM."),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The reference image under the overlay, as Encode Subject read it. None: no overlay.",
                ),
                io.Int.Input(
                    "image_number",
                    default=1,
                    min=1,
                    max=10,
                    optional=True,
                    tooltip="Which of Encode Subject's reference images that is, counted over its inputs and batches.",
                ),
                io.Int.Input(
                    "layer",
                    default=-1,
                    min=-1,
                    max=1024,
                    optional=True,
                    tooltip="What the overlay shows: the weight of this layer, or for -1 each token's mean layer.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "heat_map", display_name="heat map", tooltip="Tokens by layers, and their mean, per modality."
                ),
                io.Image.Output(
                    "overlay",
                    display_name="overlay",
                    tooltip="The reference image under the weights. Without an image, nodes connected here do not run.",
                ),
                io.String.Output("text", display_name="text", tooltip="Mean layer, heaviest layers and group shares."),
            ],
        )

    @classmethod
    def execute(cls, features, dla, image=None, image_number=1, layer=-1) -> io.NodeOutput:
        from comfy_execution.graph import ExecutionBlocker

        from ..evaluation.layer_weights_plot import draw_layer_weights
        from ..loaders.images import collect_images

        picture = None if image is None else collect_images(image[:1])[0]
        maps, over, text = draw_layer_weights(features, dla, picture, image_number - 1, None if layer < 0 else layer)
        shown = [ui.PreviewImage(pictures, cls=cls).as_dict() for pictures in (maps, over) if pictures is not None]
        images = [image for preview in shown for image in preview["images"]]
        blocked = ExecutionBlocker(None) if over is None else over
        return io.NodeOutput(maps, blocked, text, ui={**shown[0], "images": images, "text": (text,)})


NODES = [SubjectAblateLayers, SubjectAblationSweep, SubjectLayerWeights]
