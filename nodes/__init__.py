"""What ComfyUI registers."""

from comfy_api.latest import ComfyExtension


class TrainyardExtension(ComfyExtension):
    async def get_node_list(self):
        from . import (
            captioning,
            captions,
            collage,
            dataset,
            differences,
            encode,
            leco_score,
            lora,
            prompts,
            quality,
            recipes,
            score,
            sweep,
            train_lora,
            validation,
        )

        rooms = (dataset, quality, captioning, captions, collage, encode, train_lora, prompts, differences, sweep, score, leco_score, recipes, validation, lora)
        return [node for room in rooms for node in room.NODES]
