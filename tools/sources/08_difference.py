# ruff: noqa: E501 - notes are prose, a paragraph a line
from ..workflow_parts import RUN_AGAIN, add_pair_training, add_strength_sweep

RESULT = "what changed between two pictures, as a LoRA"
NOTE = (
    """# Learn what changed between two pictures

1. **Pictures.** Make two folders inside ComfyUI's *input* folder: *before* and *after*. One pair is enough; a few more make the result steadier. Both pictures of a pair carry the **same file name** and have the same size. Change only what is to be learnt: retouch the skin, close the eyes, add line art. Everything else must stay where it is, pixel by pixel. Press **R**, then choose the folders.

2. **What they show.** Put one text that fits both pictures into *trigger* of *Encode Dataset*. Do not name the change.

3. **Run.** 100 steps are a minute or two on a GPU. At strength 1/4 the LoRA is asked to see *after* as the model by itself sees *before*, with the model's own mistakes; at -1/4 the other way round. What the model always gets wrong cancels, and only the change is left to learn.

4. **Look.** Strength 1 shows more of the change than was trained: choose the strength you like on the sheet. To make it strength 1 of the file, put its effect into *asked_effect* and connect *lora* of *Strength Sweep* to *Save LoRA*.

512 px suits SD 1.5. For SDXL set 1024 in *Encode Dataset* and in *Strength Sweep*."""
    + RUN_AGAIN
)
NOTE_SIZE = (380, 800)


def build(workflow):
    add_pair_training(
        workflow, "TrainyardTrainDifference", "my_difference", ("after", "After the change"), ("before", "Before it")
    )
    add_strength_sweep(
        workflow,
        "3 · Look: a little of it, and more",
        2040,
        {"strengths": "-1, -0.5, 0, 0.5, 1"},
        "a photo of a person",
    )
