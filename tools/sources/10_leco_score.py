# ruff: noqa: E501 - notes are prose, a paragraph a line
from ..workflow_builder import BLUE, GREEN, VIOLET
from ..workflow_parts import load_checkpoint

RESULT = "a LoRA pulled up a score, without pictures or captions"
NOTE = """# A LoRA pulled up a score

No pictures and no captions: the LoRA learns to draw what a score model rates high.

1. **Score.** Train one with *09_train_aesthetic_score*, then choose it in *Load Score Model*. It must belong to the latents of the loaded model.

2. **Prompts.** One a line. A number in front says what is wanted: *1 | a beautiful landscape*, *-1 | an ugly landscape*, *0 | a portrait* stays as it is.

3. **Anchor.** The LoRA is held near the model's own answer (*anchor*), because a score without one is fooled: pictures fall apart while the figure rises. The run watches drift and diversity and says so.

4. **Look.** The sheet shows strengths 0 to 1.5. Half strength is often the better picture."""
NOTE_SIZE = (400, 480)


def build(workflow):
    workflow.add_group("1 · Model, score, prompts", BLUE, 430, -80,
        (360, [load_checkpoint(),
               ("score", "TrainyardLoadScoreModel", 120, {"file": "my_taste.safetensors"}, {"model": "model.MODEL"}),
               ("prompts", "TrainyardLoadSignedPrompts", 240, {"text": "1 | a beautiful landscape\n1 | a portrait of a person\n0 | a street at night"})]))  # fmt: skip
    workflow.add_group("2 · Train", GREEN, 870, -80,
        (360, [("settings", "TrainyardLecoScoreSettings", 480)]),
        (400, [("train", "TrainyardTrainLecoScore", 900, {"run_name": "my_score_lora"},
                {"model": "model.MODEL", "clip": "model.CLIP", "score_model": "score.score_model", "prompts": "prompts.prompts", "settings": "settings.settings"})]),
        (340, [("save", "TrainyardSaveLora", 220, {"name": "my_score_lora"}, {"lora": "train.lora", "model": "model.MODEL"}),
               ("told", "PreviewAny", 260, {}, {"source": "train.report"}, "What happened")]))  # fmt: skip
    workflow.add_group("3 · Look", VIOLET, 2080, -80,
        (300, [("positive", "CLIPTextEncode", 130, {"text": "a beautiful landscape"}, {"clip": "model.CLIP"}),
               ("negative", "CLIPTextEncode", 110, {"text": ""}, {"clip": "model.CLIP"}, "Negative")]),
        (460, [("sweep", "TrainyardStrengthSweep", 640, {"strengths": "0, 0.5, 1, 1.5"},
                {"model": "model.MODEL", "lora": "train.lora", "vae": "model.VAE", "positive": "positive.CONDITIONING", "negative": "negative.CONDITIONING"})]))  # fmt: skip
