# ruff: noqa: E501 - notes are prose, a paragraph a line
from ..workflow_builder import BLUE, GREEN
from ..workflow_parts import IMAGE_FOLDER, load_checkpoint

RESULT = "the same, watched: held-out loss, samples on the way, the best LoRA kept"
NOTE = """# A LoRA that is watched

As *01_first_lora*, with a part of the pictures held out.

1. **Pictures.** Choose a folder with captions. *Split Dataset* puts a tenth aside that is never trained on.

2. **Watch.** *Validation and Previews* measures the loss on the held-out pictures every so many steps, with the same noise each time, and keeps the best LoRA beside the last one. It draws samples while training: write your prompts, one a line. The chart in the Train node shows loss, validation and learning rate.

3. **Stop early.** With *patience* above 0 the run ends by itself when validation has not improved for so many measurements. Cancel keeps the work; Run goes on.

Samples and figures lie in the run's folder in *output/loras/trainyard*; the *Training Runs* tab at the left lists all runs."""
NOTE_SIZE = (400, 560)


def build(workflow):
    workflow.add_group("1 · Pictures", BLUE, 430, -80,
        (340, [("load", "TrainyardLoadDataset", 280, IMAGE_FOLDER), ("split", "TrainyardSplitDataset", 220, {}, {"dataset": "load.dataset"}),
               load_checkpoint()]),
        (340, [("encode", "TrainyardEncodeDataset", 420, {"resolution": 512, "dropout": 0.1},
                {"dataset": "split.train", "vae": "model.VAE", "clip": "model.CLIP"}),
               ("encode_held_out", "TrainyardEncodeDataset", 420, {"resolution": 512},
                {"dataset": "split.validation", "vae": "model.VAE", "clip": "model.CLIP"}, "Encode what is held out")]))  # fmt: skip
    workflow.add_group("2 · Watch and train", GREEN, 1220, -80,
        (380, [("watch", "TrainyardValidation", 720, {"prompts": "my_word, a photo"}, {"held_out": "encode_held_out.encoded", "vae": "model.VAE", "clip": "model.CLIP"})]),
        (420, [("train", "TrainyardTrainLora", 1120, {"run_name": "my_watched_lora"},
                {"model": "model.MODEL", "encoded": "encode.encoded", "validation": "watch.validation"})]),
        (360, [("save", "TrainyardSaveLora", 220, {"name": "my_watched_lora"}, {"lora": "train.lora", "model": "model.MODEL"}),
               ("plot", "TrainyardLossPlot", 310, {}, {"losses": "train.losses"})]))  # fmt: skip
