"""What ComfyUI registers."""

from comfy_api.latest import ComfyExtension


class TrainyardExtension(ComfyExtension):
    async def on_load(self):
        from server import PromptServer

        from . import run_routes

        run_routes.register(PromptServer.instance.routes)

    async def get_node_list(self):
        from . import (
            captioning,
            captions,
            collage,
            dataset,
            differences,
            encode,
            features,
            image_conditioning,
            leco_score,
            lora,
            presets,
            prior,
            prompts,
            quality,
            recipes,
            score,
            score_backbones,
            sweep,
            train_lora,
            validation,
        )

        rooms = (
            dataset, quality, captioning, captions, collage, encode, train_lora, prompts, differences, sweep, score, score_backbones, features,
            leco_score, image_conditioning, presets, recipes, prior, validation, lora,
        )  # fmt: skip
        return [node for room in rooms for node in room.NODES]
