# ruff: noqa: E501 - notes are prose, a paragraph a line
from ..workflow_builder import BLUE, GREEN, VIOLET
from ..workflow_parts import RATED_FOLDER, load_checkpoint

RESULT = "your ratings as a score of latents, with honest figures"
NOTE = """# Your taste as a score

1. **Rate.** Make folders whose names begin with your rating inside *input/my_ratings*: *7.5_good*, *3_dull*, ... and sort pictures into them. Or put a *.score* file beside each picture, or a CSV with *file_name* and *score*: then choose *files*. 100 ratings are a start; below 20 no honest figure is possible.

2. **Encode.** No captions are needed: *caption_mode* is *empty (unconditional)* and no CLIP is connected. *flip* teaches that a mirror image is rated the same.

3. **Train.** The score sees latents of the loaded model. The report says how well it rates pictures it has never seen, with intervals; a score that may be no better than chance is not called trained.

4. **Use.** *Score Images* rates any pictures; workflow *12_score_and_filter* keeps the best, *10_leco_score* pulls a LoRA up the score."""
NOTE_SIZE = (400, 520)


def build(workflow):
    workflow.add_group("1 · Rated pictures", BLUE, 430, -80,
        (340, [("load", "TrainyardLoadRatedPictures", 190, RATED_FOLDER), ("found", "PreviewAny", 160, {}, {"source": "load.about"}, "What was found"),
               load_checkpoint()]),
        (340, [("encode", "TrainyardEncodeDataset", 460, {"resolution": 512, "caption_mode": "empty (unconditional)", "flip": True},
                {"dataset": "load.dataset", "vae": "model.VAE"})]))  # fmt: skip
    workflow.add_group("2 · Train", GREEN, 1220, -80,
        (380, [("train", "TrainyardTrainScoreModel", 420, {}, {"model": "model.MODEL", "encoded": "encode.encoded"}),
               ("save", "TrainyardSaveScoreModel", 100, {"name": "my_taste"}, {"score_model": "train.score_model"})]),
        (360, [("told", "PreviewAny", 300, {}, {"source": "train.report"}, "How good it is"), ("plot", "TrainyardLossPlot", 310, {}, {"losses": "train.losses"})]))  # fmt: skip
    workflow.add_group("3 · Look", VIOLET, 2050, -80,
        (420, [("score", "TrainyardScoreImages", 620, {}, {"score_model": "train.score_model", "dataset": "load.dataset", "vae": "model.VAE"})]))  # fmt: skip
