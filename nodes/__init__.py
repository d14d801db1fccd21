"""What ComfyUI registers: every node of every module below that lists some in NODES."""

import importlib
import pathlib

from comfy_api.latest import ComfyExtension

# The page's node library shows nodes in the order of their registration: these modules first, others after them.
MENU_ORDER = (
    *("dataset", "quality", "captioning", "tagger_settings", "captions", "collage", "encode"),
    *("train_lora", "prompts", "leco", "image_pairs", "sweep"),
    *("score", "score_backbones", "prompt_match", "features", "leco_score", "image_conditioning"),
    *("presets", "settings_nodes", "prior", "validation", "lora"),
)


class TrainyardExtension(ComfyExtension):
    async def on_load(self):
        from server import PromptServer

        from .page import run_routes, thumbnail_routes

        run_routes.register_run_routes(PromptServer.instance.routes)
        thumbnail_routes.register_thumbnail_routes(PromptServer.instance.routes)

    async def get_node_list(self):
        from .input_checks import with_checked_inputs

        modules = [importlib.import_module(name, __package__) for name in find_node_modules()]
        return [with_checked_inputs(node) for module in modules for node in module.NODES]


def find_node_modules() -> list[str]:
    """Relative names of the modules with nodes, in the order of the menu. They are found by their text, so that helper
    modules are imported only by those that need them."""
    files = pathlib.Path(__file__).parent.glob("*/*.py")
    found = [file for file in sorted(files) if "\nNODES = " in file.read_text(encoding="utf-8")]
    place = {name: number for number, name in enumerate(MENU_ORDER)}
    found.sort(key=lambda file: place.get(file.stem, len(place)))
    return [f".{file.parent.name}.{file.stem}" for file in found]
