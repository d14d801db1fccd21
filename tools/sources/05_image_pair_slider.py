# ruff: noqa: E501 - notes are prose, a paragraph a line
from ..workflow_parts import RUN_AGAIN, add_pair_training, add_strength_sweep

RESULT = "a slider from a few pairs of pictures"
NOTE = (
    """# A slider from pairs of pictures

1. **Pictures.** Make two folders inside ComfyUI's *input* folder: *more* and *less*. Four to six pairs are enough. Both pictures of a pair show the same scene, carry the **same file name** and have the same shape; only the attribute differs: smiling and not smiling, new and worn, close and far. Press **R**, then choose the folders.

2. **What they show.** Put one text that fits all pictures into *trigger* of *Encode Dataset*, such as *a photo of a person*. Do not name the attribute. Text files beside the pictures are added to it.

3. **Run.** *more* is learnt at strength +1 and *less* at -1, both in every step, with the same noise: what the two have in common cancels.

4. **Look.** The sheet shows strengths from -2 to 2 on seeds of its own, and under them how much each unit of strength does (effect) and how far the pictures move (drift). Too weak at 1? Raise *steps* and press Run: the run goes on. It changes other things too? Lower *rank*, or add pairs that differ in everything else.

512 px suits SD 1.5. For SDXL set 1024 in *Encode Dataset* and in *Strength Sweep*."""
    + RUN_AGAIN
)
NOTE_SIZE = (380, 780)


def build(workflow):
    add_pair_training(
        workflow, "TrainyardTrainImageSlider", "my_slider", ("more", "More of it (+1)"), ("less", "Less of it (-1)")
    )
    add_strength_sweep(
        workflow, "3 · Look: from -2 to 2", 2040, {"strengths": "-2, -1, 0, 1, 2"}, "a photo of a person"
    )
