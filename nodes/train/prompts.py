"""Prompts for LECO and sliders, as rows."""

from comfy_api.latest import io

from ...trainers.data.concept_prompts import PROMPT_FORMATS, read_prompt_file, read_prompts
from .. import paths
from ..fields import CATEGORY

PromptRowsType = io.Custom("TRAINYARD_PROMPTS")


class LoadPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardLoadPrompts",
            display_name="Load Prompts",
            category=CATEGORY,
            description="Loads rows of prompts for Train LECO and Train Text Slider, from a file or from the text"
            " below. Each row has its own action, guidance, weight and resolution.",
            search_aliases=["leco prompts", "prompts.yaml", "concept list", "slider prompts", "csv prompts"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=paths.list_prompt_files(),
                    tooltip="A .txt, .csv, .tsv, .yaml or .json file in ComfyUI's input or datasets folder, or the "
                    "text below. Press R after adding one.",
                ),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    tooltip="Used if no file is chosen. One concept per line, such as 'red car -> blue car | "
                    "guidance: 2'.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(PROMPT_FORMATS),
                    default="auto",
                    advanced=True,
                    tooltip="Format of the text; auto detects it. For files, the extension decides.",
                ),
            ],
            outputs=[
                PromptRowsType.Output(
                    "prompts",
                    display_name="prompts",
                    tooltip="For the prompts input of Train LECO and Train Text Slider.",
                ),
                io.String.Output("about", display_name="about", tooltip="Every row as it was parsed."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file, **_):
        return paths.file_change_stamp(paths.resolve_prompt_file(file)) if file != paths.NO_PROMPT_FILE else ""

    @classmethod
    def execute(cls, file, text="", format="auto"):  # noqa: A002 - the input's name is a promise
        notes: list[str] = []
        rows = (
            read_prompts(text, format, notes=notes)
            if file == paths.NO_PROMPT_FILE
            else read_prompt_file(paths.resolve_prompt_file(file), notes=notes)
        )
        return io.NodeOutput(rows, "\n".join([*map(format_prompt_row, rows), *notes]))


def format_prompt_row(row) -> str:
    """One line: what counts in both nodes first, then what only Train LECO reads."""
    shown = {
        "positive": row.effective_positive,
        "unconditional": row.unconditional,
        "attributes": ", ".join(row.attributes),
        "preserve": "; ".join(row.preserve),
    }
    words = "".join(f", {name} {text!r}" for name, text in shown.items() if text)
    return (
        f"{row.target or '(no words)'}: guidance {row.guidance:g}, weight {row.weight:g}{words}; in Train LECO "
        f"{row.action}, neutral {row.effective_neutral!r}"
    )


NODES = [LoadPrompts]
