# ruff: noqa: E501 - notes are prose, a paragraph a line
from ..workflow_builder import BLUE, GREEN, VIOLET
from ..workflow_parts import IMAGE_FOLDER, load_checkpoint

RESULT = "a folder rated, its best half saved"
NOTE = """# Rate a folder, keep the best

1. **Score.** Choose a score model in *Load Score Model* (train one with *09_train_aesthetic_score*).

2. **Rate.** *Score Images* writes a score into every picture of the dataset and shows the best and the worst.

3. **Keep.** *Rank and Filter by Score* keeps the best half, all above a threshold, or a number of them. *Save Dataset* writes them to a new folder with their scores."""
NOTE_SIZE = (400, 320)


def build(workflow):
    workflow.add_group("1 · Pictures and score", BLUE, 430, -80,
        (340, [("load", "TrainyardLoadDataset", 280, IMAGE_FOLDER), load_checkpoint(),
               ("model_score", "TrainyardLoadScoreModel", 120, {"file": "my_taste.safetensors"}, {"model": "model.MODEL", "vae": "model.VAE"})]))  # fmt: skip
    workflow.add_group("2 · Rate", VIOLET, 860, -80,
        (420, [("score", "TrainyardScoreImages", 620, {}, {"score_model": "model_score.score_model", "dataset": "load.dataset", "vae": "model.VAE"})]))  # fmt: skip
    workflow.add_group("3 · Keep the best", GREEN, 1380, -80,
        (420, [("rank", "TrainyardRankAndFilter", 480, {}, {"dataset": "score.dataset"}),
               ("save", "TrainyardSaveDataset", 260, {"name": "my_best_pictures", "layout": "metadata.jsonl"}, {"dataset": "rank.dataset"})]))  # fmt: skip
