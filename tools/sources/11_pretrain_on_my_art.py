# ruff: noqa: E501 - notes are prose, a paragraph a line
from ..workflow_builder import BLUE, GREEN
from ..workflow_parts import IMAGE_FOLDER, RATED_FOLDER, load_checkpoint

RESULT = "a backbone that has seen all your pictures, then a few ratings"
NOTE = """# A backbone that knows your pictures

Ratings are few, pictures are many. Let the backbone of a score look at all of them first, without any rating.

1. **All pictures.** A folder with everything you have; no captions, no ratings.

2. **Pretrain.** Parts are hidden and must be filled in (*inpaint*), crops of one picture must be recognised (*simclr*). The report says what it is worth: how often crops of the same picture find each other.

3. **Rate a few.** As in *09_train_aesthetic_score*, with the backbone connected to *pretrained*."""
NOTE_SIZE = (400, 400)


def build(workflow):
    workflow.add_group("1 · All pictures", BLUE, 430, -80,
        (340, [("load", "TrainyardLoadDataset", 280, IMAGE_FOLDER), load_checkpoint()]),
        (360, [("pretrain", "TrainyardPretrainScoreBackbone", 400, {"size": 256}, {"model": "model.MODEL", "vae": "model.VAE", "dataset": "load.dataset"}),
               ("worth", "PreviewAny", 240, {}, {"source": "pretrain.report"}, "What it is worth")]))  # fmt: skip
    workflow.add_group("2 · A few ratings", GREEN, 1240, -80,
        (340, [("rated", "TrainyardLoadRatedPictures", 190, RATED_FOLDER),
               ("encode", "TrainyardEncodeDataset", 460, {"resolution": 256, "caption_mode": "empty (unconditional)", "flip": True},
                {"dataset": "rated.dataset", "vae": "model.VAE"})]),
        (380, [("train", "TrainyardTrainScoreModel", 420, {}, {"model": "model.MODEL", "encoded": "encode.encoded", "pretrained": "pretrain.score_model"}),
               ("save", "TrainyardSaveScoreModel", 100, {"name": "my_pretrained_taste"}, {"score_model": "train.score_model"}),
               ("told", "PreviewAny", 240, {}, {"source": "train.report"}, "How good it is")]))  # fmt: skip
