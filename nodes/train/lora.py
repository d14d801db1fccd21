"""LoRA files: save, load, apply, and the plot of a run."""

import numpy as np
import torch
from comfy_api.latest import io, ui

from ...trainers.files import as_lora_file, read_lora, read_safetensors, write_lora
from ...trainers.monitor.plots import draw_loss_plot
from ...trainers.settings import COMFYUI, EXPORT_TARGETS
from .. import host, paths
from ..fields import CATEGORY, LoraModelType, LossMapType, graph_metadata


class SaveLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardSaveLora",
            display_name="Save LoRA (Trainyard)",
            category=CATEGORY,
            description="Writes a trained LoRA to output/loras, for ComfyUI or another program, with full metadata, "
            "then reads it back and compares. Drop the file on ComfyUI to get its training graph back.",
            search_aliases=["export lora", "save lora", "safetensors", "diffusers", "convert lora", "lycoris"],
            inputs=[
                LoraModelType.Input("lora", tooltip="The LORA_MODEL of a Train node."),
                io.String.Input(
                    "name",
                    default="my_lora",
                    tooltip="File name in output/loras; folder/name creates a folder. An existing file is never "
                    "overwritten.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Check that ComfyUI's loader finds every layer of the file in this MODEL. Needed to save "
                    "for another program.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The same for the CLIP, if the text encoder was trained.",
                ),
                io.Combo.Input(
                    "target",
                    options=list(EXPORT_TARGETS),
                    default=COMFYUI,
                    optional=True,
                    tooltip="The program the file is for. All but ComfyUI need MODEL, because names and DoRA depend on "
                    "it. diffusers gets a LoRA of the same effect from LoHa and LoKr.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=4096,
                    optional=True,
                    advanced=True,
                    tooltip="The highest rank of an adapter that has to be converted for `target`. 0 loses nothing, "
                    "but the file may be large. (0 to 4096)",
                ),
            ],
            outputs=[io.String.Output("path", display_name="path", tooltip="The path of the file.")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, lora, name, model=None, clip=None, target=COMFYUI, rank=0):
        lora, lost = as_lora_file(lora), 0.0
        if model is not None:
            host.lora_keys.check_lora_loads(model, clip, lora)
        if target != COMFYUI:
            lora, lost = export_for_program(lora, model, clip, target, rank)
        path = paths.new_lora_path(name, lambda there: file_matches_lora(there, lora))
        saved_before = path.exists()
        if not saved_before:
            write_lora(path, lora, graph_metadata(cls.hidden))
        if not file_matches_lora(path, lora):
            raise RuntimeError(f"{path} does not hold what was written; the disk may be failing. Save it elsewhere.")
        how = "was saved before" if saved_before else "read back and equal"
        line = (
            f"{path.name}: {len(host.lora_keys.list_lora_layers(lora))} layers, {path.stat().st_size / 2**20:.1f} MiB, "
            f"{how}. {describe_reach(lora, target, lost)}"
        )
        host.progress.show_node_text(line, cls.hidden.unique_id)
        return io.NodeOutput(str(path), ui=ui.PreviewText(line))


def export_for_program(lora, model, clip, target: str, rank: int):
    """(the LoRA as `target` reads it, the largest share of a layer's change that was lost). Raises ValueError for what
    it cannot read."""
    from ..host.lora_export import export_lora

    if not lora:
        raise ValueError("This LoRA is empty: no layer has learnt anything yet. Train it for more steps.")
    if model is None:
        raise ValueError(
            f"target is {target}: connect the MODEL that the LoRA was trained on, and its CLIP if the text encoder was "
            "trained. The names of the layers are taken from there."
        )
    return export_lora(lora, model, clip, target, rank)


def describe_reach(lora, target: str, lost: float) -> str:
    """Which programs load the file, and what its conversion lost."""
    from ...trainers.adapters.exports import list_kinds, list_readers

    told = (
        f"Loads in {', '.join(list_readers(target, list_kinds(lora), lora.metadata.get('ss_base_model_version', '')))}."
    )
    if lost < 1e-5:
        return told
    return f"{told} Converting it lost at most {lost:.2%} of a layer's change; a higher rank loses less."


def file_matches_lora(path, lora) -> bool:
    """True if the file holds these very tensors."""
    try:
        there, _ = read_safetensors(path)
    except ValueError:  # a damaged file
        return False
    return there.keys() == lora.keys() and all(torch.equal(there[k], lora[k].cpu()) for k in there)


def tell_on_node(node, text: str) -> None:
    """Show it on the node and in the log."""
    host.progress.log_warning(text)
    host.progress.show_node_text(text, node.hidden and node.hidden.unique_id)


class LoadLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardLoadLora",
            display_name="Load LoRA File (Trainyard)",
            category=CATEGORY,
            description="Loads a LoRA file as LORA_MODEL, with its metadata: to apply it or to inspect it.",
            search_aliases=["open lora", "lora metadata"],
            inputs=[
                io.Combo.Input("file", options=paths.lora_names(), tooltip="A LoRA from models/loras or output/loras.")
            ],
            outputs=[
                LoraModelType.Output("lora", display_name="lora", tooltip="For Apply LoRA and Save LoRA."),
                io.String.Output("about", display_name="about", tooltip="The file's metadata, one entry per line."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file):
        about = paths.lora_path(file).stat()
        return (file, about.st_mtime_ns, about.st_size)

    @classmethod
    def execute(cls, file):
        lora = read_lora(paths.lora_path(file))
        if lora.damage:
            tell_on_node(cls, lora.damage)
        told = [f"{k}: {v}" for k, v in sorted(lora.metadata.items()) if k not in ("workflow", "prompt")]
        return io.NodeOutput(lora, "\n".join([*filter(None, [lora.damage]), *told]))


class ApplyLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardApplyLora",
            display_name="Apply LoRA (Trainyard)",
            category=CATEGORY,
            description="Applies a LoRA to MODEL and CLIP. The inputs are not changed.",
            search_aliases=["lora loader", "use lora", "lora strength"],
            inputs=[
                io.Model.Input("model", tooltip="The model the LoRA was trained on, or a related model."),
                LoraModelType.Input("lora", tooltip="A LORA_MODEL of a Train node or of Load LoRA File."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.05,
                    tooltip="1 is as trained, 0 is off, below 0 is the opposite. (-20 to 20)",
                ),
                io.Clip.Input("clip", optional=True, tooltip="The CLIP, if the LoRA holds text-encoder layers."),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="A clone with the LoRA applied as patches."),
                io.Clip.Output("clip", display_name="clip", tooltip="The same for the CLIP, if one was connected."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, lora, strength, clip=None):
        lora = as_lora_file(lora)
        left_out = host.lora_keys.find_unloadable_layers(model, clip, lora)
        patched = host.lora_keys.apply_lora(model, clip, lora, strength, left_out)
        told = host.lora_keys.describe_unused(model, clip, lora, left_out)
        if told:
            tell_on_node(cls, told)
        return io.NodeOutput(*patched, ui=ui.PreviewText(told) if told else None)


class LossPlot(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardLossPlot",
            display_name="Loss Plot (Trainyard)",
            category=CATEGORY,
            description="Plots the loss of a run as an image, raw and smoothed.",
            search_aliases=["loss graph", "training curve"],
            inputs=[LossMapType.Input("losses", tooltip="The LOSS_MAP of a Train node.")],
            outputs=[io.Image.Output("plot", display_name="plot", tooltip="960 x 540 px.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, losses):
        plot = np.asarray(draw_loss_plot(require_losses(losses)), dtype=np.float32) / 255
        image = torch.from_numpy(plot)[None]
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


def require_losses(losses) -> list[float]:
    """The losses of a LOSS_MAP. Raises ValueError for what is none."""
    found = losses.get("loss") if isinstance(losses, dict) else None
    if not isinstance(found, (list, tuple)) or not all(isinstance(loss, (int, float)) for loss in found):
        raise ValueError("losses holds no list of numbers named loss; connect the LOSS_MAP of a Train node.")
    return list(found)


NODES = [SaveLora, LoadLora, ApplyLora, LossPlot]
