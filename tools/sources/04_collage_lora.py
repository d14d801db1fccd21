# ruff: noqa: E501 - notes are prose, a paragraph a line
from ..workflow_builder import BLUE, GREEN
from ..workflow_parts import IMAGE_FOLDER, add_comparison, load_checkpoint

RESULT = "several pictures in one frame, each from edge to edge, and a LoRA from them"
NOTE = """# A LoRA from collages

Several pictures in one frame, each from edge to edge, so that patterns are learnt relative to the frame and nothing is stretched or enlarged.

1. **Pictures.** Choose a folder with captions in *Load Dataset*. Portraits are put side by side, landscapes above each other; of the *frames*, each collage takes the one that wastes least. For SDXL double their sides.

2. **Collages.** *Build Collages* uses every picture equally often and says what it left out and why. The ground between pictures is masked: no loss is counted there. *mix* adds the pictures alone as well.

3. **Train.** As ever. The collages are ordinary pictures in a cache of their own; your folder is not changed.

4. **Look.** The same prompt and seed, without and with the LoRA."""
NOTE_SIZE = (400, 480)


def build(workflow):
    workflow.add_group("1 · Pictures to collages", BLUE, 430, -80,
        (340, [("load", "TrainyardLoadDataset", 280, IMAGE_FOLDER), load_checkpoint(),
               ("told", "PreviewAny", 260, {}, {"source": "collage.report"}, "What was built")]),
        (380, [("collage", "TrainyardBuildCollages", 720, {"frames": "512x512, 576x448, 448x576, 768x320, 320x768"}, {"dataset": "load.dataset"})]))  # fmt: skip
    workflow.add_group("2 · Train", GREEN, 1250, -80,
        (340, [("encode", "TrainyardEncodeDataset", 420, {"resolution": 512, "dropout": 0.1},
                {"dataset": "collage.dataset", "vae": "model.VAE", "clip": "model.CLIP"})]),
        (360, [("train", "TrainyardTrainLora", 800, {"run_name": "my_collage_lora"}, {"model": "model.MODEL", "encoded": "encode.encoded"}),
               ("save", "TrainyardSaveLora", 220, {"name": "my_collage_lora"}, {"lora": "train.lora", "model": "model.MODEL"})]),
        (340, [("plot", "TrainyardLossPlot", 310, {}, {"losses": "train.losses"})]))  # fmt: skip
    add_comparison(
        workflow, "3 · Look: the same prompt and seed, without and with the LoRA", 1250, 1180, "model", "train.model"
    )
