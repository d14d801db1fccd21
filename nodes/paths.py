"""The only functions that touch names given by a user. Every one refuses a path that leaves its root."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Container
from pathlib import Path

import folder_paths

from ..trainers.data.folder_listing import list_folder
from ..trainers.file_names import check_path_length, find_name_problem

NO_DATASET_FOLDER = "(no folder yet)"
NO_FOLDER = "(none)"
MAX_FOLDER_DEPTH = 3
NON_IMAGE_FOLDERS = ("3d", "trainyard_cache")  # the host's folder of meshes, our own of latents
LONGEST_SUFFIX = "_1000.safetensors"  # of a file that gets a name of the user's


class NamesOnDisk(list[str]):
    """Options that are names of files and folders. They change while ComfyUI runs, so it is the function that opens one
    that checks it, and not the list."""


def dataset_roots() -> dict[str, tuple[Path, ...]]:
    """Where datasets may lie, by the first part of their name; extra_model_paths.yaml may name more for `datasets`."""
    return {
        "input": (Path(folder_paths.get_input_directory()),),
        "datasets": tuple(dict.fromkeys(map(Path, folder_paths.get_folder_paths("datasets")))),
        "output": (saved_datasets_folder(),),
    }


def list_dataset_roots() -> list[Path]:
    return [root for roots in dataset_roots().values() for root in roots]


def saved_datasets_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / "datasets"


def list_dataset_folders() -> list[str]:
    """Folders below input/, datasets/ and output/datasets/, as input/name, datasets/name or output/name, sorted."""
    return NamesOnDisk(find_below_roots(list_nested_folders) or [NO_DATASET_FOLDER])


def find_below_roots(list_below: Callable[[Path], list[str]]) -> dict[str, Path]:
    """datasets/relative -> path of what `list_below` finds in each root. Where two roots hold the same, that of the
    later one is called datasets/name of the root/relative."""
    found: dict[str, Path] = {}
    for name, roots in dataset_roots().items():
        for root in roots:
            for relative in list_below(root):
                plain, longer = f"{name}/{relative}", f"{name}/{root.name}/{relative}"
                choice = longer if plain in found else plain
                if choice not in found:
                    found[choice] = root / relative
    return found


def find_in_roots(choice: str) -> Path:
    """The path behind a name of `find_below_roots`: the first root where it exists. Raises ValueError when it is below
    none of the roots."""
    name, _, rest = choice.replace("\\", "/").partition("/")
    roots = dataset_roots()
    if name not in roots:
        raise ValueError(f"The choice is {choice!r}; it must begin with {' or '.join(f'{r}/' for r in roots)}.")
    places = [(root, rest) for root in roots[name]]
    top, _, below = rest.partition("/")
    places += [(root, below) for root in roots[name][1:] if below and root.name == top]
    for root, relative in places:
        path = resolve_existing_path(root, relative, choice)
        if os.path.exists(path):
            return path
    return resolve_existing_path(*places[0], choice)


def list_nested_folders(root: Path) -> list[str]:
    """Relative paths of folders, at most MAX_FOLDER_DEPTH deep, without hidden ones. Links to folders count directly
    below root, where only the user puts them; deeper ones may have come with somebody's archive."""

    def list_below(parts: tuple[str, ...]) -> list[str]:
        listing = list_folder(root.joinpath(*parts))
        own = [name for name in listing.folders if name not in listing.linked_folders]
        entered = own if parts else list_entered_folders(root)
        below = [(*parts, name) for name in entered if is_image_folder_name(name)]
        deeper = len(parts) + 1 < MAX_FOLDER_DEPTH
        return [path for sub in below for path in ["/".join(sub), *(list_below(sub) if deeper else ())]]

    return sorted(list_below(()))


def list_entered_folders(root: Path) -> list[str]:
    """Names of the folders directly below root, without links that lead back to it."""
    return [name for name in list_folder(root).folders if not (is_link(root / name) and is_link_backwards(root / name))]


def is_image_folder_name(name: str) -> bool:
    return not name.startswith(".") and name not in NON_IMAGE_FOLDERS


def is_link(path: Path) -> bool:
    """Whether this is a symbolic link, or a junction of Windows where this Python can tell (3.12)."""
    return path.is_symlink() or getattr(os.path, "isjunction", lambda _: False)(path)


def is_link_backwards(link: Path) -> bool:
    """Whether the link leads to a folder that it lies in itself."""
    return folder_paths.is_within_directory(str(link), str(link.parent))


def resolve_dataset_folder(choice: str) -> Path:
    """The folder behind a choice of `list_dataset_folders`. Raises ValueError when it is below none of the roots."""
    if choice == NO_DATASET_FOLDER:
        raise ValueError(
            "There is no dataset folder yet. Put a folder with images into ComfyUI's input folder, then press R to "
            "refresh."
        )
    return find_in_roots(choice)


DATASET_SAVE_PLACES = ("output/datasets", "input")  # where datasets are saved


def new_dataset_folder(place: str, name: str) -> Path:
    """The folder of this name below output/datasets or input. Raises ValueError for a bad name."""
    if place not in DATASET_SAVE_PLACES:
        raise ValueError(f"place is {place!r}; choose {' or '.join(DATASET_SAVE_PLACES)}.")
    root = saved_datasets_folder() if place == DATASET_SAVE_PLACES[0] else dataset_roots()["input"][0]
    plain = validate_path_name(name, "dataset")
    if plain.count("/") >= MAX_FOLDER_DEPTH or any(part.startswith(".") for part in plain.split("/")):
        raise ValueError(
            f"The dataset's name is {name!r}, where Load Dataset would not find it; use a plain name such as my_set, "
            "or folder/my_set."
        )
    return resolve_inside_root(root, plain, name)


def resolve_file_in_folder(folder: Path, name: str) -> Path | None:
    """The file of this name in the folder, None for no name. Raises ValueError when it lies elsewhere or does not
    exist."""
    if not name.strip():
        return None
    file = resolve_inside_root(folder, name.strip().replace("\\", "/"), name)
    if not file.is_file():
        raise ValueError(
            f"There is no file {name!r} in {folder}. Write the name of a .csv, .json or .jsonl file that lies there, "
            "or nothing."
        )
    return file


def list_optional_folders() -> list[str]:
    return NamesOnDisk([NO_FOLDER, *(name for name in list_dataset_folders() if name != NO_DATASET_FOLDER)])


def resolve_optional_folder(choice: str) -> Path | None:
    """The folder behind a choice of `list_optional_folders`; None for none."""
    return None if choice == NO_FOLDER else resolve_dataset_folder(choice)


def image_cache_folder() -> Path:
    """Images that came from the graph, named by their content."""
    return cache_folder() / "pictures"


def validate_path_name(name: str, what: str) -> str:
    """The name with / between its parts. Raises ValueError unless every file system takes it."""
    plain = name.strip(" ").replace("\\", "/").strip("/")
    for part in plain.split("/"):
        if part in ("", ".", "..") or set(part) & set('<>:"|?*\0'):
            raise ValueError(f"The {what}'s name is {name!r}; use a plain name such as my_style, or folder/my_style.")
        if problem := find_name_problem(part, LONGEST_SUFFIX):
            raise ValueError(
                f"The {what}'s name is {name!r}, and {part!r} {problem}. Use a plain name such as my_style, or "
                "folder/my_style."
            )
    return plain


def resolve_inside_root(root: Path, relative: str, shown: str) -> Path:
    """root/relative, which must lie below root, links followed. Raises ValueError otherwise."""
    path = root / relative
    if not folder_paths.is_within_directory(str(root), str(path)):
        raise ValueError(f"{shown!r} leads out of {root}; choose a path inside it.")
    return path


def resolve_existing_path(root: Path, relative: str, shown: str) -> Path:
    """root/relative to read from. Unlike in `resolve_inside_root`, its first part may be a link that leads elsewhere,
    because the user put it there; nothing leads out of where that link leads. Raises ValueError otherwise."""
    top = relative.partition("/")[0]
    if top not in ("", ".", "..") and Path(top).name == top and "\0" not in top and is_link(root / top):
        if is_link_backwards(root / top):
            raise ValueError(f"{shown!r} is a link that leads back to the folder it lies in; choose another folder.")
        root, relative = root / top, relative[len(top) :].lstrip("/")
    path = root / relative
    if not folder_paths.is_within_directory(str(root), str(path)):
        raise ValueError(
            f"{shown!r} leads out of {root}; choose a path inside it. A link may lead elsewhere only if it lies "
            "directly in ComfyUI's input or datasets folder."
        )
    return path


CACHE_NAME = "trainyard_cache"


def cache_folder() -> Path:
    """Encoded latents and texts: safe to delete, rebuilt on demand. In ComfyUI's own datasets folder, whatever other
    roots are named before or after it, unless a cache lies only in one of those."""
    roots, own = dataset_roots()["datasets"], Path(folder_paths.base_path) / "datasets"
    ordered = sorted(roots, key=lambda root: root != own)
    return next((root / CACHE_NAME for root in ordered if (root / CACHE_NAME).is_dir()), ordered[0] / CACHE_NAME)


def image_facts_file() -> Path:
    """What was found out about the images of datasets: safe to delete."""
    from ..trainers.data.fact_store import FACTS_FILE

    return cache_folder() / FACTS_FILE


def loras_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / "loras"


def thumbnails_folder() -> Path:
    """Small images for the page to show, which ComfyUI throws away when it starts."""
    return Path(folder_paths.get_temp_directory()) / "trainyard_thumbs"


def runs_folder() -> Path:
    """One folder per run, below output/loras so that every LoRA loader lists what a run saved."""
    return loras_folder() / "trainyard"


def new_lora_path(name: str, is_the_same) -> Path:
    """name.safetensors in output/loras, else name_2, name_3 ...: the first that does not exist, or that
    `is_the_same(path)` already. Raises ValueError for a bad name."""
    return first_free_path(
        loras_folder(), validate_path_name(name.strip(" ").removesuffix(".safetensors"), "LoRA"), name, is_the_same
    )


def lora_names() -> list[str]:
    return NamesOnDisk(sorted(folder_paths.get_filename_list("loras")) or ["(no LoRA yet)"])


def lora_path(name: str) -> Path:
    """The file behind a name of `lora_names`. Raises ValueError when there is none, or when it is no safetensors
    file."""
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise ValueError(f"There is no LoRA named {name!r} in {', '.join(folder_paths.get_folder_paths('loras'))}.")
    if not path.endswith((".safetensors", ".sft")):
        raise ValueError(
            f"{name!r} is not a .safetensors file; other formats can run code when they are opened and are refused."
        )
    return Path(path)


# -- captioners --------------------------------------------------------------------------------------------------------

CAPTIONER_FOLDERS = (
    "VLM",
    "LLM",
    "LLavacheckpoints",
    "florence2",
    "wd14_tagger",
    "captioners",
)  # where other packs keep theirs, then ours
NON_CAPTIONING_MODELS = ("clip", "siglip", "siglip2", "chinese_clip", "altclip", "clipseg")  # they see, and say nothing


def captioner_roots() -> list[tuple[str, Path]]:
    """(kind, folder) of everywhere a captioner may lie, in the order of search; extra_model_paths.yaml may name
    more."""
    out = []
    for kind in CAPTIONER_FOLDERS:
        registered = folder_paths.folder_names_and_paths.get(kind, ((), None))[0]
        out += [
            (kind, Path(folder)) for folder in dict.fromkeys((*registered, os.path.join(folder_paths.models_dir, kind)))
        ]
    return out


def captioner_download_folder() -> Path:
    """Where downloads go."""
    return Path(folder_paths.models_dir) / "captioners"


def captioner_names() -> list[str]:
    """Captioners on this machine: kind/name or kind/owner/name below models/, owner/name in Hugging Face's cache."""
    found = [
        f"{kind}/{sub}" for kind, root in captioner_roots() if root.is_dir() for sub in find_captioners_below(root)
    ]
    return NamesOnDisk(dict.fromkeys([*found, *(repo for repo, _ in hub_snapshots())]))


def find_captioners_below(root: Path) -> list[str]:
    near = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
    far = [sub for folder in near if not is_captioner(folder) for sub in sorted(folder.iterdir()) if sub.is_dir()]
    return [folder.relative_to(root).as_posix() for folder in [*near, *far] if is_captioner(folder)]


def is_tagger(folder: Path) -> bool:
    return any(folder.glob("*.csv"))


def is_captioner(folder: Path) -> bool:
    """Whether it holds a tagger (a list of tags) or a vision-language model, as far as config.json tells."""
    if is_tagger(folder):
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    sees = isinstance(config, dict) and {"vision_config", "vit_config", "encoder"} & set(config)
    return bool(sees) and config.get("model_type") not in NON_CAPTIONING_MODELS


def hub_cache_folder() -> Path:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub")


def hub_snapshots() -> list[tuple[str, Path]]:
    """(owner/name, folder) of captioners in Hugging Face's cache, the newest snapshot of each."""
    out = []
    for folder in sorted(hub_cache_folder().glob("models--*--*/snapshots")):
        snapshots = [
            s for s in sorted(folder.iterdir(), key=lambda s: s.stat().st_mtime, reverse=True) if is_captioner(s)
        ]
        if snapshots:
            out.append((folder.parent.name.removeprefix("models--").replace("--", "/"), snapshots[0]))
    return out


def resolve_captioner_folder(choice: str) -> Path | None:
    """The folder behind kind/name or owner/name, or None when it is not on this machine. Raises ValueError for a name
    that leaves its root."""
    kind, _, rest = choice.replace("\\", "/").partition("/")
    for root in [root for each, root in captioner_roots() if each == kind and rest]:
        if is_captioner(folder := resolve_inside_root(root, rest, choice)):
            return folder
    if kind in CAPTIONER_FOLDERS or not rest:
        return None
    wanted = [
        resolve_inside_root(root, name, choice)
        for _, root in captioner_roots()
        for name in (Path(rest).name, f"{kind}/{rest}")
    ]
    return next(
        (
            folder
            for folder in [*wanted, *(path for repo, path in hub_snapshots() if repo == f"{kind}/{rest}")]
            if is_captioner(folder)
        ),
        None,
    )


def new_captioner_folder(repo: str) -> Path:
    """Where a repository goes. Raises ValueError when the name is none."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo) or repo.split("/")[0] in CAPTIONER_FOLDERS:
        raise ValueError(f"{repo!r} names no repository to download; it must look like owner/name.")
    captioner_download_folder().mkdir(parents=True, exist_ok=True)
    return resolve_inside_root(captioner_download_folder(), repo.split("/")[1], repo)


# -- prompt files ------------------------------------------------------------------------------------------------------

NO_PROMPT_FILE = "(the text below)"


def list_prompt_files() -> list[str]:
    """Prompt files in input/ and datasets/, as input/name, after the choice of none."""
    from ..trainers.data.concept_prompts import PROMPT_FILE_FORMATS

    return NamesOnDisk([NO_PROMPT_FILE, *list_dataset_files(PROMPT_FILE_FORMATS, captions=False)])


def list_dataset_files(endings: Container[str], captions=True) -> list[str]:
    """input/name of the files with these endings below the dataset roots. captions: also those with an image of the
    same name beside them, which are captions of it."""
    return list(find_below_roots(lambda root: list_root_files(root, endings, captions)))


def list_root_files(root: Path, endings: Container[str], captions: bool) -> list[str]:
    """Relative paths of the files with these endings in root and its folders."""
    found = [
        f"{folder}/{file}" if folder else file
        for folder in ("", *list_nested_folders(root))
        for file in list_files_with_endings(root / folder, endings, captions)
    ]
    return [relative for relative in found if not is_link(root / relative) or can_be_read(root, relative)]


def can_be_read(root: Path, relative: str) -> bool:
    """Whether `resolve_existing_path` takes it."""
    try:
        return bool(resolve_existing_path(root, relative, relative))
    except ValueError:
        return False


def list_files_with_endings(folder: Path, endings: Container[str], captions: bool) -> list[str]:
    from ..trainers.data.readers import image_extensions

    listing = list_folder(folder)
    images = set() if captions else {os.path.splitext(n)[0] for n in listing.files_ending_in(image_extensions())}
    return [name for name in listing.files_ending_in(endings) if os.path.splitext(name)[0] not in images]


def resolve_prompt_file(choice: str) -> Path:
    """The file behind a choice of `list_prompt_files`. Raises ValueError when it is not there or lies elsewhere."""
    path = find_in_roots(choice)
    if not path.is_file():
        raise ValueError(f"There is no file {choice!r}. Put it into ComfyUI's input folder, then press R to refresh.")
    return path


def file_change_stamp(path: Path) -> str:
    """Changes when the file does."""
    stat = path.stat()
    return f"{stat.st_size}/{stat.st_mtime_ns}"


# -- score models ------------------------------------------------------------------------------------------------------

SCORE_MODELS = "score_models"
NO_SCORE_MODEL = "(no score model yet)"
NO_PAIRS = "(none)"


def score_model_folders() -> list[Path]:
    """models/score_models, after what extra_model_paths.yaml names for it; the first is where new ones go."""
    own = os.path.join(folder_paths.models_dir, SCORE_MODELS)
    named, _ = folder_paths.folder_names_and_paths.setdefault(SCORE_MODELS, ([own], {".safetensors"}))
    return [Path(folder) for folder in named]


def score_model_names() -> list[str]:
    score_model_folders()
    names = sorted(n for n in folder_paths.get_filename_list(SCORE_MODELS) if n.endswith(".safetensors"))
    return NamesOnDisk(names or [NO_SCORE_MODEL])


def score_model_path(name: str) -> Path:
    """The file behind a name of `score_model_names`. Raises ValueError when there is none."""
    folders = score_model_folders()
    path = None if name == NO_SCORE_MODEL else folder_paths.get_full_path(SCORE_MODELS, name)
    if path is None or not path.endswith(".safetensors"):
        raise ValueError(
            f"There is no score model named {name!r} in {', '.join(map(str, folders))}. Train one and save it with "
            "Save Score Model."
        )
    return Path(path)


def new_score_model_path(name: str, is_the_same) -> Path:
    """name.safetensors in models/score_models, else name_2, name_3 ...: the first that does not exist, or that
    `is_the_same(path)` already."""
    return first_free_path(
        score_model_folders()[0],
        validate_path_name(name.strip(" ").removesuffix(".safetensors"), "score model"),
        name,
        is_the_same,
    )


def first_free_path(root: Path, plain: str, name: str, is_the_same) -> Path:
    path, count = resolve_inside_root(root, f"{plain}.safetensors", name), 2
    check_path_length(root / f"{plain}{LONGEST_SUFFIX}")
    while path.exists() and not is_the_same(path):
        path = resolve_inside_root(root, f"{plain}_{count}.safetensors", name)
        count += 1
    return path


def score_cache_folder() -> Path:
    """Score models that were trained before, named by the hash of everything that made them."""
    return cache_folder() / "score_models"


def list_pair_files() -> list[str]:
    """Tables in input/ and datasets/ that may hold pairs of images, as input/name, after the choice of none."""
    return NamesOnDisk([NO_PAIRS, *list_dataset_files((".csv", ".tsv"))])


def resolve_pair_file(choice: str) -> Path | None:
    """The file behind a choice of `list_pair_files`; None for none."""
    return None if choice == NO_PAIRS else resolve_prompt_file(choice)


# -- aesthetic heads ---------------------------------------------------------------------------------------------------

AESTHETIC_HEADS = "aesthetic_heads"
HEAD_EXTENSIONS = {".safetensors", ".pth", ".pt", ".ckpt"}
NO_HEAD = "(no head yet)"
NO_POOLER = "(none)"


def aesthetic_head_folders() -> list[Path]:
    """models/aesthetic_heads, after what extra_model_paths.yaml names for it."""
    own = os.path.join(folder_paths.models_dir, AESTHETIC_HEADS)
    named, _ = folder_paths.folder_names_and_paths.setdefault(AESTHETIC_HEADS, ([own], set(HEAD_EXTENSIONS)))
    return [Path(folder) for folder in named]


def aesthetic_head_names() -> list[str]:
    aesthetic_head_folders()
    names = sorted(n for n in folder_paths.get_filename_list(AESTHETIC_HEADS) if Path(n).suffix in HEAD_EXTENSIONS)
    return NamesOnDisk(names or [NO_HEAD])


def aesthetic_head_path(name: str) -> Path:
    """The file behind a name of `aesthetic_head_names`. Raises ValueError when there is none."""
    folders = aesthetic_head_folders()
    path = None if name == NO_HEAD else folder_paths.get_full_path(AESTHETIC_HEADS, name)
    if path is None or Path(path).suffix not in HEAD_EXTENSIONS:
        raise ValueError(
            f"There is no aesthetic head named {name!r} in {', '.join(map(str, folders))}. Put a head there, such as "
            "LAION's sac+logos+ava1-l14-linearMSE.pth (4 MB) for CLIP ViT-L/14, then press R to refresh."
        )
    return Path(path)


def pooler_names() -> list[str]:
    """Files of models/clip_vision that may hold SigLIP's pooling layer, after the choice of none."""
    names = sorted(n for n in folder_paths.get_filename_list("clip_vision") if n.endswith(".safetensors"))
    return NamesOnDisk([NO_POOLER, *names])


def pooler_path(name: str) -> Path | None:
    """The file behind a name of `pooler_names`; None for none. Raises ValueError when there is no such file."""
    if name == NO_POOLER:
        return None
    path = folder_paths.get_full_path("clip_vision", name)
    if path is None or not path.endswith(".safetensors"):
        raise ValueError(
            f"There is no file {name!r} in {', '.join(folder_paths.get_folder_paths('clip_vision'))}. Press R to "
            "refresh."
        )
    return Path(path)
