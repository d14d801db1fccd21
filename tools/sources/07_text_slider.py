# ruff: noqa: E501 - notes are prose, a paragraph a line
from ..workflow_builder import BLUE, GREEN
from ..workflow_parts import RUN_AGAIN, add_strength_sweep, load_checkpoint, loss_plot, save_lora

RESULT = "a slider from three prompts"
NOTE = (
    """# A slider from prompts

No pictures are needed. At +1 the target becomes more like *positive*, at -1 more like *negative*.

1. **Prompts.** One line for each kind of thing the slider is for, in *Load Prompts*, or a .txt, .csv, .tsv, .yaml or .json file in ComfyUI's *input* folder:
   - the target first: *person*
   - *positive* and *negative*: the two ends
   - *guidance*: how far the ends lie apart
   - *attributes*: put before every prompt in turn, so that the slider does not change them on the way
   - *preserve*: prompts that must not move, parted by semicolons

   For a single line, *Load Prompts* can go: write into *Train Text Slider* itself.

2. **Run.** Both ends are trained in every step.

3. **Look.** The sheet shows strengths from -2 to 2 and the curve under them. To bring the slider to scale, set *asked_effect* to 1: then strength 1 of the file that is saved does as much as the prompt *Toward* itself. If the slider never gets that far, the node says so: train longer, or ask for less.

512 px suits SD 1.5. For SDXL set 1024 in *Strength Sweep*."""
    + RUN_AGAIN
)
NOTE_SIZE = (380, 840)


def build(workflow):
    line = ("person | positive: very old person, wrinkles | negative: very young person, smooth skin | guidance: 2 | attributes: male, female | preserve: a street in a town; a cat")  # fmt: skip
    workflow.add_group("1 · Model and prompts", BLUE, 430, -80, (400, [
        load_checkpoint(), ("rows", "TrainyardLoadPrompts", 280, {"text": line}),
        ("found", "PreviewAny", 200, {}, {"source": "rows.about"}, "How it was understood")]))  # fmt: skip
    workflow.add_group("2 · Train", GREEN, 900, -80,
        (380, [("train", "TrainyardTrainTextSlider", 940, {"run_name": "my_age_slider"},
                {"model": "model.MODEL", "clip": "model.CLIP", "prompts": "rows.prompts"})]),
        (360, [loss_plot()]))  # fmt: skip
    add_strength_sweep(workflow, "3 · Look, bring to scale, save", 1730, {"strengths": "-2, -1, 0, 1, 2"}, "photo of a person", save_lora("my_age_slider", "sweep.lora"),
          toward=("photo of a very old person, wrinkles", "Toward (+1)"), away=("photo of a very young person, smooth skin", "Away (-1)"))  # fmt: skip
