"""What ComfyUI registers."""

from comfy_api.latest import ComfyExtension


class TrainyardExtension(ComfyExtension):
    async def on_load(self):
        from server import PromptServer

        from .page import run_routes

        run_routes.register_run_routes(PromptServer.instance.routes)

    async def get_node_list(self):
        from .data import captioning, captions, collage, dataset, encode, quality
        from .scores import features, image_conditioning, score, score_backbones
        from .train import (
            leco,
            leco_score,
            lora,
            presets,
            prior,
            prompts,
            settings_nodes,
            sweep,
            train_lora,
            validation,
        )

        rooms = (
            dataset,
            quality,
            captioning,
            captions,
            collage,
            encode,
            train_lora,
            prompts,
            leco,
            sweep,
            score,
            score_backbones,
            features,
            leco_score,
            image_conditioning,
            presets,
            settings_nodes,
            prior,
            validation,
            lora,
        )
        return [node for room in rooms for node in room.NODES]
