# ruff: noqa: E501 - notes are prose, a paragraph a line
from ..workflow_builder import BLUE, GREEN
from ..workflow_parts import RUN_AGAIN, add_strength_sweep, load_checkpoint, loss_plot, save_lora

RESULT = "a concept erased by prompts alone"
NOTE = (
    """# Erase a concept (LECO)

No pictures are needed: the model is taught by its own answers to prompts.

1. **Model.** Choose your checkpoint. 512 px suits SD 1.5; SDXL learns well at 512 too (*resolution* in *Train LECO*), but set 1024 in *Strength Sweep*.

2. **Prompts** in *Train LECO* (some are among its advanced inputs):
   - *target*: what must go: *a painting by Van Gogh*
   - *unconditional*: the same without it: *a painting*. What lies between the two is taken away, and nothing else
   - *preserve*: near things that must stay, parted by semicolons
   - *guidance*: how far; 1 is the whole way. Too far shows as drift

   To **enhance**, set *action* and a guidance of 2 or more. To **replace**, write into *positive* what the target becomes.

3. **Run.** *Point Settings* say where it learns; the defaults are right for most. The line in the node says how many forwards a step costs.

4. **Look.** At 0 the model as it is, at 1 without the concept, at -1 with more of it. Effect 1 is what the prompt *Toward* itself looks like. Drift is measured on the prompt that must stay."""
    + RUN_AGAIN
)
NOTE_SIZE = (380, 840)


def build(workflow):
    workflow.add_group("1 · Model", BLUE, 430, -80, (320, [load_checkpoint(), ("points", "TrainyardPoints", 180)]))
    workflow.add_group("2 · Train", GREEN, 820, -80,
        (380, [("train", "TrainyardTrainLeco", 960,
                {"target": "a painting by Van Gogh", "unconditional": "a painting", "preserve": "a painting by Monet; a photo of a village at night",
                 "run_name": "my_leco"}, {"model": "model.MODEL", "clip": "model.CLIP", "points": "points.points"})]),
        (360, [save_lora("my_leco"), loss_plot()]))  # fmt: skip
    add_strength_sweep(workflow, "3 · Look: with and without the concept", 1650, {"strengths": "-1, 0, 0.5, 1"}, "a painting by Van Gogh, a village at night",
          toward=("a painting, a village at night", "Toward (+1)"), away=("a painting by Van Gogh, a village at night", "Away (-1)"),
          preserve=("a painting by Monet, a garden", "Must stay"))  # fmt: skip
