"""Captions written by models that see, by taggers, or by plain rules."""

from pathlib import Path

from comfy_api.latest import io

from ...trainers.captioners import known, plain, taggers, vlm
from ...trainers.captioners.prompts import PromptSettings, check_template, filled, request
from ...trainers.captioners.vlm import CaptionerSettings
from ...trainers.captioners.work import FILL, MODES, Words, caption_dataset
from .. import host, paths
from ..fields import CATEGORY, Dataset, inputs, record
from . import captioning_tagger, loaded_models, zeroshot

CaptionPrompt = io.Custom("TRAINYARD_CAPTION_PROMPT")

CLIP, LOCAL, TAGGER, ZERO, NAME, FIXED = BACKENDS = ("loaded CLIP", known.LOCAL, known.TAGGER, "zero-shot tags", "file name", "fixed text")
SHOWN = 12  # captions in the preview


class CaptionImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardCaptionImages",
            display_name="Caption Images",
            category=CATEGORY,
            description="Write captions or tags for the pictures of a dataset: with the CLIP that is loaded, a local vision-language model, a tagger, "
            "or from names. Files on disk are not touched.",
            search_aliases=["auto caption", "describe", "vlm", "florence", "joycaption", "blip", "wd14", "interrogate"],
            inputs=[
                Dataset.Input("dataset", tooltip="From Load Dataset."),
                io.Combo.Input("backend", options=list(BACKENDS), default=CLIP, tooltip="Who writes: see the help page for what each one needs."),
                io.Combo.Input(
                    "model",
                    options=models(),
                    default=next(iter(known.KNOWN)),
                    tooltip="For 'local model' and 'WD tagger'. Press R after adding one; names with an owner may have to be downloaded first.",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    placeholder="empty: the preset of Caption Prompt",
                    tooltip="What the model is asked; the text itself for 'fixed text'; the vocabulary for 'zero-shot tags'. "
                    "{tags}, {name}, {folder} and {caption} become those of each picture.",
                ),
                io.Combo.Input(
                    "write", options=list(MODES), default=FILL, tooltip="What happens to captions that are there already: see the help page."
                ),
                io.Boolean.Input(
                    "allow_download",
                    default=False,
                    tooltip="Fetch a model that is missing from Hugging Face into models/captioners. Off: the network is never used.",
                ),
                *inputs(CaptionerSettings),
                io.Clip.Input("clip", optional=True, tooltip="For 'loaded CLIP': Qwen3-VL, Gemma 3 or 4. For 'zero-shot tags': the partner of clip_vision."),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="For 'zero-shot tags': the model that looks."),
                CaptionPrompt.Input("prompt", optional=True, tooltip="From Caption Prompt: style, length, beginning, forbidden and forced words."),
                captioning_tagger.TaggerRecipe.Input("tagger", optional=True, tooltip="From Tagger Settings, for taggers and zero-shot tags: thresholds and what happens to tags."),
            ],
            outputs=[
                Dataset.Output("dataset", display_name="dataset", tooltip="The same pictures, with the new captions."),
                io.String.Output("preview", display_name="preview", tooltip="What was written, how often, and which pictures failed and why."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, model):
        return True  # a model that is not here is answered by execute, which knows where it was looked for and how it is had

    @classmethod
    def execute(cls, dataset, backend, model, text, write, allow_download, clip=None, clip_vision=None, prompt=None, tagger=None, **widgets):
        settings, wording = record(CaptionerSettings, widgets), prompt or PromptSettings()
        report = host.progress.Steps(cls.hidden.unique_id)
        if backend not in (ZERO, TAGGER):
            check_template(text)
        if backend in (LOCAL, TAGGER):
            folder = model_folder(model, backend, allow_download, report)
        if backend == CLIP:
            captioner = loaded_models.LoadedClip(needed(clip, "clip", backend), settings, wording)
        elif backend == LOCAL:
            captioner = vlm.load(folder, settings, wording, loaded_models.dtype(), host.progress.interrupted)
        elif backend == TAGGER:
            captioner = taggers.load(folder, tagger_settings(tagger))
        elif backend == ZERO:
            captioner = zeroshot.zero_shot(needed(clip_vision, "clip_vision", backend), needed(clip, "clip", backend), text, tagger)
        else:
            captioner = plain.Spoken()
        asked = template(backend, captioner, text, wording)
        with loaded_models.held(captioner) as at_work:
            done = caption_dataset(
                dataset, at_work, lambda picture: filled(asked, picture), write, Words(paths.cache_folder() / "captions"), wording,
                backend in (TAGGER, ZERO), report, host.progress.interrupted,
            )  # fmt: skip
        host.progress.show(counted(done), cls.hidden.unique_id)
        return io.NodeOutput(done.dataset, preview(done))


class CaptionPromptNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardCaptionPrompt",
            display_name="Caption Prompt",
            category=f"{CATEGORY}/settings",
            description="How captions are worded: style, length, how they begin, words they must or must not hold. Connect it to Caption Images.",
            search_aliases=["caption style", "caption length", "vlm prompt", "bad words", "joycaption options", "start caption with"],
            inputs=inputs(PromptSettings),
            outputs=[CaptionPrompt.Output("prompt", display_name="prompt", tooltip="For the prompt input of Caption Images.")],
        )

    @classmethod
    def execute(cls, **widgets):
        return io.NodeOutput(record(PromptSettings, widgets))


# -- who writes ----------------------------------------------------------------------------------------------------------------------


def models() -> list[str]:
    """Captioners on this machine, then the known ones that can be had."""
    return list(dict.fromkeys([*paths.captioner_names(), *known.KNOWN]))


def needed(value, name: str, backend: str):
    if value is None:
        raise ValueError(f"The backend {backend!r} needs {name}, and nothing is connected to it. Connect a loader node to {name}, or choose another "
                         "backend: 'file name' and 'fixed text' need nothing.")
    return value


def model_folder(name: str, backend: str, allow_download: bool, report):
    """The folder of a captioner, downloaded when that is allowed. Raises ValueError when it is not here, or is of another kind."""
    folder = paths.captioner_model(name)
    if folder is None:
        if not allow_download:
            raise ValueError(known.missing(name, [root for _, root in paths.captioner_roots()] + [paths.hub_cache()], paths.captioners_folder(), backend))
        folder = known.fetch(name, paths.captioner_to_download(name), report, host.progress.interrupted)
    kind = TAGGER if paths.is_tagger(folder) else LOCAL
    if kind != backend:
        raise ValueError(f"{name} belongs to the backend {kind!r}, and {backend!r} is chosen. Change the backend, or the model.")
    return folder


def tagger_settings(value):
    if value is not None and not isinstance(value, taggers.TaggerSettings):
        raise ValueError(f"The input tagger holds {type(value).__name__}, and 'WD tagger' needs Tagger Settings. Connect that node, or nothing.")
    return value


def template(backend: str, captioner, text: str, wording: PromptSettings) -> str:
    """What each picture's request is made of: the user's own text, else the preset; nothing for those that take no instructions."""
    text = text.strip()
    if backend == FIXED and not text:
        raise ValueError("The backend is 'fixed text' and text is empty. Write the caption into text; {name}, {folder}, {tags} and {caption} "
                         "become those of each picture.")
    if backend == NAME:
        return text or "{name}"
    if backend in (TAGGER, ZERO):
        return ""
    return text or (request(wording) if getattr(captioner, "follows", False) else "")


# -- what was done --------------------------------------------------------------------------------------------------------------------


def counted(done) -> str:
    parts = [(done.made, "captioned"), (done.kept, "found in the cache"), (done.passed, "left as they were"), (len(done.failed), "failed")]
    return ", ".join(f"{count} {what}" for count, what in parts if count) or "no pictures"


def preview(done) -> str:
    """The counts, the failures with their reasons, and the first captions."""
    failures = [f"failed {Path(path).name}: {why}" for path, why in done.failed]
    lines = [f"{Path(r.path).name}: {' | '.join(r.captions)}" for r in done.dataset[:SHOWN]]
    more = [f"... and {len(done.dataset) - SHOWN} more"] if len(done.dataset) > SHOWN else []
    return "\n".join([counted(done), *failures, *lines, *more])


NODES = [CaptionImages, CaptionPromptNode, *captioning_tagger.NODES]
