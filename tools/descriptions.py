"""What each bundled workflow holds: see workflows.py."""
# ruff: noqa: E501 - notes are prose, a paragraph a line

from __future__ import annotations

from flow import BLUE, BROWN, CHECKPOINT, GREEN, VIOLET, Flow

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
        (340, [("load", "TrainyardLoadDataset", 280, LOAD), ("found", "PreviewAny", 160, {}, {"source": "load.about"}, "What was found")]),
    )  # fmt: skip
    flow.group(
        "2 · Captions", VIOLET, 840, -80,
        (360, [("prompt", "TrainyardCaptionPrompt", 260, {"style": "training prompt", "length": "short"}),
               ("caption", "TrainyardCaptionImages", 460,
                {"backend": "local model", "model": "florence-community/Florence-2-large-ft", "text": ""},
                {"dataset": "load.dataset", "prompt": "prompt.prompt"})]),
        (380, [("edit", "TrainyardEditCaptions", 340, {"edits": "trigger: my_word\nstrip: "
                                                                "boilerplate\ndedupe"}, {"dataset": "caption.dataset"}),
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
        ("load", "TrainyardLoadDataset", 280, LOAD), ("found", "PreviewAny", 160, {}, {"source": "load.about"}, "What was found")]))  # fmt: skip
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

1. **Pictures.** Choose a folder with captions in *Load Dataset*. Portraits are put side by side, landscapes above each other; of the *frames*, each collage takes the one that wastes least. For SDXL double their sides.

2. **Collages.** *Build Collages* uses every picture equally often and says what it left out and why. The ground between pictures is masked: no loss is counted there. *mix* adds the pictures alone as well.

3. **Train.** As ever. The collages are ordinary pictures in a cache of their own; your folder is not changed.

4. **Look.** The same prompt and seed, without and with the LoRA.""", (400, 480))  # fmt: skip
    flow.group("1 · Pictures to collages", BLUE, 430, -80,
        (340, [("load", "TrainyardLoadDataset", 280, LOAD), ("model", "CheckpointLoaderSimple", 100, {"ckpt_name": CHECKPOINT["models"][0]["name"]}),
               ("told", "PreviewAny", 260, {}, {"source": "collage.report"}, "What was built")]),
        (380, [("collage", "TrainyardBuildCollages", 720, {"frames": "512x512, 576x448, 448x576, 768x320, "
                                                                     "320x768"}, {"dataset": "load.dataset"})]))  # fmt: skip
    flow.nodes["model"]["properties"] = CHECKPOINT
    flow.group("2 · Train", GREEN, 1250, -80,
        (340, [("encode", "TrainyardEncodeDataset", 420, {"resolution": 512, "dropout": 0.1},
                {"dataset": "collage.dataset", "vae": "model.VAE", "clip": "model.CLIP"})]),
        (360, [("train", "TrainyardTrainLora", 800, {"run_name": "my_collage_lora"}, {"model": "model.MODEL", "encoded": "encode.encoded"}),
               ("save", "TrainyardSaveLora", 130, {"name": "my_collage_lora"}, {"lora": "train.lora", "model": "model.MODEL"})]),
        (340, [("plot", "TrainyardLossPlot", 310, {}, {"losses": "train.losses"})]))  # fmt: skip
    look(flow, "3 · Look: the same prompt and seed, without and with the LoRA", 1250, 1180, "model", "train.model")
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


# -- sliders and LECO --------------------------------------------------------------------------------------------------

TWICE = """

Pressing **Run** again on an unchanged graph never trains twice; Cancel keeps the work, and the next Run goes on. The LoRA lies in *output/loras*; press **R** to see it in LoRA loaders."""


def image_pair_slider():
    flow = Flow("05_image_pair_slider", """# A slider from pairs of pictures

1. **Pictures.** Make two folders inside ComfyUI's *input* folder: *more* and *less*. Four to six pairs are enough. Both pictures of a pair show the same scene, carry the **same file name** and have the same shape; only the attribute differs: smiling and not smiling, new and worn, close and far. Press **R**, then choose the folders.

2. **What they show.** Put one text that fits all pictures into *trigger* of *Encode Dataset*, such as *a photo of a person*. Do not name the attribute. Text files beside the pictures are added to it.

3. **Run.** *more* is learnt at strength +1 and *less* at -1, both in every step, with the same noise: what the two have in common cancels.

4. **Look.** The sheet shows strengths from -2 to 2 on seeds of its own, and under them how much each unit of strength does (effect) and how far the pictures move (drift). Too weak at 1? Raise *steps* and press Run: the run goes on. It changes other things too? Lower *rank*, or add pairs that differ in everything else.

512 px suits SD 1.5. For SDXL set 1024 in *Encode Dataset* and in *Strength Sweep*.""" + TWICE, (380, 780))  # fmt: skip
    from_pairs(flow, "TrainyardTrainImageSlider", "my_slider", ("more", "More of it (+1)"), ("less", "Less of it (-1)"))
    sweep(flow, "3 · Look: from -2 to 2", 2040, {"strengths": "-2, -1, 0, 1, 2"}, "a photo of a person")
    return flow


def leco():
    flow = Flow("06_leco", """# Erase a concept (LECO)

No pictures are needed: the model is taught by its own answers to prompts.

1. **Model.** Choose your checkpoint. 512 px suits SD 1.5; SDXL learns well at 512 too (*resolution* in *Train LECO*), but set 1024 in *Strength Sweep*.

2. **Prompts** in *Train LECO* (some are among its advanced inputs):
   - *target*: what must go: *a painting by Van Gogh*
   - *unconditional*: the same without it: *a painting*. What lies between the two is taken away, and nothing else
   - *preserve*: near things that must stay, parted by semicolons
   - *guidance*: how far; 1 is the whole way. Too far shows as drift

   To **enhance**, set *action* and a guidance of 2 or more. To **replace**, write into *positive* what the target becomes.

3. **Run.** *Point Settings* say where it learns; the defaults are right for most. The line in the node says how many forwards a step costs.

4. **Look.** At 0 the model as it is, at 1 without the concept, at -1 with more of it. Effect 1 is what the prompt *Toward* itself looks like. Drift is measured on the prompt that must stay.""" + TWICE, (380, 840))  # fmt: skip
    flow.group("1 · Model", BLUE, 430, -80, (320, [checkpoint(), ("points", "TrainyardPoints", 180)]))
    flow.group("2 · Train", GREEN, 820, -80,
        (380, [("train", "TrainyardTrainLeco", 960,
                {"target": "a painting by Van Gogh", "unconditional": "a painting", "preserve": "a painting by Monet; "
                                                                                                "a photo of a village "
                                                                                                "at night",
                 "run_name": "my_leco"}, {"model": "model.MODEL", "clip": "model.CLIP", "points": "points.points"})]),
        (360, [keep("my_leco"), losses()]))  # fmt: skip
    sweep(flow, "3 · Look: with and without the concept", 1650, {"strengths": "-1, 0, 0.5, 1"}, "a painting by Van "
                                                                                                "Gogh, a village at "
                                                                                                "night",
          toward=("a painting, a village at night", "Toward (+1)"), away=("a painting by Van Gogh, a village at "
                                                                          "night", "Away (-1)"),
          preserve=("a painting by Monet, a garden", "Must stay"))  # fmt: skip
    return flow


def text_slider():
    flow = Flow("07_text_slider", """# A slider from prompts

No pictures are needed. At +1 the target becomes more like *positive*, at -1 more like *negative*.

1. **Prompts.** One line for each kind of thing the slider is for, in *Load Prompts*, or a .txt, .csv, .tsv, .yaml or .json file in ComfyUI's *input* folder:
   - the target first: *person*
   - *positive* and *negative*: the two ends
   - *guidance*: how far the ends lie apart
   - *attributes*: put before every prompt in turn, so that the slider does not change them on the way
   - *preserve*: prompts that must not move, parted by semicolons

   For a single line, *Load Prompts* can go: write into *Train Text Slider* itself.

2. **Run.** Both ends are trained in every step.

3. **Look.** The sheet shows strengths from -2 to 2 and the curve under them. To bring the slider to scale, set *asked_effect* to 1: then strength 1 of the file that is saved does as much as the prompt *Toward* itself. If the slider never gets that far, the node says so: train longer, or ask for less.

512 px suits SD 1.5. For SDXL set 1024 in *Strength Sweep*.""" + TWICE, (380, 840))  # fmt: skip
    line = ("person | positive: very old person, wrinkles | negative: very young person, smooth skin | guidance: 2"
            " | attributes: male, female | preserve: a street in a town; a cat")  # fmt: skip
    flow.group("1 · Model and prompts", BLUE, 430, -80, (400, [
        checkpoint(), ("rows", "TrainyardLoadPrompts", 280, {"text": line}),
        ("found", "PreviewAny", 200, {}, {"source": "rows.about"}, "How it was understood")]))  # fmt: skip
    flow.group("2 · Train", GREEN, 900, -80,
        (380, [("train", "TrainyardTrainTextSlider", 940, {"run_name": "my_age_slider"},
                {"model": "model.MODEL", "clip": "model.CLIP", "prompts": "rows.prompts"})]),
        (360, [losses()]))  # fmt: skip
    sweep(flow, "3 · Look, bring to scale, save", 1730, {"strengths": "-2, -1, 0, 1, 2"}, "photo of a "
                                                                                          "person", keep("my_age_slider", "sweep.lora"),
          toward=("photo of a very old person, wrinkles", "Toward (+1)"), away=("photo of a very young person, smooth "
                                                                                "skin", "Away (-1)"))  # fmt: skip
    return flow


def difference():
    flow = Flow("08_difference", """# Learn what changed between two pictures

1. **Pictures.** Make two folders inside ComfyUI's *input* folder: *before* and *after*. One pair is enough; a few more make the result steadier. Both pictures of a pair carry the **same file name** and have the same size. Change only what is to be learnt: retouch the skin, close the eyes, add line art. Everything else must stay where it is, pixel by pixel. Press **R**, then choose the folders.

2. **What they show.** Put one text that fits both pictures into *trigger* of *Encode Dataset*. Do not name the change.

3. **Run.** 100 steps are a minute or two on a GPU. At strength 1/4 the LoRA is asked to see *after* as the model by itself sees *before*, with the model's own mistakes; at -1/4 the other way round. What the model always gets wrong cancels, and only the change is left to learn.

4. **Look.** Strength 1 shows more of the change than was trained: choose the strength you like on the sheet. To make it strength 1 of the file, put its effect into *asked_effect* and connect *lora* of *Strength Sweep* to *Save LoRA*.

512 px suits SD 1.5. For SDXL set 1024 in *Encode Dataset* and in *Strength Sweep*.""" + TWICE, (380, 800))  # fmt: skip
    from_pairs(
        flow, "TrainyardTrainDifference", "my_difference", ("after", "After the change"), ("before", "Before it")
    )
    sweep(flow, "3 · Look: a little of it, and more", 2040, {"strengths": "-1, -0.5, 0, 0.5, 1"}, "a photo of a person")
    return flow


def checkpoint():
    return "model", "CheckpointLoaderSimple", 100, {"ckpt_name": CHECKPOINT["models"][0]["name"]}, {}, None, CHECKPOINT


def keep(name, lora="train.lora"):
    return "save", "TrainyardSaveLora", 150, {"name": name}, {"lora": lora, "model": "model.MODEL"}


def losses():
    return "plot", "TrainyardLossPlot", 310, {}, {"losses": "train.losses"}


def from_pairs(flow, kind, name, positive, negative):
    """Two folders -> a Train node that learns from pairs of pictures."""
    folder = lambda key, side: (key, "TrainyardLoadDataset", 280, {"folder": f"input/{side[0]}"}, {}, side[1])
    flow.group("1 · Model and pairs of pictures", BLUE, 430, -80,
        (320, [checkpoint(), folder("positive", positive), folder("negative", negative)]),
        (320, [("pairs", "TrainyardImagePairs", 100, {}, {"positive": "positive.dataset", "negative": "negative.dataset"}),
               ("encode", "TrainyardEncodeDataset", 484, {"trigger": "a photo of a person", "dropout": 0.1},
                {"dataset": "pairs.dataset", "vae": "model.VAE", "clip": "model.CLIP"})]))  # fmt: skip
    flow.group("2 · Train", GREEN, 1190, -80,
        (360, [("train", kind, 850, {"run_name": name}, {"model": "model.MODEL", "encoded": "encode.encoded"})]),
        (360, [keep(name), losses()]))  # fmt: skip


def sweep(flow, title, left, widgets, prompt, *more, **asked):
    """Strength Sweep of what was trained, on one prompt. `asked`: further prompts by socket, (text, title)."""
    words = lambda key, text, name: (key, "CLIPTextEncode", 130, {"text": text}, {"clip": "model.CLIP"}, name)
    prompts = {"positive": (prompt, "Prompt"), "negative": ("", "Negative prompt"), **asked}
    links = {key: f"{key}_words.CONDITIONING" for key in prompts}
    flow.group(title, VIOLET, left, -80,
        (320, [words(f"{key}_words", *about) for key, about in prompts.items()]),
        (560, [("sweep", "TrainyardStrengthSweep", 840, widgets, {"model": "model.MODEL", "lora": "train.lora", "vae": "model.VAE", **links})]),
        (360, [*more, ("sheet", "SaveImage", 400, {"filename_prefix": f"{flow.name[3:]}/sheet"}, {"images": "sweep.sheet"}, "The sheet"),
               ("told", "PreviewAny", 160, {}, {"source": "sweep.report"}, "In words")]))  # fmt: skip


# -- scores ------------------------------------------------------------------------------------------------------------

RATED = {"folder": "input/my_ratings", "ratings": "folder names"}


def lora_with_validation():
    flow = Flow("01b_lora_with_validation", """# A LoRA that is watched

As *01_first_lora*, with a part of the pictures held out.

1. **Pictures.** Choose a folder with captions. *Split Dataset* puts a tenth aside that is never trained on.

2. **Watch.** *Validation and Previews* measures the loss on the held-out pictures every so many steps, with the same noise each time, and keeps the best LoRA beside the last one. It draws samples while training: write your prompts, one a line. The chart in the Train node shows loss, validation and learning rate.

3. **Stop early.** With *patience* above 0 the run ends by itself when validation has not improved for so many measurements. Cancel keeps the work; Run goes on.

Samples and figures lie in the run's folder in *output/loras/trainyard*; the *Training Runs* tab at the left lists all runs.""", (400, 560))  # fmt: skip
    flow.group("1 · Pictures", BLUE, 430, -80,
        (340, [("load", "TrainyardLoadDataset", 280, LOAD), ("split", "TrainyardSplitDataset", 220, {}, {"dataset": "load.dataset"}),
               ("model", "CheckpointLoaderSimple", 100, {"ckpt_name": CHECKPOINT["models"][0]["name"]})]),
        (340, [("encode", "TrainyardEncodeDataset", 420, {"resolution": 512, "dropout": 0.1},
                {"dataset": "split.train", "vae": "model.VAE", "clip": "model.CLIP"}),
               ("encode_held_out", "TrainyardEncodeDataset", 420, {"resolution": 512},
                {"dataset": "split.validation", "vae": "model.VAE", "clip": "model.CLIP"}, "Encode what is held "
                                                                                           "out")]))  # fmt: skip
    flow.nodes["model"]["properties"] = CHECKPOINT
    flow.group("2 · Watch and train", GREEN, 1220, -80,
        (380, [("watch", "TrainyardValidation", 720, {"prompts": "my_word, a "
                                                                 "photo"}, {"held_out": "encode_held_out.encoded", "vae": "model.VAE", "clip": "model.CLIP"})]),
        (420, [("train", "TrainyardTrainLora", 1120, {"run_name": "my_watched_lora"},
                {"model": "model.MODEL", "encoded": "encode.encoded", "validation": "watch.validation"})]),
        (360, [("save", "TrainyardSaveLora", 130, {"name": "my_watched_lora"}, {"lora": "train.lora", "model": "model.MODEL"}),
               ("plot", "TrainyardLossPlot", 310, {}, {"losses": "train.losses"})]))  # fmt: skip
    return flow


def train_score():
    flow = Flow("09_train_aesthetic_score", """# Your taste as a score

1. **Rate.** Make folders whose names begin with your rating inside *input/my_ratings*: *7.5_good*, *3_dull*, ... and sort pictures into them. Or put a *.score* file beside each picture, or a CSV with *file_name* and *score*: then choose *files*. 100 ratings are a start; below 20 no honest figure is possible.

2. **Encode.** No captions are needed: *caption_mode* is *empty (unconditional)* and no CLIP is connected. *flip* teaches that a mirror image is rated the same.

3. **Train.** The score sees latents of the loaded model. The report says how well it rates pictures it has never seen, with intervals; a score that may be no better than chance is not called trained.

4. **Use.** *Score Images* rates any pictures; workflow *12_score_and_filter* keeps the best, *10_leco_score* pulls a LoRA up the score.""", (400, 520))  # fmt: skip
    flow.group("1 · Rated pictures", BLUE, 430, -80,
        (340, [("load", "TrainyardLoadRatedPictures", 190, RATED), ("found", "PreviewAny", 160, {}, {"source": "load.about"}, "What was found"),
               ("model", "CheckpointLoaderSimple", 100, {"ckpt_name": CHECKPOINT["models"][0]["name"]})]),
        (340, [("encode", "TrainyardEncodeDataset", 460, {"resolution": 512, "caption_mode": "empty (unconditional)", "flip": True},
                {"dataset": "load.dataset", "vae": "model.VAE"})]))  # fmt: skip
    flow.nodes["model"]["properties"] = CHECKPOINT
    flow.group("2 · Train", GREEN, 1220, -80,
        (380, [("train", "TrainyardTrainScoreModel", 420, {}, {"model": "model.MODEL", "encoded": "encode.encoded"}),
               ("save", "TrainyardSaveScoreModel", 100, {"name": "my_taste"}, {"score_model": "train.score_model"})]),
        (360, [("told", "PreviewAny", 300, {}, {"source": "train.report"}, "How good it "
                                                                           "is"), ("plot", "TrainyardLossPlot", 310, {}, {"losses": "train.losses"})]))  # fmt: skip
    flow.group("3 · Look", VIOLET, 2050, -80,
        (420, [("score", "TrainyardScoreImages", 620, {}, {"score_model": "train.score_model", "dataset": "load.dataset", "vae": "model.VAE"})]))  # fmt: skip
    return flow


def leco_score():
    flow = Flow("10_leco_score", """# A LoRA pulled up a score

No pictures and no captions: the LoRA learns to draw what a score model rates high.

1. **Score.** Train one with *09_train_aesthetic_score*, then choose it in *Load Score Model*. It must belong to the latents of the loaded model.

2. **Prompts.** One a line. A number in front says what is wanted: *1 | a beautiful landscape*, *-1 | an ugly landscape*, *0 | a portrait* stays as it is.

3. **Anchor.** The LoRA is held near the model's own answer (*anchor*), because a score without one is fooled: pictures fall apart while the figure rises. The run watches drift and diversity and says so.

4. **Look.** The sheet shows strengths 0 to 1.5. Half strength is often the better picture.""", (400, 480))  # fmt: skip
    flow.group("1 · Model, score, prompts", BLUE, 430, -80,
        (360, [("model", "CheckpointLoaderSimple", 100, {"ckpt_name": CHECKPOINT["models"][0]["name"]}),
               ("score", "TrainyardLoadScoreModel", 120, {"file": "my_taste.safetensors"}, {"model": "model.MODEL"}),
               ("prompts", "TrainyardLoadSignedPrompts", 240, {"text": "1 | a beautiful landscape\n1 | a portrait of a "
                                                                       "person\n0 | a street at night"})]))  # fmt: skip
    flow.nodes["model"]["properties"] = CHECKPOINT
    flow.group("2 · Train", GREEN, 870, -80,
        (360, [("settings", "TrainyardLecoScoreSettings", 480)]),
        (400, [("train", "TrainyardTrainLecoScore", 900, {"run_name": "my_score_lora"},
                {"model": "model.MODEL", "clip": "model.CLIP", "score_model": "score.score_model", "prompts": "prompts.prompts", "settings": "settings.settings"})]),
        (340, [("save", "TrainyardSaveLora", 130, {"name": "my_score_lora"}, {"lora": "train.lora", "model": "model.MODEL"}),
               ("told", "PreviewAny", 260, {}, {"source": "train.report"}, "What happened")]))  # fmt: skip
    flow.group("3 · Look", VIOLET, 2080, -80,
        (300, [("positive", "CLIPTextEncode", 130, {"text": "a beautiful landscape"}, {"clip": "model.CLIP"}),
               ("negative", "CLIPTextEncode", 110, {"text": ""}, {"clip": "model.CLIP"}, "Negative")]),
        (460, [("sweep", "TrainyardStrengthSweep", 640, {"strengths": "0, 0.5, 1, 1.5"},
                {"model": "model.MODEL", "lora": "train.lora", "vae": "model.VAE", "positive": "positive.CONDITIONING", "negative": "negative.CONDITIONING"})]))  # fmt: skip
    return flow


def pretrain():
    flow = Flow("11_pretrain_on_my_art", """# A backbone that knows your pictures

Ratings are few, pictures are many. Let the backbone of a score look at all of them first, without any rating.

1. **All pictures.** A folder with everything you have; no captions, no ratings.

2. **Pretrain.** Parts are hidden and must be filled in (*inpaint*), crops of one picture must be recognised (*simclr*). The report says what it is worth: how often crops of the same picture find each other.

3. **Rate a few.** As in *09_train_aesthetic_score*, with the backbone connected to *pretrained*.""", (400, 400))  # fmt: skip
    flow.group("1 · All pictures", BLUE, 430, -80,
        (340, [("load", "TrainyardLoadDataset", 280, LOAD), ("model", "CheckpointLoaderSimple", 100, {"ckpt_name": CHECKPOINT["models"][0]["name"]})]),
        (360, [("pretrain", "TrainyardPretrainScoreBackbone", 400, {"size": 256}, {"model": "model.MODEL", "vae": "model.VAE", "dataset": "load.dataset"}),
               ("worth", "PreviewAny", 240, {}, {"source": "pretrain.report"}, "What it is worth")]))  # fmt: skip
    flow.nodes["model"]["properties"] = CHECKPOINT
    flow.group("2 · A few ratings", GREEN, 1240, -80,
        (340, [("rated", "TrainyardLoadRatedPictures", 190, RATED),
               ("encode", "TrainyardEncodeDataset", 460, {"resolution": 256, "caption_mode": "empty (unconditional)", "flip": True},
                {"dataset": "rated.dataset", "vae": "model.VAE"})]),
        (380, [("train", "TrainyardTrainScoreModel", 420, {}, {"model": "model.MODEL", "encoded": "encode.encoded", "pretrained": "pretrain.score_model"}),
               ("save", "TrainyardSaveScoreModel", 100, {"name": "my_pretrained_taste"}, {"score_model": "train.score_model"}),
               ("told", "PreviewAny", 240, {}, {"source": "train.report"}, "How good it is")]))  # fmt: skip
    return flow


def score_and_filter():
    flow = Flow("12_score_and_filter", """# Rate a folder, keep the best

1. **Score.** Choose a score model in *Load Score Model* (train one with *09_train_aesthetic_score*).

2. **Rate.** *Score Images* writes a score into every picture of the dataset and shows the best and the worst.

3. **Keep.** *Rank and Filter by Score* keeps the best half, all above a threshold, or a number of them. *Save Dataset* writes them to a new folder with their scores.""", (400, 320))  # fmt: skip
    flow.group("1 · Pictures and score", BLUE, 430, -80,
        (340, [("load", "TrainyardLoadDataset", 280, LOAD), ("model", "CheckpointLoaderSimple", 100, {"ckpt_name": CHECKPOINT["models"][0]["name"]}),
               ("model_score", "TrainyardLoadScoreModel", 120, {"file": "my_taste.safetensors"}, {"model": "model.MODEL", "vae": "model.VAE"})]))  # fmt: skip
    flow.nodes["model"]["properties"] = CHECKPOINT
    flow.group("2 · Rate", VIOLET, 860, -80,
        (420, [("score", "TrainyardScoreImages", 620, {}, {"score_model": "model_score.score_model", "dataset": "load.dataset", "vae": "model.VAE"})]))  # fmt: skip
    flow.group("3 · Keep the best", GREEN, 1380, -80,
        (420, [("rank", "TrainyardRankAndFilter", 480, {}, {"dataset": "score.dataset"}),
               ("save", "TrainyardSaveDataset", 260, {"name": "my_best_pictures", "layout": "metadata.jsonl"}, {"dataset": "rank.dataset"})]))  # fmt: skip
    return flow


FLOWS = [
    caption_a_folder,
    check_and_clean,
    collage_lora,
    image_pair_slider,
    leco,
    text_slider,
    difference,
    lora_with_validation,
    train_score,
    leco_score,
    pretrain,
    score_and_filter,
]
