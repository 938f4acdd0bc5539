"""Nodes that load models: the MLLM (a folder, or the host's CLIP), the DLA, and all four parts at once."""

from comfy_api.latest import io

from . import files
from .schema import DLA, MLLM, NONE, WEIGHT_DTYPES, Node, advanced, schema

DTYPE_TIP = (
    "How the MLLM's weights are kept in memory. default: as in the file, or the host's choice for it. "
    "fp8 halves the memory of bf16; the arithmetic stays in bf16 or fp16."
)


class SubjectLoadMLLM(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "load",
            node_id="SubjectLoadMLLM",
            display_name="Load MLLM",
            description="Loads an InternVL3 (the paper's), Qwen2.5-VL, Qwen3-VL, Qwen3.5 or Gemma 4 from models/mllm.",
            search_aliases=["internvl", "qwen vl", "vision language model", "vlm", "multimodal text encoder"],
            inputs=[
                io.Combo.Input(
                    "mllm",
                    options=files.options("mllm"),
                    tooltip="A folder under models/mllm, as on Hugging Face (InternVL3: the -hf variant).",
                ),
                advanced(io.Combo.Input, "weight_dtype", options=WEIGHT_DTYPES, default="default", tooltip=DTYPE_TIP),
            ],
            outputs=[MLLM.Output("MLLM", display_name="MLLM", tooltip="To Encode Subject.")],
        )

    validate_inputs = files.check(mllm="mllm")

    @classmethod
    def fingerprint_inputs(cls, mllm, **_):
        return files.fingerprint("mllm", mllm)

    @classmethod
    def execute(cls, mllm, weight_dtype="default") -> io.NodeOutput:
        from ..loaders.mllm import load_mllm

        return io.NodeOutput(load_mllm(mllm, weight_dtype))


class SubjectMLLMFromCLIP(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "load",
            node_id="SubjectMLLMFromCLIP",
            display_name="MLLM from CLIP",
            description="The LLM of a text encoder that the host has loaded, as the MLLM; not all of them read images.",
            search_aliases=["qwen2.5 vl clip", "qwen3 vl clip", "native text encoder"],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip=(
                        "From the host's Load CLIP, with the type of the model that will sample: qwen_image,"
                        " longcat_image, krea2, boogu, joyimage or mage (read images); flux2, lumina2 or omnigen2"
                        " (text only)."
                    ),
                )
            ],
            outputs=[MLLM.Output("MLLM", display_name="MLLM", tooltip="To Encode Subject.")],
        )

    @classmethod
    def execute(cls, clip) -> io.NodeOutput:
        from ..loaders.mllm import mllm_from_clip

        return io.NodeOutput(mllm_from_clip(clip))


class SubjectLoadDLA(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "load",
            node_id="SubjectLoadDLA",
            display_name="Load DLA",
            description="Loads a Dual Layer Aggregator, which pools the MLLM's layers into the DiT's context.",
            search_aliases=["dual layer aggregator", "layerwise attention pooling", "LAP", "connector"],
            inputs=[
                io.Combo.Input(
                    "dla",
                    options=files.options("dla"),
                    tooltip="A file under models/dla. The paper's weights are not published; train your own.",
                )
            ],
            outputs=[
                DLA.Output(
                    "DLA",
                    display_name="DLA",
                    tooltip="To Aggregate Layers, and to Encode Subject so that only the layers it pools are run.",
                )
            ],
        )

    validate_inputs = files.check(dla="dla")

    @classmethod
    def fingerprint_inputs(cls, dla, **_):
        return files.fingerprint("dla", dla)

    @classmethod
    def execute(cls, dla) -> io.NodeOutput:
        from ..loaders.dla import load_dla

        return io.NodeOutput(load_dla(dla))


class SubjectLoadPipeline(Node):
    @classmethod
    def define_schema(cls):
        return schema(
            "load",
            node_id="SubjectLoadPipeline",
            display_name="Load Subject Pipeline",
            description="DiT, VAE, MLLM and DLA in one node; parts that do not match are refused before loading.",
            search_aliases=["subject pipeline", "load all", "subject driven generation"],
            inputs=[
                io.Combo.Input(
                    "diffusion_model",
                    options=files.options("diffusion_models"),
                    tooltip="The DiT, under models/diffusion_models. GGUF and the like need their own loaders.",
                ),
                io.Combo.Input("vae", options=files.options("vae"), tooltip="The DiT's VAE, under models/vae."),
                io.Combo.Input(
                    "mllm", options=files.options("mllm"), tooltip="A Hugging Face folder under models/mllm."
                ),
                io.Combo.Input(
                    "dla",
                    options=[NONE, *files.options("dla")],
                    tooltip="A DLA for this MLLM and DiT. none: the MLLM's last layer, as stock Qwen-Image reads it.",
                ),
                advanced(
                    io.Combo.Input,
                    "weight_dtype",
                    options=["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"],
                    default="default",
                    tooltip="How the DiT's weights are kept in memory, as in the host's Load Diffusion Model.",
                ),
                advanced(
                    io.Combo.Input, "mllm_weight_dtype", options=WEIGHT_DTYPES, default="default", tooltip=DTYPE_TIP
                ),
            ],
            outputs=[
                io.Model.Output(
                    "MODEL", display_name="MODEL", tooltip="The DiT: LoRAs go here, then Add Identity and a sampler."
                ),
                io.Vae.Output("VAE", display_name="VAE", tooltip="To Add Identity and VAE Decode."),
                MLLM.Output("MLLM", display_name="MLLM", tooltip="To Encode Subject."),
                DLA.Output(
                    "DLA", display_name="DLA", tooltip="To Encode Subject and Aggregate Layers; empty for none."
                ),
            ],
        )

    validate_inputs = files.check(diffusion_model="diffusion_models", vae="vae", mllm="mllm", dla="dla")

    @classmethod
    def fingerprint_inputs(cls, diffusion_model, vae, mllm, dla, **_):
        names = {"diffusion_models": diffusion_model, "vae": vae, "mllm": mllm, "dla": dla}
        return [files.fingerprint(kind, name) for kind, name in names.items()]

    @classmethod
    def execute(
        cls, diffusion_model, vae, mllm, dla, weight_dtype="default", mllm_weight_dtype="default"
    ) -> io.NodeOutput:
        from ..loaders.pipeline import load_pipeline

        files.require(diffusion_models=diffusion_model, vae=vae, mllm=mllm, dla=None if dla == NONE else dla)
        return io.NodeOutput(
            *load_pipeline(diffusion_model, vae, mllm, None if dla == NONE else dla, weight_dtype, mllm_weight_dtype)
        )


NODES = [SubjectLoadMLLM, SubjectMLLMFromCLIP, SubjectLoadDLA, SubjectLoadPipeline]
