"""Prior preservation: what a LoRA must not forget."""

from comfy_api.latest import io

from ...trainers.data.encode import list_literal_marks
from ...trainers.methods.prior import PriorData, PriorSettings
from .. import host
from ..fields import CATEGORY, EncodedType, settings_from_widgets, settings_inputs
from .job import hash_clip

PriorType = io.Custom("TRAINYARD_PRIOR")


class PriorPreservation(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardPrior",
            display_name="Prior Preservation",
            category=f"{CATEGORY}/settings",
            description="Keeps the model drawing a whole class as before while a LoRA learns one instance of it: "
            "from class prompts alone, or from class images.",
            search_aliases=[
                "regularisation images",
                "regularization",
                "class images",
                "dreambooth",
                "forgetting",
                "differential output preservation",
                "reg images",
            ],
            inputs=[
                *settings_inputs(PriorSettings),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder of the model; it encodes the class prompts once and leaves the GPU.",
                ),
                EncodedType.Input(
                    "encoded",
                    optional=True,
                    tooltip="Class images (a regularisation set) from Encode Dataset, in addition to class "
                    "prompts or instead of them.",
                ),
            ],
            outputs=[PriorType.Output("prior", display_name="prior", tooltip="For the prior input of Train LoRA.")],
        )

    @classmethod
    def execute(cls, clip=None, encoded=None, **widgets):
        settings = settings_from_widgets(PriorSettings, widgets)
        conds, source = encode_class_prompts(clip, settings.class_prompts())
        if encoded is not None:
            encoded.require_conditionings()
        return io.NodeOutput(PriorData(settings, conds, encoded, source))


def encode_class_prompts(clip, prompts) -> tuple[dict, str]:
    """(prompt -> conditioning, identity of how they were encoded). Class prompts are read as captions are, because they
    stand beside them."""
    if not prompts:
        return {}, ""
    host.encoders.check_clip(clip)
    host.checks.check_caption_lengths(clip, prompts)
    return host.encoders.encode_captions_once(clip, prompts), "/".join([hash_clip(clip), *list_literal_marks(prompts)])


NODES = [PriorPreservation]
