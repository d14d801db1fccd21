"""What ComfyUI registers."""

from comfy_api.latest import ComfyExtension


class TrainyardExtension(ComfyExtension):
    async def get_node_list(self):
        from . import dataset, lora, recipes, train_lora

        return [
            dataset.LoadDataset,
            dataset.EncodeDataset,
            train_lora.TrainLora,
            recipes.Adapter,
            recipes.Optimizer,
            recipes.NoiseAndLoss,
            lora.SaveLora,
            lora.LoadLora,
            lora.ApplyLora,
            lora.LossPlot,
        ]
