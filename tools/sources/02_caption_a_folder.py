# ruff: noqa: E501 - notes are prose, a paragraph a line
from ..workflow_builder import BLUE, GREEN, VIOLET
from ..workflow_parts import IMAGE_FOLDER

RESULT = "captions by a model that sees, by a tagger or by rule; edited by hand in the graph; saved beside copies"
NOTE = """# Captions for a folder

1. **Pictures.** Put a folder of pictures into ComfyUI's *input* folder, press **R**, and choose it in *Load Dataset*.

2. **Captions.** *Caption Images* looks at every picture that has no caption yet. Choose who looks:
   - *local model*: Florence-2, BLIP, LLaVA/JoyCaption, Qwen-VL, ... from *models/captioners*. If it is missing, the error says where to get it; or tick *allow_download*.
   - *WD tagger*: tags for drawings.
   - *loaded CLIP*: a Qwen3-VL or Gemma text encoder you have loaded already.
   - *file name* or *fixed text*: no model at all.

3. **Rules.** *Edit Captions* changes all of them: a trigger word, words removed, tags in order. One rule a line; its help page lists them.

4. **By hand.** After a run, *Edit Captions by Hand* shows every picture with its caption. Change what is wrong, and run again: only your changes are applied, nothing is captioned twice.

5. **Save.** *Save Dataset* writes pictures and text files to a new folder in *output/datasets*. Your own folder is never changed."""
NOTE_SIZE = (400, 640)


def build(workflow):
    workflow.add_group(
        "1 · Pictures", BLUE, 430, -80,
        (340, [("load", "TrainyardLoadDataset", 280, IMAGE_FOLDER), ("found", "PreviewAny", 160, {}, {"source": "load.about"}, "What was found")]),
    )  # fmt: skip
    workflow.add_group(
        "2 · Captions", VIOLET, 840, -80,
        (360, [("prompt", "TrainyardCaptionPrompt", 260, {"style": "training prompt", "length": "short"}),
               ("caption", "TrainyardCaptionImages", 460,
                {"backend": "local model", "model": "florence-community/Florence-2-large-ft", "text": ""},
                {"dataset": "load.dataset", "prompt": "prompt.prompt"})]),
        (380, [("edit", "TrainyardEditCaptions", 340, {"edits": "trigger: my_word\nstrip: boilerplate\ndedupe"}, {"dataset": "caption.dataset"}),
               ("report", "TrainyardCaptionReport", 420, {"trigger": "my_word"}, {"dataset": "edit.dataset"})]),
    )  # fmt: skip
    workflow.add_group(
        "3 · By hand, then save", GREEN, 1670, -80,
        (620, [("hand", "TrainyardEditCaptionsByHand", 620, {}, {"dataset": "edit.dataset"}),
               ("save", "TrainyardSaveDataset", 260, {"name": "my_captioned_pictures"}, {"dataset": "hand.dataset"})]),
    )  # fmt: skip
