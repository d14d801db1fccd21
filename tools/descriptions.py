"""What each bundled workflow holds: see workflows.py."""
# ruff: noqa: E501 - notes are prose, a paragraph a line

from __future__ import annotations

from workflows import BLUE, BROWN, CHECKPOINT, GREEN, VIOLET, Flow

LOAD = {"folder": "input/my_pictures"}


def caption_a_folder():
    flow = Flow("02_caption_a_folder", """# Captions for a folder

1. **Pictures.** Put a folder of pictures into ComfyUI's *input* folder, press **R**, and choose it in *Load Dataset*.

2. **Captions.** *Caption Images* looks at every picture that has no caption yet. Choose who looks:
   - *local model*: Florence-2, BLIP, LLaVA/JoyCaption, Qwen-VL, ... from *models/captioners*. If it is missing, the error says where to get it; or tick *allow_download*.
   - *WD tagger*: tags for drawings.
   - *loaded CLIP*: a Qwen3-VL or Gemma text encoder you have loaded already.
   - *file name* or *fixed text*: no model at all.

3. **Rules.** *Edit Captions* changes all of them: a trigger word, words removed, tags in order. One rule a line; its help page lists them.

4. **By hand.** After a run, *Edit Captions by Hand* shows every picture with its caption. Change what is wrong, and run again: only your changes are applied, nothing is captioned twice.

5. **Save.** *Save Dataset* writes pictures and text files to a new folder in *output/datasets*. Your own folder is never changed.""", (400, 640))  # fmt: skip
    flow.group(
        "1 · Pictures", BLUE, 430, -80,
        (340, [("load", "TrainyardLoadDataset", 190, LOAD), ("found", "PreviewAny", 160, {}, {"source": "load.about"}, "What was found")]),
    )  # fmt: skip
    flow.group(
        "2 · Captions", VIOLET, 840, -80,
        (360, [("prompt", "TrainyardCaptionPrompt", 260, {"style": "training prompt", "length": "short"}),
               ("caption", "TrainyardCaptionImages", 460,
                {"backend": "local model", "model": "florence-community/Florence-2-large-ft", "text": ""},
                {"dataset": "load.dataset", "prompt": "prompt.prompt"})]),
        (380, [("edit", "TrainyardEditCaptions", 260, {"edits": "trigger: my_word\nstrip: boilerplate\ndedupe"}, {"dataset": "caption.dataset"}),
               ("report", "TrainyardCaptionReport", 420, {"trigger": "my_word"}, {"dataset": "edit.dataset"})]),
    )  # fmt: skip
    flow.group(
        "3 · By hand, then save", GREEN, 1670, -80,
        (620, [("hand", "TrainyardEditCaptionsByHand", 620, {}, {"dataset": "edit.dataset"}),
               ("save", "TrainyardSaveDataset", 260, {"name": "my_captioned_pictures"}, {"dataset": "hand.dataset"})]),
    )  # fmt: skip
    return flow


def check_and_clean():
    flow = Flow("03_check_and_clean", """# A messy folder, checked

1. **Load.** Choose a folder in *Load Dataset*. It may be messy: broken files are reported and skipped, subfolders such as *10_cat* count as repeats.

2. **Check.** *Check Dataset* measures every picture: size, blur, enlarged copies, near-duplicates, contrast, exposure, bars, captions. The sheet shows the worst first, with the figure and the limit. *on_reject* = *drop* takes the unusable ones out with their captions and masks; *flag* only marks them.

3. **Copies.** *Deduplicate* keeps the best of each group of near-duplicates.

4. **Sizes.** *Bucket Dataset* shows at which size every picture would be trained, what is cut off, and which picture would be alone in its size.

5. **Save.** The clean set goes to a new folder in *output/datasets*; *Split Dataset* has put a tenth aside for validation. Your own folder is never changed.""", (400, 560))  # fmt: skip
    flow.group("1 · Pictures", BLUE, 430, -80, (340, [
        ("load", "TrainyardLoadDataset", 190, LOAD), ("found", "PreviewAny", 160, {}, {"source": "load.about"}, "What was found")]))  # fmt: skip
    flow.group("2 · Check", BROWN, 840, -80, (420, [
        ("check", "TrainyardCheckDataset", 640, {"on_reject": "drop"}, {"dataset": "load.dataset"}),
        ("told", "PreviewAny", 260, {}, {"source": "check.report"}, "What is wrong")]))  # fmt: skip
    flow.group("3 · Copies and sizes", VIOLET, 1330, -80,
        (380, [("copies", "TrainyardDeduplicateDataset", 460, {}, {"dataset": "check.dataset"}),
               ("sizes", "TrainyardBucketDataset", 440, {}, {"dataset": "copies.dataset"})]),
        (340, [("kept", "PreviewAny", 180, {}, {"source": "copies.report"}, "What was kept"),
               ("cut", "PreviewAny", 240, {}, {"source": "sizes.report"}, "What is cut")]))  # fmt: skip
    flow.group("4 · Look and save", GREEN, 2140, -80, (400, [
        ("split", "TrainyardSplitDataset", 220, {}, {"dataset": "copies.dataset"}),
        ("look", "TrainyardPreviewDataset", 420, {}, {"dataset": "split.train"}),
        ("save", "TrainyardSaveDataset", 260, {"name": "my_clean_pictures"}, {"dataset": "split.train"})]))  # fmt: skip
    return flow


def collage_lora():
    flow = Flow("04_collage_lora", """# A LoRA from collages

Several pictures in one frame, each from edge to edge, so that patterns are learnt relative to the frame and nothing is stretched or enlarged.

1. **Pictures.** Choose a folder with captions in *Load Dataset*. Portraits are put side by side, landscapes above each other.

2. **Collages.** *Build Collages* uses every picture equally often and says what it left out and why. The ground between pictures is masked: no loss is counted there. *mix* adds the pictures alone as well.

3. **Train.** As ever. The collages are ordinary pictures in a cache of their own; your folder is not changed.

4. **Look.** The same prompt and seed, without and with the LoRA.""", (400, 480))  # fmt: skip
    flow.group("1 · Pictures to collages", BLUE, 430, -80,
        (340, [("load", "TrainyardLoadDataset", 190, LOAD), ("model", "CheckpointLoaderSimple", 100, {"ckpt_name": CHECKPOINT["models"][0]["name"]}),
               ("told", "PreviewAny", 260, {}, {"source": "collage.report"}, "What was built")]),
        (380, [("collage", "TrainyardBuildCollages", 720, {"width": 512, "height": 512}, {"dataset": "load.dataset"})]))  # fmt: skip
    flow.nodes["model"]["properties"] = CHECKPOINT
    flow.group("2 · Train", GREEN, 1250, -80,
        (340, [("encode", "TrainyardEncodeDataset", 420, {"resolution": 512, "dropout": 0.1},
                {"dataset": "collage.dataset", "vae": "model.VAE", "clip": "model.CLIP"})]),
        (360, [("train", "TrainyardTrainLora", 420, {"run_name": "my_collage_lora"}, {"model": "model.MODEL", "encoded": "encode.encoded"}),
               ("save", "TrainyardSaveLora", 130, {"name": "my_collage_lora"}, {"lora": "train.lora", "model": "model.MODEL"})]),
        (340, [("plot", "TrainyardLossPlot", 310, {}, {"losses": "train.losses"})]))  # fmt: skip
    look(flow, "3 · Look: the same prompt and seed, without and with the LoRA", 1250, 720, "model", "train.model")
    return flow


def look(flow, title, left, top, model, trained, prompt="my_word, a photo"):
    """Two pictures of one prompt and seed: without and with what was trained."""
    sampler = lambda source: {"model": source, "positive": "positive.CONDITIONING", "negative": "negative.CONDITIONING", "latent_image": "size.LATENT",
                              "seed": "seed.INT"}  # fmt: skip
    steps = {"steps": 25, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal"}
    name = flow.name.split("_", 1)[1]
    flow.group(title, VIOLET, left, top,
        (300, [("positive", "CLIPTextEncode", 130, {"text": prompt}, {"clip": f"{model}.CLIP"}),
               ("negative", "CLIPTextEncode", 110, {"text": ""}, {"clip": f"{model}.CLIP"}, "Negative")]),
        (275, [("size", "EmptyLatentImage", 120, {"width": 512, "height": 512}), ("seed", "PrimitiveInt", 90, {"value": 7}, {}, "Seed of both pictures")]),
        (300, [("without", "KSampler", 270, steps, sampler(f"{model}.MODEL"), "Without"), ("with", "KSampler", 270, steps, sampler(trained), "With")]),
        (225, [("decode_without", "VAEDecode", 60, {}, {"samples": "without.LATENT", "vae": f"{model}.VAE"}),
               ("decode_with", "VAEDecode", 60, {}, {"samples": "with.LATENT", "vae": f"{model}.VAE"})]),
        (300, [("save_without", "SaveImage", 300, {"filename_prefix": f"{name}_without"}, {"images": "decode_without.IMAGE"}, "Without"),
               ("save_with", "SaveImage", 300, {"filename_prefix": f"{name}_with"}, {"images": "decode_with.IMAGE"}, "With")]))  # fmt: skip


FLOWS = [caption_a_folder, check_and_clean, collage_lora]
