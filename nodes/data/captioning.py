"""Captions written by models that see, by taggers, or by plain rules."""

from pathlib import Path

from comfy_api.latest import io

from ...trainers.captioners import known_captioners, template_captioner, vlm
from ...trainers.captioners.caption_dataset import FILL_MISSING, WRITE_MODES, CaptionCache, caption_dataset
from ...trainers.captioners.caption_prompts import (
    PromptSettings,
    build_caption_prompt,
    check_caption_template,
    fill_caption_template,
)
from ...trainers.captioners.vlm import CaptionerSettings
from .. import host, paths
from ..fields import CATEGORY, DatasetType, settings_from_widgets, settings_inputs
from . import tagger_settings

CaptionPromptType = io.Custom("TRAINYARD_CAPTION_PROMPT")

BACKEND_CLIP, BACKEND_LOCAL_MODEL, BACKEND_WD_TAGGER, BACKEND_ZERO_SHOT, BACKEND_FILE_NAME, BACKEND_FIXED_TEXT = (
    CAPTION_BACKENDS
) = (
    "loaded CLIP",
    known_captioners.LOCAL_MODEL,
    known_captioners.WD_TAGGER,
    "zero-shot tags",
    "file name",
    "fixed text",
)
MAX_PREVIEW_CAPTIONS = 12  # captions in the preview


class CaptionImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardCaptionImages",
            display_name="Caption Images",
            category=CATEGORY,
            description="Generates captions or tags for the images of a dataset: with the loaded CLIP, a local "
            "vision-language model, a tagger, or from file names. Files on disk stay unchanged.",
            search_aliases=["auto caption", "describe", "vlm", "florence", "joycaption", "blip", "wd14", "interrogate"],
            inputs=[
                DatasetType.Input("dataset", tooltip="From Load Dataset."),
                io.Combo.Input(
                    "backend",
                    options=list(CAPTION_BACKENDS),
                    default=BACKEND_CLIP,
                    tooltip="The captioner. The help page lists what each one needs.",
                ),
                io.Combo.Input(
                    "model",
                    options=list_captioner_models(),
                    default=next(iter(known_captioners.KNOWN_CAPTIONERS)),
                    tooltip="For 'local model' and 'WD tagger'. Press R after adding one. Names with an owner may"
                    " need to be downloaded first.",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    placeholder="empty: the preset of Caption Prompt",
                    tooltip="The instruction to the model; the text itself for 'fixed text'; the vocabulary for "
                    "'zero-shot tags'. {tags}, {name}, {folder} and {caption} are replaced for each "
                    "image.",
                ),
                io.Combo.Input(
                    "write",
                    options=list(WRITE_MODES),
                    default=FILL_MISSING,
                    tooltip="What to do with existing captions. See the help page.",
                ),
                io.Boolean.Input(
                    "allow_download",
                    default=False,
                    tooltip="Download a missing model from Hugging Face into models/captioners. Off: the network "
                    "is never used.",
                ),
                *settings_inputs(CaptionerSettings),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="For 'loaded CLIP': Qwen3-VL, Gemma 3 or 4. For 'zero-shot tags': the text encoder "
                    "that matches clip_vision.",
                ),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="For 'zero-shot tags': the image encoder."),
                CaptionPromptType.Input(
                    "prompt",
                    optional=True,
                    tooltip="From Caption Prompt: style, length, beginning, forbidden and required words.",
                ),
                tagger_settings.TaggerSettingsType.Input(
                    "tagger",
                    optional=True,
                    tooltip="From Tagger Settings, for taggers and zero-shot tags: thresholds and tag rules.",
                ),
            ],
            outputs=[
                DatasetType.Output("dataset", display_name="dataset", tooltip="The same images with the new captions."),
                io.String.Output(
                    "preview",
                    display_name="preview",
                    tooltip="What was written, how many, and which images failed and why.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, model):
        # a model that is not here is answered by execute, which knows where it was looked for and how it is had
        return True

    @classmethod
    def execute(
        cls,
        dataset,
        backend,
        model,
        text,
        write,
        allow_download,
        clip=None,
        clip_vision=None,
        prompt=None,
        tagger=None,
        **widgets,
    ):
        from ...trainers.captioners import taggers
        from . import loaded_models, zeroshot

        settings, wording = settings_from_widgets(CaptionerSettings, widgets), prompt or PromptSettings()
        report = host.progress.ItemProgressReporter(cls.hidden.unique_id)
        if backend not in (BACKEND_ZERO_SHOT, BACKEND_WD_TAGGER):
            check_caption_template(text)
        if backend in (BACKEND_LOCAL_MODEL, BACKEND_WD_TAGGER):
            folder = require_captioner_folder(model, backend, allow_download, report)
        if backend == BACKEND_CLIP:
            captioner = loaded_models.ClipCaptioner(require_backend_input(clip, "clip", backend), settings, wording)
        elif backend == BACKEND_LOCAL_MODEL:
            captioner = vlm.load_vlm_captioner(
                folder, settings, wording, loaded_models.captioner_dtype(), host.progress.raise_if_interrupted
            )
        elif backend == BACKEND_WD_TAGGER:
            captioner = taggers.load_tagger(folder, check_tagger_settings(tagger))
        elif backend == BACKEND_ZERO_SHOT:
            captioner = zeroshot.make_zero_shot_tagger(
                require_backend_input(clip_vision, "clip_vision", backend),
                require_backend_input(clip, "clip", backend),
                text,
                tagger,
            )
        else:
            captioner = template_captioner.TemplateCaptioner()
        asked = choose_caption_template(backend, captioner, text, wording)
        with loaded_models.managed_captioner(captioner) as at_work:
            done = caption_dataset(
                dataset,
                at_work,
                lambda image: fill_caption_template(asked, image),
                write,
                CaptionCache(paths.cache_folder() / "captions"),
                wording,
                backend in (BACKEND_WD_TAGGER, BACKEND_ZERO_SHOT),
                report,
                host.progress.raise_if_interrupted,
            )
        host.progress.show_node_text(format_caption_counts(done), cls.hidden.unique_id)
        return io.NodeOutput(done.dataset, format_caption_preview(done))


class CaptionPromptNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TrainyardCaptionPrompt",
            display_name="Caption Prompt",
            category=f"{CATEGORY}/settings",
            description="Sets how captions are worded: style, length, opening, required and forbidden words. "
            "Connect it to Caption Images.",
            search_aliases=[
                "caption style",
                "caption length",
                "vlm prompt",
                "bad words",
                "joycaption options",
                "start caption with",
            ],
            inputs=settings_inputs(PromptSettings),
            outputs=[
                CaptionPromptType.Output(
                    "prompt", display_name="prompt", tooltip="For the prompt input of Caption Images."
                )
            ],
        )

    @classmethod
    def execute(cls, **widgets):
        return io.NodeOutput(settings_from_widgets(PromptSettings, widgets))


# -- who writes --------------------------------------------------------------------------------------------------------


def list_captioner_models() -> list[str]:
    """Captioners on this machine, then the known ones that can be had."""
    return paths.NamesOnDisk(dict.fromkeys([*paths.captioner_names(), *known_captioners.KNOWN_CAPTIONERS]))


def require_backend_input(value, name: str, backend: str):
    if value is None:
        raise ValueError(
            f"The backend {backend!r} needs {name}, and nothing is connected to it. Connect a loader node to {name}, "
            "or choose another backend: 'file name' and 'fixed text' need nothing."
        )
    return value


def require_captioner_folder(name: str, backend: str, allow_download: bool, report):
    """The folder of a captioner, downloaded when that is allowed. Raises ValueError when it is not here, or is of
    another kind."""
    folder = paths.resolve_captioner_folder(name)
    if folder is None:
        if not allow_download:
            raise ValueError(
                known_captioners.format_missing_captioner(
                    name,
                    [root for _, root in paths.captioner_roots()] + [paths.hub_cache_folder()],
                    paths.captioner_download_folder(),
                    backend,
                )
            )
        folder = known_captioners.download_captioner(
            name, paths.new_captioner_folder(name), report, host.progress.raise_if_interrupted
        )
    kind = BACKEND_WD_TAGGER if paths.is_tagger(folder) else BACKEND_LOCAL_MODEL
    if kind != backend:
        raise ValueError(
            f"{name} belongs to the backend {kind!r}, and {backend!r} is chosen. Change the backend, or the model."
        )
    return folder


def check_tagger_settings(value):
    from ...trainers.captioners import taggers

    if value is not None and not isinstance(value, taggers.TaggerSettings):
        raise ValueError(
            f"The input tagger holds {type(value).__name__}, and 'WD tagger' needs Tagger Settings. Connect that node, "
            "or nothing."
        )
    return value


def choose_caption_template(backend: str, captioner, text: str, wording: PromptSettings) -> str:
    """What each image's request is made of: the user's own text, else the preset; nothing for those that take no
    instructions."""
    text = text.strip()
    if backend == BACKEND_FIXED_TEXT and not text:
        raise ValueError(
            "The backend is 'fixed text' and text is empty. Write the caption into text; {name}, {folder}, {tags} "
            "and {caption} become those of each image."
        )
    if backend == BACKEND_FILE_NAME:
        return text or "{name}"
    if backend in (BACKEND_WD_TAGGER, BACKEND_ZERO_SHOT):
        return ""
    return text or (build_caption_prompt(wording) if getattr(captioner, "follows_instructions", False) else "")


# -- what was done -----------------------------------------------------------------------------------------------------


def format_caption_counts(done) -> str:
    parts = [
        (done.generated, "captioned"),
        (done.cached, "found in the cache"),
        (done.unchanged, "left as they were"),
        (len(done.failed), "failed"),
    ]
    return ", ".join(f"{count} {what}" for count, what in parts if count) or "no pictures"


def format_caption_preview(done) -> str:
    """The counts, the failures with their reasons, and the first captions."""
    failures = [f"failed {Path(path).name}: {why}" for path, why in done.failed]
    lines = [f"{Path(r.path).name}: {' | '.join(r.captions)}" for r in done.dataset[:MAX_PREVIEW_CAPTIONS]]
    more = (
        [f"... and {len(done.dataset) - MAX_PREVIEW_CAPTIONS} more"] if len(done.dataset) > MAX_PREVIEW_CAPTIONS else []
    )
    return "\n".join([format_caption_counts(done), *failures, *lines, *more])


NODES = [CaptionImages, CaptionPromptNode]
