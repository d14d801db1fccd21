"""What ComfyUI registers."""

from comfy_api.latest import ComfyExtension


class TrainyardExtension(ComfyExtension):
    async def get_node_list(self):
        from . import captioning, captions, collage, dataset, differences, encode, lora, prompts, quality, recipes, score, sweep, train_lora

        rooms = (dataset, quality, captioning, captions, collage, encode, train_lora, prompts, differences, sweep, score, recipes, lora)
        return [node for room in rooms for node in room.NODES]
